/** The list of the people who are here. A page loads this module when a hub tells who is there. */
import { Panel } from './chat-room-panel.js';
import type { ItemList } from './chat-room-list.js';
import type { Item, PeopleEvent, Speaker, UI } from './chat-room-types.js';
/** The panel, and who is in it. */
export default class People extends Panel {
    #private;
    /**
     * @param {UI} ui
     * @param {() => Speaker} speaker
     */
    constructor(ui: UI, speaker: () => Speaker);
    /**
     * Takes a new list, and shows it.
     * @param {import('./chat-types.js').Page} page
     * @param {string} visitor what the server calls the visitor
     */
    set({ users, next }: import('./chat-types.js').Page, visitor: string): void;
    /** Hides the list, for a room that has not told who is there. */
    hide(): void;
    /**
     * Notes who came and went, and tells it among the messages.
     * @param {PeopleEvent} event
     * @param {ItemList<Item>} messages
     * @param {number} order of the notice
     * @param {Set<string>} own names of the visitor
     * @returns {boolean} whether the list of a small room is wrong now: somebody has opened or closed a further window
     */
    change(event: PeopleEvent, messages: ItemList<Item>, order: number, own: Set<string>): boolean;
    /** Shows the list. */
    show(): void;
}
