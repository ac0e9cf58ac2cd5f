/**
 * A chat to put into a page:
 *
 *     <script type="module" src="/chat-client/chat-room.js"></script>
 *     <chat-room src="/chat/lobby"></chat-room>
 *
 * It needs no style and no script of the page, and nothing that a strict Content-Security-Policy forbids.
 */
import { Chat } from './chat.js';
export type Message = {
    kind: 'message';
    order: number;
    /**
     * as it is shown
     */
    author: string;
    /**
     * tells authors apart who are shown alike
     */
    sender: string;
    /**
     * and `user`: as the server has them
     */
    client?: string;
    user?: string;
    /**
     * as it is shown
     */
    text: string;
    time: Date;
    status: 'theirs' | 'pending' | 'sent' | 'gone' | 'official';
    /**
     * the text of a message from here, as it was sent
     */
    said?: string;
    /**
     * why it was not sent
     */
    code?: string;
    /**
     * whether it has just come
     */
    arrives?: boolean;
};
export type Notice = {
    kind: 'notice';
    order: number;
    text: string;
    more?: string;
    missed?: boolean;
    /**
     * who came and went
     */
    changes?: {
        joined: Set<string>;
        left: Set<string>;
    };
};
export type Line = {
    kind: 'line';
    order: number;
};
export type Item = Message | Notice | Line;
export type Frame = Record<string, any>;
export type Storage = 'localStorage' | 'sessionStorage';
export type RoomEvents = import('./chat-types.js').Events & {
    unread: Event & {
        count: number;
    };
};
export type RoomListen = <K extends keyof RoomEvents>(type: K, listener: (event: RoomEvents[K]) => void, options?: boolean | AddEventListenerOptions) => void;
export type RoomElement = Omit<HTMLElement, 'addEventListener' | 'removeEventListener' | 'focus'> & {
    addEventListener: RoomListen & HTMLElement['addEventListener'];
    removeEventListener: RoomListen & HTMLElement['removeEventListener'];
};
/**
 * @typedef {import('./chat-types.js').Events & { unread: Event & { count: number } }} RoomEvents
 *
 * @typedef {<K extends keyof RoomEvents>(type: K, listener: (event: RoomEvents[K]) => void,
 *   options?: boolean | AddEventListenerOptions) => void} RoomListen
 *
 * @typedef {Omit<HTMLElement, 'addEventListener' | 'removeEventListener' | 'focus'> & {
 *   addEventListener: RoomListen & HTMLElement['addEventListener'],
 *   removeEventListener: RoomListen & HTMLElement['removeEventListener'],
 * }} RoomElement an element that knows its events
 */
declare const Base: new () => RoomElement;
/**
 * A chat. Attributes:
 *
 * - `src`: the URL of a hub.
 * - `name`: the name of the visitor, where the server takes the user from the query (`user {query.name}`). If it is empty,
 *   visitors choose for themselves.
 * - `readonly`: nothing can be written.
 * - `transparent`: only messages, for an overlay on a video.
 * - `login`: the page where a visitor signs in after the server has refused them with 401. Default: this page.
 * - `lang`: `en`, `de`, `fr` or `es`; otherwise the language of the page, or of the browser.
 *
 * Slots: `header` for what stands instead of the room's name, `start` and `actions` for what stands before and after it,
 * `empty` for what stands where nobody has said anything, `below` for what stands below the text box. The parts are `header`, `title`, `messages`, `bubble`, `own-bubble`, `text`, `send` and
 * `people`.
 *
 * Events: all those of `Chat`, with the same fields. `message` comes before the message is shown, and `preventDefault` keeps
 * it away. `unread` has `count`: how many messages came that the visitor has not seen.
 */
export declare class ChatRoom extends Base {
    #private;
    static observedAttributes: string[];
    /** The phrases of each language. A page may change them, and add languages, before it makes elements. */
    static languages: Record<string, import("./chat-room-words.js").Words | (() => Promise<{
        default: import("./chat-room-words.js").Words;
    }>)>;
    constructor();
    /** The connection, to listen to and to ask. A change of `src` makes another one. */
    get chat(): Chat | null;
    /** The state of the connection. */
    get state(): import("./chat-types.js").State;
    /** What the server calls the visitor; empty if it does not know them. */
    get user(): string;
    /** How many messages the visitor has not seen. */
    get unread(): number;
    get src(): string;
    set src(url: string);
    get name(): string | null;
    set name(name: string | null);
    get readOnly(): boolean;
    set readOnly(on: boolean);
    get transparent(): boolean;
    set transparent(on: boolean);
    /** Phrases that stand instead of the element's own, by their names in chat-room-words.js. */
    get phrases(): import("./chat-room-words.js").Words;
    set phrases(phrases: import("./chat-room-words.js").Words);
    /**
     * Sends a message and shows it.
     * @param {string} text
     * @returns {?string} the id in `sent` or `failed`; null if it cannot be sent now
     */
    send(text: string): string | null;
    /** Connects now instead of later, or again after `close`. */
    connect(): void;
    /** Closes the connection until `connect` is called. */
    close(): void;
    /**
     * Asks who is here: a page of the list.
     * @param {{ after?: string, limit?: number }} [page]
     */
    who(page?: {
        after?: string;
        limit?: number;
    }): Promise<import("./chat-types.js").Page | null>;
    /**
     * Puts the focus into the text box.
     * @param {FocusOptions} [options]
     */
    focus(options?: FocusOptions): void;
    /** Shows the newest message. */
    scrollToEnd(): void;
    connectedCallback(): void;
    disconnectedCallback(): void;
    /**
     * @param {string} name
     * @param {?string} before
     * @param {?string} now
     */
    attributeChangedCallback(name: string, before: string | null, now: string | null): void;
}
export {};
