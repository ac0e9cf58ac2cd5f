import type { Speaker, UI } from './chat-room-types.js';
/** A field for the name. */
export default class Name {
    #private;
    /**
     * @param {UI} ui
     * @param {() => Speaker} speaker
     */
    constructor({ below, text }: UI, speaker: () => Speaker);
    /**
     * @param {string} name
     * @param {boolean} shown
     * @param {boolean} fixed whether it cannot be changed
     * @param {(name: string) => void} changed
     */
    show(name: string, shown: boolean, fixed: boolean, changed: (name: string) => void): void;
}
