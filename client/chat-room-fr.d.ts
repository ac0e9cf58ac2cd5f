/** The interface of `<chat-room>` in French. */
/** @type {import('./chat-room-words.js').Words} */
declare const _default: import("./chat-room-words.js").Words;
export default _default;
