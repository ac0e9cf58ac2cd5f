/** What strangers write, made fit to be shown. Nothing here makes markup: the results are text. */

/** The longest name that is shown, in characters. */
export const MAX_NAME = 32;

/** The longest message that is shown or sent, in UTF-16 units. A client that sends more only makes pages slow. */
export const MAX_TEXT = 4000;

/** @param {string} c */
const codePoint = (c) => `U+${(c.codePointAt(0) ?? 0).toString(16).toUpperCase().padStart(4, '0')}`;

/**
 * Makes a visitor's own name: one line of at most `max` characters, without characters that reverse the text beside it.
 * @param {string} s
 */
export function clean(s, max = MAX_NAME) {
  const line = s.normalize().replace(/\p{Bidi_C}/gu, '').replace(/[\p{Cc}\p{Cs}\s]+/gu, ' ').trim();
  return [...line].slice(0, max).join('').trim();
}

/**
 * Returns another person's name as one line. Characters that are invisible or cover others could make two names look the
 * same, so the line has their numbers instead: everything but letters, marks, numbers, punctuation, symbols and emoji;
 * characters that are blank; spaces at the ends or in a row; marks without a letter, or more than two on one.
 * @param {string} user
 */
export function legible(user) {
  const known = names.get(user);
  if (known !== undefined) return known;
  // Nothing beyond this many characters can be shown, and a name may be long.
  const s = user.slice(0, 20 * MAX_NAME).normalize().replace(
    /(\p{RGI_Emoji})|[[^\p{L}\p{M}\p{N}\p{P}\p{S} ]\p{Default_Ignorable_Code_Point}\u2800]|^[ \p{M}]|(?<= )[ \p{M}]| $|(?<=\p{M}{2})\p{M}/gv,
    (c, emoji) => emoji ?? codePoint(c),
  );
  const characters = [...s];
  const name = characters.length > MAX_NAME ? `${characters.slice(0, MAX_NAME - 1).join('')}…` : s;
  if (names.size >= 500) names.clear();
  names.set(user, name);
  return name;
}

/**
 * Names as they are shown: that takes a while, and a history has the same names again and again.
 * @type {Map<string, string>}
 */
const names = new Map();

/**
 * Returns a message as it is shown: not too long, without empty lines in a row, and with at most four marks on a letter.
 * @param {string} s
 */
export function tidy(s) {
  const text = s.slice(0, 2 * MAX_TEXT).replace(/\n{3,}/g, '\n\n').replace(/(\p{M}{4})\p{M}+/gu, '$1').trim();
  return text.length > MAX_TEXT ? `${text.slice(0, MAX_TEXT)}…` : text;
}

const LINK = /(https?:\/\/[^\s<>"]+[^\s<>".,:;!?')\]]|\bwww\.[^\s<>"]+[^\s<>".,:;!?')\]]|(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[a-z]{2,24}\b)/i;

/**
 * Splits a text into strings, and links to the addresses of web pages and mailboxes in it.
 * @param {string} text
 * @returns {(string | HTMLAnchorElement)[]}
 */
export function linked(text) {
  return text.split(LINK).map((part, i) => {
    if (i % 2 === 0) return part;
    const href = /^https?:/i.test(part) ? part : /^www\./i.test(part) ? `https://${part}` : `mailto:${part}`;
    if (!URL.canParse(href)) return part;
    const link = document.createElement('a');
    Object.assign(link, { href, target: '_blank', rel: 'noopener noreferrer nofollow', textContent: part });
    return link;
  });
}

/**
 * Returns a hue for a name, the same in every window.
 * @param {string} author
 */
export function hue(author) {
  let h = 0;
  for (const c of author) h = (h * 31 + (c.codePointAt(0) ?? 0)) % 360;
  return h;
}

/**
 * Returns how many bytes a text takes on its way.
 * @param {string} text
 */
export function bytes(text) {
  return new TextEncoder().encode(text).length;
}
