/**
 * The types of chat.js. No page loads this file.
 *
 * @typedef {'connecting' | 'open' | 'waiting' | 'closed'} State `waiting` for the next attempt; `closed` until `connect`
 *
 * @typedef {string | ArrayBuffer | ArrayBufferView | Blob} Data what `send` takes
 *
 * @typedef {object} Options times in milliseconds
 * @property {number} [base=1000] the longest first wait; each further wait may be twice as long
 * @property {number} [cap=30000] the longest wait of all, unless the server asks for more
 * @property {number} [stable=10000] after a connection of this length the waits start over
 * @property {number} [timeout=15000] how long to wait for a connection or an answer
 * @property {number} [queue=100] how many messages may wait to be sent or answered
 * @property {boolean} [raw=false] whether the server does not speak the protocol
 *
 * @typedef {object} Page a part of the users who are in a hub
 * @property {number} clients how many clients are in the hub
 * @property {{ user: string, clients: number }[]} users each user once
 * @property {string} [next] there are more users: ask for those `after` this one
 *
 * @typedef {object} Hello what the server says first; docs/protocol.md has the details
 * @property {string} client the id of this client
 * @property {string} user the identity that authentication on the server found; empty if anonymous
 * @property {string} hub
 * @property {string} epoch one life of the hub
 * @property {number} head the number of the newest message
 * @property {number} clients how many clients are in the hub
 * @property {number} replay how many older messages follow, up to `head`
 * @property {boolean} [resumed] whether all missed messages follow; only when the client has been connected before
 * @property {number} [missed] how many are lost; only if not `resumed`
 * @property {string} [token] a secret, for sending a message again
 * @property {number} [age] how long that is possible, in milliseconds
 * @property {{ messages: number, window: number }} [rate] how fast this client may send: `send` keeps to it
 * @property {number} [max_message_size] the largest frame, in bytes
 * @property {boolean} [read_only] whether this client may only listen; otherwise not there
 *
 * @typedef {object} MessageFields With the option `raw` there is only `data`.
 * @property {string | Uint8Array} data from a stranger: show it with `textContent`
 * @property {number} seq the number of the message in its hub
 * @property {Date} time when it was published
 * @property {string} [client] the id of its sender, unless it came over HTTP or from the server's operator
 * @property {string} user the user who sent it; empty if anonymous
 * @property {boolean} own whether this object sent it
 * @property {boolean} replayed whether it is older than the connection
 *
 * @typedef {object} SentFields the server published a message
 * @property {string} id what `send` returned
 * @property {number} seq
 * @property {Date} time
 * @property {string} [epoch] only if it differs from that of `open`
 *
 * @typedef {object} FailedFields a message was not published, or may not have been
 * @property {string} id what `send` returned
 * @property {Data} data
 * @property {string} code `too_big`; `unreadable`: a Blob that cannot be read; `closed`: it was never on its way;
 *   `unknown`: it was on its way and may have arrived; or a code of the server. After `unavailable` it can be sent again.
 * @property {string} message the server's text, for people
 *
 * @typedef {object} MissedFields messages are lost
 * @property {number} count 0 if only frames about who is here are lost: ask `who`
 * @property {boolean} restarted whether the hub has begun anew, so that more may be lost
 *
 * @typedef {object} PresenceFields who came and left, with `presence join_leave`
 * @property {number} clients how many clients are in the hub now
 * @property {string[]} [joined]
 * @property {string[]} [left]
 *
 * @typedef {object} RefusedFields why handshakes fail
 * @property {number} status the HTTP status. 401 may also be a redirect, as to a login, and 404 a page that is no hub.
 * @property {string} reason the server's line of text, or empty
 * @property {boolean} final whether the state is `closed` now, because another attempt would not help
 * @property {number} [retryIn] milliseconds until the next attempt, unless `final`
 *
 * @typedef {object} CloseFields a connection has ended, or an attempt
 * @property {number} code
 * @property {string} reason
 *
 * @typedef {object} StateFields
 * @property {State} state
 * @property {number} [retryIn] milliseconds until the next attempt; only if `waiting`
 * @property {number} [code] of the last connection; only if `waiting` or `closed`. It is 1006 without `status` if
 *   `WebSocket` refused the `url`; `reason` then says why.
 * @property {string} [reason]
 * @property {number} [status] the HTTP status if the server refuses handshakes: see the event `refused`
 * @property {true} [offline] whether the browser says that there is no network, also while the state is `open`, and nothing has
 *   come from the server since
 *
 * @typedef {object} Events the events by their type
 * @property {Event & MessageFields} message
 * @property {Event & SentFields} sent
 * @property {Event & FailedFields} failed
 * @property {Event & MissedFields} missed
 * @property {Event & { user: string, clients: number }} join the first connection of a user
 * @property {Event & { user: string, clients: number }} leave the last connection of a user
 * @property {Event & PresenceFields} presence
 * @property {Event & { code: string, message: string }} error about a frame that was no message
 * @property {Event & RefusedFields} refused
 * @property {Event & Hello} open
 * @property {Event & CloseFields} close
 * @property {Event & StateFields} state
 *
 * @typedef {<K extends keyof Events>(type: K, listener: (event: Events[K]) => void,
 *   options?: boolean | AddEventListenerOptions) => void} Listen
 * @typedef {Omit<EventTarget, 'addEventListener' | 'removeEventListener'> & {
 *   addEventListener: Listen & EventTarget['addEventListener'],
 *   removeEventListener: Listen & EventTarget['removeEventListener'],
 * }} Target an EventTarget that knows its events
 */

export {};
