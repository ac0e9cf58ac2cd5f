/** The look of `<chat-room transparent>`, for overlays on a video: nothing but messages, legible on everything. */
import { dress } from './chat-room-tools.js';

const css = `
.transparent :is(#bell, #who, .state, #jump, #empty, .panel, .when, .notice:not(.missed), .unread, #footer) { display: none !important; }
.transparent #header { position: absolute; clip-path: inset(50%); block-size: 1px; overflow: hidden; } /* a page has a heading */
.transparent #main { grid-row: 2; } /* so that few messages stand at the bottom, too */
.transparent #log { overflow: hidden; }
.transparent .bubble, .transparent .mine .bubble { background: rgb(12 18 16 / 72%); color: #fff; text-shadow: 0 1px 2px #000; }
.transparent .from { color: oklch(0.85 0.1 var(--hue)); }
.transparent .official .from, .transparent a { color: #8fe6cd; }
`;

/** Gives it to an element. */
export default class Overlay {
  constructor(/** @type {import('./chat-room-types.js').UI} */ { room }) {
    dress(room, css);
  }
}
