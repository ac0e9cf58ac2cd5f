/**
 * A connection to a hub that reconnects by itself (docs/protocol.md).
 *
 *     import { Chat } from './chat.js';
 *
 *     const chat = new Chat('/chat/lobby');
 *     chat.addEventListener('message', ({ user, data }) => console.log(user, data));
 *     chat.send('hello');
 *
 * Messages are text from strangers: show them with `textContent`. chat-types.js has events and options.
 *
 * @typedef {import('./chat-types.js').State} State
 * @typedef {import('./chat-types.js').Data} Data
 * @typedef {import('./chat-types.js').Options} Options
 * @typedef {import('./chat-types.js').Page} Page
 * @typedef {import('./chat-types.js').Hello} Hello
 * @typedef {import('./chat-types.js').Events} Events
 */
export type State = import('./chat-types.js').State;
export type Data = import('./chat-types.js').Data;
export type Options = import('./chat-types.js').Options;
export type Page = import('./chat-types.js').Page;
export type Hello = import('./chat-types.js').Hello;
export type Events = import('./chat-types.js').Events;
declare const Chat_base: new () => import('./chat-types.js').Target;
/** Messages arrive in order and once. */
export declare class Chat extends /** @type {new () => import('./chat-types.js').Target} */ /** @type {new () => import('./chat-types.js').Target} */ Chat_base {
    #private;
    /** @type {string | URL} The address. A change applies to the next attempt. */
    url: string | URL;
    /**
     * @param {string | URL} url also relative (in a page), or http(s)
     * @param {Options} [options]
     */
    constructor(url: string | URL, options?: Options);
    get state(): import("./chat-types.js").State;
    /** The most bytes of a message as JSON with its id, or null if the server has not said so. @returns {?number} */
    get maxMessageSize(): number | null;
    /**
     * Sends a message as soon as connection and `rate` allow. If a connection breaks with the message on its way, it is sent
     * again if the hub's `history` prevents a duplicate, and otherwise has `failed`. With `raw` it may be lost.
     * @param {Data} data
     * @returns {?string} the id in `sent` or `failed`; null if the queue is full or the state is `closed`
     * @throws {TypeError} for anything else
     */
    send(data: Data): string | null;
    /**
     * Asks who is in the hub.
     * @param {{ after?: string, limit?: number }} [page]
     * @returns {Promise<?Page>} null if no answer came
     */
    who(page?: {
        after?: string;
        limit?: number;
    }): Promise<Page | null>;
    /**
     * Connects now instead of later, or again after `closed`.
     * @throws if `WebSocket` refuses the `url`
     */
    connect(): void;
    /** Closes the connection until `connect` is called. Messages that wait have `failed`. */
    close(): void;
}
export {};
