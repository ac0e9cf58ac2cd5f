import type { MissedFields, Speaker, StateFields, UI } from './chat-room-types.js';
export default class More {
    #private;
    constructor(/** @type {UI} */ _ui: UI, /** @type {() => Speaker} */ speaker: () => Speaker);
    /** Returns the phrases for the end of a connection, or a refusal: the first that there is says most. */
    why(/** @type {StateFields} */ { code, status }: StateFields, /** @type {string} */ exact: string): string[];
    /** Says when messages were missed. `away` is when the connection was lost, if it was. */
    when(/** @type {MissedFields} */ { count, restarted }: MissedFields, /** @type {?Date} */ away: Date | null): string;
}
