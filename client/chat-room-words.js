/**
 * The interface of `<chat-room>`: English, and where the other languages are.
 *
 * A value is a text, or one text for each plural form (`one`, `other`) of the number `{n}`. Words in braces are filled in.
 *
 * @typedef {string | { one: string, other: string }} Phrase
 * @typedef {Record<string, Phrase>} Words
 */

/** @type {Words} */
const en = {
  chat: 'Chat {room}',
  messages: 'Messages',
  // The state of the connection.
  connecting: 'Connecting',
  connected: 'Connected',
  reconnecting: 'Reconnecting',
  offline: 'Offline',
  disconnected: 'Disconnected',
  inSeconds: ' in {n} s',
  lost: 'The connection is lost. What you write is sent when it is back.',
  notYet: 'There is no connection yet. What you write is sent when there is one.',
  noNetwork: 'This device is offline. What you write is sent when it is back.',
  notYetReading: 'There is no connection.',
  tryNow: 'Try now',
  connectAgain: 'Connect again',
  signIn: 'Sign in',
  // Why there is no connection: by close code and reason, or by the status of the refusal.
  1000: 'The connection is closed.',
  1002: 'The server did not understand this browser.',
  1006: 'There is no chat at this address.',
  1007: 'The server has refused a message: it was not text.',
  1008: 'The server does not want this connection.',
  '1008 read_only': 'This room is for reading only. Connect again to read on.',
  '1008 rate_limited': 'That was too much in too short a time. Take a breath, then connect again.',
  '1008 kicked': 'You were asked to leave this room.',
  1009: 'The server has refused a message: it was too big.',
  'refused 401': 'Sign in to take part in this chat.',
  'refused 403': 'You may not take part in this chat.',
  'refused 404': 'There is no chat at this address.',
  'refused 429': 'Too many connections at once. This page tries again by itself.',
  'refused 503': 'The chat is full or not available now. This page tries again by itself.',
  refused: 'The server does not let you in.',
  noAddress: 'This chat has no address: src is missing or wrong.',
  // Writing.
  write: 'Write a message',
  message: 'Message',
  send: 'Send',
  help: 'Enter sends, Shift+Enter starts a new line',
  youAre: 'You are',
  count: '{n} of {max}',
  tooLong: 'Too long by {n}. Nothing is cut off: shorten it, or send it in parts.',
  notSentClosed: 'Not sent: there is no connection. Your message stays here.',
  notSentFull: 'Not sent: too many messages wait for the connection. This one stays here.',
  sending: 'sending',
  waiting: 'waiting',
  sent: 'sent',
  failed: 'Not sent.',
  'failed rate_limited': 'Not sent: too much in too short a time.',
  'failed unavailable': 'Not sent: the server cannot take messages now.',
  'failed unknown': 'This may not have arrived.',
  'failed too_big': 'Not sent: this message is too long.',
  sendAgain: 'Send again',
  // Reading.
  you: 'You',
  somebody: 'Somebody',
  announcement: 'Announcement',
  missed: { one: '{n} message missed', other: '{n} messages missed' },
  anew: 'This room has started anew',
  whileAway: 'while you were away from {from} to {to}',
  tooFast: 'more came than could be shown',
  perhapsMore: '{when}, and perhaps more: the room has started anew',
  since: 'something may be missing since {from}',
  joined: '{who} joined',
  left: '{who} left',
  others: { one: '{n} other', other: '{n} others' },
  unread: 'New',
  jump: 'Newest messages',
  newMessages: { one: '{n} new message', other: '{n} new messages' },
  emptyTitle: 'Nobody has said anything yet',
  emptyText: 'Say hello.',
  // Who is here.
  people: 'Who is here',
  hereNow: 'Here now · {n}',
  anonymous: 'Anonymous',
  me: 'you',
  windows: { one: '{n} window', other: '{n} windows' },
  more: 'and more',
  // Notifications.
  alerts: 'Notifications',
  notify: 'Show notifications',
  sound: 'Play a sound',
  alertsHint: 'For messages that come while you look elsewhere.',
  denied: 'This browser does not allow notifications here.',
};

