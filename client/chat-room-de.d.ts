/** The interface of `<chat-room>` in German. */
/** @type {import('./chat-room-types.js').Words} */
declare const _default: import("./chat-room-types.js").Words;
export default _default;
