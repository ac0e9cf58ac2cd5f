/** What few pages need to say, and only when the server is there. */
import { learn } from './chat-room-words.js';

/** @import { MissedFields, Speaker, StateFields, UI } from './chat-room-types.js' */

learn({
  // Why the server has refused or ended the connection: by the status of the refusal, or by close code and reason.
  1000: 'The connection is closed.',
  1002: 'The server did not understand this browser.',
  1006: 'There is no chat at this address.',
  1007: 'The server has refused a message: it was not text.',
  1008: 'The server does not want this connection.',
  '1008 read_only': 'This room is for reading only. Connect again to read on.',
  '1008 rate_limited': 'That was too much in too short a time. Take a breath, then connect again.',
  '1008 kicked': 'You were asked to leave this room.',
  1009: 'The server has refused a message: it was too big.',
  'refused 403': 'You may not take part in this chat.',
  'refused 404': 'There is no chat at this address.',
  'refused 429': 'Too many connections at once. This page tries again by itself.',
  'refused 503': 'The chat is full or not available now. This page tries again by itself.',
  noAddress: 'This chat has no address: src is missing or wrong.',
  // Why a message was not sent.
  'failed rate_limited': 'Not sent: too much in too short a time.',
  'failed unavailable': 'Not sent: the server cannot take messages now.',
  'failed too_big': 'Not sent: this message is too long.',
  // When messages were missed.
  whileAway: 'while you were away from {from} to {to}',
  tooFast: 'more came than could be shown',
  perhapsMore: '{when}, and perhaps more: the room has started anew',
  since: 'something may be missing since {from}',
});

export default class More {
  #speaker;

  constructor(/** @type {UI} */ _ui, /** @type {() => Speaker} */ speaker) {
    this.#speaker = speaker;
  }

  /** Returns the phrases for the end of a connection, or a refusal: the first that there is says most. */
  why(/** @type {StateFields} */ { code, status }, /** @type {string} */ exact) {
    return status ? [`refused ${status}`] : code ? [exact, `${code}`, '1008'] : ['noAddress'];
  }

  /** Says when messages were missed. `away` is when the connection was lost, if it was. */
  when(/** @type {MissedFields} */ { count, restarted }, /** @type {?Date} */ away) {
    const speaker = this.#speaker(), to = speaker.clock(new Date()), from = away && speaker.clock(away);
    if (restarted && !count) return speaker.say('since', { from: from ?? to });
    const when = from ? speaker.say('whileAway', { from, to }) : speaker.say('tooFast');
    return restarted ? speaker.say('perhapsMore', { when }) : when;
  }
}
