/** What the modules of `<chat-room>` share. */
/** @import { Make, StorageName, Speaker } from './chat-room-types.js' */

// ---- what strangers write, made fit to be shown: as text, never as markup ----

/** The longest name that is shown, in characters. */
export const MAX_NAME = 32;

/** The longest message that is shown or sent. More only makes pages slow. */
export const MAX_TEXT = 4000;

const codePoint = (/** @type {string} */ c) => `U+${(c.codePointAt(0) ?? 0).toString(16).toUpperCase().padStart(4, '0')}`;

/** Makes a visitor's own name: one line with a bound, without characters that reverse the text beside it. */
export function clean(/** @type {string} */ s) {
  const line = s.normalize().replace(/\p{Bidi_C}/gu, '').replace(/[\p{Cc}\p{Cs}\s]+/gu, ' ').trim();
  return [...line].slice(0, MAX_NAME).join('').trim();
}

/**
 * Returns another person's name as one line. Characters that could make two names look the same are there by their numbers:
 * everything but letters, marks, numbers, punctuation, symbols and emoji; what is blank; spaces at the ends or in a row; marks
 * without a letter, or more than two on one.
 */
export function legible(/** @type {string} */ user) {
  // Most names are plain. For these no browser needs to compile the expression below, which takes 30 ms.
  if (user.length <= MAX_NAME && /^\w+( \w+)*$/.test(user)) return user;
  const known = names.get(user);
  if (known !== undefined) return known;
  // Nothing beyond this many characters can be shown, and a name may be long.
  const s = user.slice(0, 20 * MAX_NAME).normalize().replace(
    /(\p{RGI_Emoji})|[[^\p{L}\p{M}\p{N}\p{P}\p{S} ]\p{Default_Ignorable_Code_Point}\u2800]|^[ \p{M}]|(?<= )[ \p{M}]| $|(?<=\p{M}{2})\p{M}/gv,
    (/** @type {string} */ c, /** @type {string} */ emoji) => emoji ?? codePoint(c),
  );
  const characters = [...s];
  const name = characters.length > MAX_NAME ? `${characters.slice(0, MAX_NAME - 1).join('')}…` : s;
  if (names.size >= 500) names.clear();
  names.set(user, name);
  return name;
}

// A history has the same names again and again.
const names = new Map();

/** Returns a message as it is shown: with a bound, without empty lines in a row, with at most four marks on a letter. */
export function tidy(/** @type {string} */ s) {
  const text = s.slice(0, 2 * MAX_TEXT).replace(/\n{3,}/g, '\n\n').replace(/(\p{M}{4})\p{M}+/gu, '$1').trim();
  return text.length > MAX_TEXT ? `${text.slice(0, MAX_TEXT)}…` : text;
}

/** Returns a hue for a name, the same in every window. */
export function hue(/** @type {string} */ author) {
  let h = 0;
  for (const c of author) h = (h * 31 + (c.codePointAt(0) ?? 0)) % 360;
  return h;
}

export function bytes(/** @type {string} */ text) {
  return new TextEncoder().encode(text).length;
}

// ---- elements ----

/**
 * Makes an element. The attributes `data-text`, `data-title` and so on name phrases: see `speak`.
 * @type {Make}
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Gives a style to the shadow root that a node is in. */
export function dress(/** @type {Node} */ node, /** @type {string} */ css) {
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(css);
  /** @type {ShadowRoot} */ (node.getRootNode()).adoptedStyleSheets.push(sheet);
}

/** Makes an icon of lines. */
export function icon(/** @type {number} */ size, /** @type {string} */ d) {
  const [svg, path] = ['svg', 'path'].map((tag) => document.createElementNS('http://www.w3.org/2000/svg', tag));
  svg.setAttribute('viewBox', `0 0 ${size} ${size}`);
  svg.setAttribute('aria-hidden', 'true');
  path.setAttribute('d', d);
  svg.append(path);
  return svg;
}

export function avatar(/** @type {string} */ name) {
  return make('span', { class: 'avatar', 'aria-hidden': 'true' }, [...name][0].toUpperCase());
}

/** Puts phrases into the elements that name them. */
export function speak(/** @type {Element} */ root, /** @type {Speaker} */ speaker) {
  for (const where of ['text', 'title', 'placeholder', 'aria-label']) {
    for (const element of root.querySelectorAll(`[data-${where}]`)) {
      const phrase = speaker.say(element.getAttribute(`data-${where}`) ?? '');
      if (where === 'text') element.textContent = phrase;
      else element.setAttribute(where, phrase);
    }
  }
}

/** Sets a text, unless it is the same: a screen reader might read it out again. */
export function setText(/** @type {Node} */ element, /** @type {string} */ text) {
  if (element.textContent !== text) element.textContent = text;
}

// ---- settings ----

// A browser may not allow storages, which are only a convenience.
export function recall(/** @type {StorageName} */ storage, /** @type {string} */ key) {
  try { return globalThis[storage].getItem(`chat-room.${key}`) ?? ''; } catch { return ''; }
}

export function remember(/** @type {StorageName} */ storage, /** @type {string} */ key, /** @type {string} */ value) {
  try { globalThis[storage].setItem(`chat-room.${key}`, value); } catch { /* see above */ }
}
