/** What a panel of a kind has in common with the others. */
export declare class Panel {
    #private;
    /**
     * Puts a panel into the element, closed.
     * @param {HTMLElement} button opens it, and closes it again
     * @param {HTMLElement} next what it stands before, for readers of the page from top to bottom
     * @param {import('./chat-room-words.js').Speaker} speaker
     * @param {string} id
     * @param {Record<string, string>} attributes
     * @param {...HTMLElement} children the first is its heading
     */
    constructor(button: HTMLElement, next: HTMLElement, speaker: import('./chat-room-words.js').Speaker, id: string, attributes: Record<string, string>, ...children: HTMLElement[]);
    toggle(open?: boolean): void;
}