/**
 * The phrases of each language, or what loads them.
 * @type {Record<string, Words | (() => Promise<{ default: Words }>)>}
 */
export const languages = {
  en,
  de: () => import('./chat-room-de.js'),
  fr: () => import('./chat-room-fr.js'),
  es: () => import('./chat-room-es.js'),
};

/** What a visitor without a name is called, for that cannot wait for the rest of a language. */
const guests = /** @type {Record<string, string>} */ ({ en: 'Guest', de: 'Gast', fr: 'Invité', es: 'Invitado' });

/**
 * Makes up a name.
 * @param {string} tag
 */
export function guest(tag) {
  return `${guests[tag.slice(0, 2)] ?? guests.en} ${1000 + Math.floor(Math.random() * 9000)}`;
}

/**
 * Returns who speaks a language, or English if nobody does.
 * @param {string} tag such as `de` or `de-AT`
 * @param {Words} own phrases that stand instead of others
 */
export async function speakerOf(tag, own) {
  const language = tag.toLowerCase().split('-')[0], words = languages[language];
  if (!words) return new Speaker('en', own);
  try {
    return new Speaker(language, { ...(typeof words === 'function' ? (await words()).default : words), ...own });
  } catch {
    return new Speaker('en', own); // the file does not come
  }
}

/** Speaks one language. */
export class Speaker {
  #words;
  #plural;
  #list;
  #number;
  // To make one takes longer than to draw a message.
  #today;
  #otherDay;
  #exact;

  /**
   * @param {string} language
   * @param {Words} [words] stand instead of those in English
   */
  constructor(language, words) {
    this.language = language;
    this.#words = { ...en, ...words };
    this.#plural = new Intl.PluralRules(language);
    this.#list = new Intl.ListFormat(language);
    // The browser's own locale, if it is of the language: en-GB writes times in another way than en-US.
    const locale = navigator.languages.find((tag) => tag.toLowerCase().split('-')[0] === language) ?? language;
    /** @type {Intl.DateTimeFormatOptions} */
    const clock = { hour: 'numeric', minute: '2-digit' };
    this.#number = new Intl.NumberFormat(locale);
    this.#today = new Intl.DateTimeFormat(locale, clock);
    this.#otherDay = new Intl.DateTimeFormat(locale, { ...clock, weekday: 'short' });
    this.#exact = new Intl.DateTimeFormat(locale, { dateStyle: 'medium', timeStyle: 'medium' });
  }

  /**
   * Whether it has a phrase.
   * @param {string} key
   */
  knows(key) {
    return key in this.#words;
  }

  /**
   * Returns a phrase, filled in.
   * @param {string} key
   * @param {Record<string, string | number>} [values]
   */
  say(key, values = {}) {
    let phrase = this.#words[key];
    if (typeof phrase === 'object') phrase = this.#plural.select(Number(values.n)) === 'one' ? phrase.one : phrase.other;
    return phrase.replace(/\{(\w+)\}/g, (_, name) => {
      const value = values[name];
      return typeof value === 'number' ? this.#number.format(value) : value;
    });
  }

  /**
   * Joins names into a phrase: all of up to three, or two and a number.
   * @param {string[]} names
   */
  list(names) {
    return this.#list.format(names.length > 3 ? [...names.slice(0, 2), this.say('others', { n: names.length - 2 })] : names);
  }

  /**
   * Formats a time, with the day if it is not today.
   * @param {Date} time
   */
  clock(time) {
    return (time.toDateString() === new Date().toDateString() ? this.#today : this.#otherDay).format(time);
  }

  /**
   * Formats a time with its day and second.
   * @param {Date} time
   */
  exactly(time) {
    return this.#exact.format(time);
  }
}
