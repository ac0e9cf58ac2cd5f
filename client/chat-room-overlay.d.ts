/** Gives it to an element. */
export default class Overlay {
    constructor(/** @type {import('./chat-room-types.js').UI} */ { room }: import('./chat-room-types.js').UI);
}
