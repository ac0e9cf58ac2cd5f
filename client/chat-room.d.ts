/**
 * The element `<chat-room>`, a chat to put into a page. docs/clients.md has its attributes, slots, parts and events, and
 * client/README.md says what its modules do.
 */
import { Chat } from './chat.js';
import type { RoomElement, Words } from './chat-room-types.js';
declare const Base: new () => RoomElement;
export declare class ChatRoom extends Base {
    #private;
    static observedAttributes: string[];
    /** The phrases of each language. A page may change them before it makes elements. */
    static languages: import("./chat-room-types.js").Languages;
    constructor();
    /** The connection, to listen to and to ask. A change of `src` makes another one. */
    get chat(): Chat | null;
    get state(): import("./chat-types.js").State;
    /** What the server calls the visitor; empty if it does not know them. */
    get user(): string;
    get unread(): number;
    get src(): string;
    set src(url: string);
    get name(): string | null;
    set name(name: string | null);
    get readOnly(): boolean;
    set readOnly(on: boolean);
    get transparent(): boolean;
    set transparent(on: boolean);
    /** Phrases instead of the element's own. */
    get phrases(): Words;
    set phrases(phrases: Words);
    /** Sends a message and shows it. Returns the id in `sent` or `failed`, or null if it cannot be sent now. */
    send(/** @type {string} */ text: string): string | null;
    /** Connects now, or again after `close`. */
    connect(): void;
    close(): void;
    /** Asks who is here: a page of the list. */
    who(/** @type {{ after?: string, limit?: number }} */ page?: {
        after?: string;
        limit?: number;
    }): Promise<import("./chat-types.js").Page | null>;
    focus(/** @type {FocusOptions} */ options?: FocusOptions): void;
    /** Shows the newest message. */
    scrollToEnd(): void;
    connectedCallback(): void;
    disconnectedCallback(): void;
    attributeChangedCallback(/** @type {string} */ name: string, /** @type {?string} */ before: string | null, /** @type {?string} */ now: string | null): void;
}
export {};
