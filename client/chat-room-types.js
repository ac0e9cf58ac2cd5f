/**
 * The types of chat-room.js. No page loads this file.
 *
 * @typedef {object} Message
 * @property {'message'} kind
 * @property {undefined} [changes]
 * @property {number} order
 * @property {string} author as it is shown
 * @property {string} sender tells authors apart who are shown alike; empty for the visitor
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
 * @property {undefined} [status]
 * @property {number} order
 * @property {string} text
 * @property {string} [more]
 * @property {boolean} [missed]
 * @property {{ joined: Set<string>, left: Set<string> }} [changes] who came and went
 *
 * @typedef {object} Line stands before the first message that nobody has seen
 * @property {'line'} kind
 * @property {undefined} [status]
 * @property {undefined} [changes]
 * @property {number} order
 *
 * @typedef {Message | Notice | Line} Item
 *
 * @typedef {string | { one: string, other: string }} Phrase a text, or one for each plural form of the number `{n}`. Words in
 *   braces are filled in.
 * @typedef {Record<string, Phrase>} Words the phrases of a language
 * @typedef {Record<string, Words | (() => Promise<{ default: Words }>)>} Languages the phrases of each, or what loads them
 *
 * @typedef {'localStorage' | 'sessionStorage'} StorageName
 *
 * @typedef {<K extends keyof HTMLElementTagNameMap>(tag: K, attributes?: Record<string, string>, ...children: (Node | string)[]) =>
 *   HTMLElementTagNameMap[K]} Make
 *
 * @typedef {import('./chat-room-words.js').Speaker} Speaker
 *
 * @typedef {Record<string, HTMLElement> & { text: HTMLTextAreaElement, login: HTMLAnchorElement }} UI the elements by their ids
 *
 * @typedef {object} Parts what comes from the modules that not every page loads, unless they do not come
 * @property {Promise<import('./chat-room-alerts.js').default | void>} [alerts]
 * @property {Promise<import('./chat-room-links.js').default | void>} [links]
 * @property {Promise<import('./chat-room-name.js').default | void>} [name]
 * @property {Promise<import('./chat-room-people.js').default | void>} [people]
 * @property {Promise<import('./chat-room-more.js').default | void>} [more]
 * @property {Promise<import('./chat-room-overlay.js').default | void>} [overlay]
 *
 * @typedef {<P extends keyof Parts>(name: P) => NonNullable<Parts[P]>} Load
 *
 * @typedef {import('./chat-types.js').StateFields} StateFields
 * @typedef {import('./chat-types.js').MessageFields} MessageFields
 * @typedef {import('./chat-types.js').MissedFields} MissedFields
 * @typedef {import('./chat-types.js').Events} Events
 * @typedef {import('./chat-types.js').PresenceFields & { type: string, user?: string }} PeopleEvent `join`, `leave` or `presence`
 *
 * @typedef {Events & { unread: Event & { count: number } }} RoomEvents
 *
 * @typedef {<K extends keyof RoomEvents>(type: K, listener: (event: RoomEvents[K]) => void,
 *   options?: boolean | AddEventListenerOptions) => void} RoomListen
 *
 * @typedef {Omit<HTMLElement, 'addEventListener' | 'removeEventListener' | 'focus'> & {
 *   addEventListener: RoomListen & HTMLElement['addEventListener'],
 *   removeEventListener: RoomListen & HTMLElement['removeEventListener'],
 * }} RoomElement an element that knows its events
 */

/**
 * @template T
 * @typedef {object} How what a list asks of its owner
 * @property {(item: T, mark: string) => HTMLElement} draw makes an element, and again when the mark has changed
 * @property {(item: T, previous: T | undefined) => string} mark names what an item shows of the one before it
 * @property {(item: T) => void} forget is called for an item that the list has dropped
 */

export {};
