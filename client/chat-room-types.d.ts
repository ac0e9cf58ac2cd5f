/**
 * The types of chat-room.js. No page loads this file.
 *
 * @typedef {object} Message
 * @property {'message'} kind
 * @property {number} order
 * @property {string} author as it is shown
 * @property {string} [sender] tells authors apart who are shown alike; empty for the visitor
 * @property {string} [client] and `user`: as the server has them
 * @property {string} [user]
 * @property {string} text as it is shown
 * @property {Date} time
 * @property {'theirs' | 'pending' | 'sent' | 'gone' | 'official'} status
 * @property {string} [said] the text of a message from here, as it was sent
 * @property {string} [code] why it was not sent
 * @property {boolean} [arrives] whether it has just come
 *
 * @typedef {object} Notice
 * @property {'notice'} kind
 * @property {number} order
 * @property {string} text
 * @property {string} [more]
 * @property {boolean} [missed]
 * @property {{ joined: Set<string>, left: Set<string> }} [changes] who came and went
 *
 * @typedef {object} Line stands before the first message that nobody has seen
 * @property {'line'} kind
 * @property {number} order
 *
 * @typedef {Message | Notice | Line} Item
 *
 * @typedef {string | { one: string, other: string }} Phrase a text, or one for each plural form of the number `{n}`. Words in
 *   braces are filled in.
 * @typedef {Record<string, Phrase>} Words the phrases of a language
 * @typedef {Record<string, Words | (() => Promise<{ default: Words }>)>} Languages the phrases of each, or what loads them
 *
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
export type Message = {
    kind: 'message';
    order: number;
    /**
     * as it is shown
     */
    author: string;
    /**
     * tells authors apart who are shown alike; empty for the visitor
     */
    sender?: string;
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
export type Phrase = string | {
    one: string;
    other: string;
};
export type Words = Record<string, Phrase>;
export type Languages = Record<string, Words | (() => Promise<{
    default: Words;
}>)>;
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
export {};
