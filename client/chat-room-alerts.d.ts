/**
 * Notifications and a sound for messages that come while the visitor looks elsewhere. A page loads this module when somebody
 * opens the panel, or has turned one of them on.
 */
import { Panel } from './chat-room-panel.js';
import type { Speaker, UI } from './chat-room-types.js';
/** The panel, and what it turns on. */
export default class Alerts extends Panel {
    #private;
    /**
     * @param {UI} ui
     * @param {() => Speaker} speaker
     */
    constructor(ui: UI, speaker: () => Speaker);
    /**
     * Draws attention to a message.
     * @param {import('./chat-room-types.js').Message} message
     * @param {string} tag has a notification replace the one before
     */
    alert({ author, text }: import('./chat-room-types.js').Message, tag: string): void;
}
