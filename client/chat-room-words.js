/** The interface of `<chat-room>` in English, and where the other languages are. */

/** @import { Languages, Words } from './chat-room-types.js' */

/** @type {Words} */
const en = {
  chat: 'Chat {room}',
  messages: 'Messages',
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
  'refused 401': 'Sign in to take part in this chat.',
  refused: 'The server does not let you in.',
  write: 'Write a message',
  message: 'Message',
  send: 'Send',
  help: 'Enter sends, Shift+Enter starts a new line',
  tooLong: 'Too long by {n}. Nothing is cut off: shorten it, or send it in parts.',
  notSentClosed: 'Not sent: there is no connection. Your message stays here.',
  notSentFull: 'Not sent: too many messages wait for the connection. This one stays here.',
  sending: 'sending',
  waiting: 'waiting',
  sent: 'sent',
  failed: 'Not sent.',
  'failed unknown': 'This may not have arrived.',
  sendAgain: 'Send again',
  you: 'You',
  somebody: 'Somebody',
  announcement: 'Announcement',
  missed: { one: '{n} message missed', other: '{n} messages missed' },
  anew: 'This room has started anew',
  unread: 'New',
  jump: 'Newest messages',
  newMessages: { one: '{n} new message', other: '{n} new messages' },
  emptyTitle: 'Nobody has said anything yet',
  emptyText: 'Say hello.',
  alerts: 'Notifications',
};

/** @type {Languages} */
export const languages = {
  en,
  de: () => import('./chat-room-de.js'),
  fr: () => import('./chat-room-fr.js'),
  es: () => import('./chat-room-es.js'),
};

/** Adds the English of a module that not every page loads. */
export function learn(/** @type {Words} */ words) {
  Object.assign(en, { ...words, ...en });
}

// These cannot wait for the rest of a language.
/** @type {Record<string, string>} */
const guests = { en: 'Guest', de: 'Gast', fr: 'Invité', es: 'Invitado' };

/** Makes up a name. */
export function guest(/** @type {string} */ tag) {
  return `${guests[tag.slice(0, 2)] ?? guests.en} ${1000 + Math.floor(Math.random() * 9000)}`;
}

/** Returns who speaks a language, or English. `own` has phrases instead of others. */
export async function speakerOf(/** @type {string} */ tag, /** @type {Words} */ own) {
  const language = tag.toLowerCase().split('-')[0], words = languages[language];
  if (!words) return new Speaker('en', own);
  try {
    return new Speaker(language, { ...(typeof words === 'function' ? (await words()).default : words), ...own });
  } catch {
    return new Speaker('en', own); // the file does not come
  }
}

/**
 * Returns a function that makes a value when it is first called.
 * @template T
 * @param {() => T} make
 */
function later(make) {
  /** @type {T | undefined} */
  let value;
  return () => value ??= make();
}

/** Speaks one language. What it has no phrase for, it says in English. */
export class Speaker {
  #words;
  // These make an object of Intl when it is first needed, which takes longer than to draw a message.
  #plural;
  #number;
  #today;
  #otherDay;
  #exact;

  constructor(/** @type {string} */ language, /** @type {Words} */ words = {}) {
    this.language = language;
    this.#words = words;
    this.#plural = later(() => new Intl.PluralRules(language));
    // The browser's own locale, if it is of the language: en-GB writes times in another way than en-US.
    const locale = navigator.languages.find((tag) => tag.toLowerCase().split('-')[0] === language) ?? language;
    const clock = /** @type {const} */ ({ hour: 'numeric', minute: '2-digit' });
    this.#number = later(() => new Intl.NumberFormat(locale));
    this.#today = later(() => new Intl.DateTimeFormat(locale, clock));
    this.#otherDay = later(() => new Intl.DateTimeFormat(locale, { ...clock, weekday: 'short' }));
    this.#exact = later(() => new Intl.DateTimeFormat(locale, { dateStyle: 'medium', timeStyle: 'medium' }));
  }

  /** Says the first phrase that there is. */
  first(/** @type {string[]} */ ...keys) {
    return keys.map((key) => this.say(key)).find(Boolean) ?? '';
  }

  say(/** @type {string} */ key, /** @type {Record<string, string | number>} */ values = {}) {
    let phrase = this.#words[key] ?? en[key] ?? '';
    if (typeof phrase === 'object') phrase = this.#plural().select(Number(values.n)) === 'one' ? phrase.one : phrase.other;
    return phrase.replace(/\{(\w+)\}/g, (/** @type {string} */ _, /** @type {string} */ name) => {
      const value = values[name];
      return typeof value === 'number' ? this.#number().format(value) : value;
    });
  }

  /** Formats a time, with the day if it is not today. */
  clock(/** @type {Date} */ time) {
    return (time.toDateString() === new Date().toDateString() ? this.#today : this.#otherDay)().format(time);
  }

  exactly(/** @type {Date} */ time) {
    return this.#exact().format(time);
  }
}
