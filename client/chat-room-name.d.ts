/** A field for the name. */
export default class Name {
    #private;
    /**
     * @param {Record<string, any>} ui
     * @param {() => import('./chat-room-words.js').Speaker} speaker
     */
    constructor({ below, text }: Record<string, any>, speaker: () => import('./chat-room-words.js').Speaker);
    /**
     * @param {string} name
     * @param {boolean} shown
     * @param {boolean} fixed whether it cannot be changed
     * @param {(name: string) => void} changed
     */
    show(name: string, shown: boolean, fixed: boolean, changed: (name: string) => void): void;
}
