/** What the modules of `<chat-room>` share. */
/** @import { Make, StorageName, Speaker } from './chat-room-types.js' */
import type { StorageName, Speaker } from './chat-room-types.js';
/** The longest name that is shown, in characters. */
export declare const MAX_NAME = 32;
/** The longest message that is shown or sent. More only makes pages slow. */
export declare const MAX_TEXT = 4000;
/** Makes a visitor's own name: one line with a bound, without characters that reverse the text beside it. */
export declare function clean(/** @type {string} */ s: string): string;
/**
 * Returns another person's name as one line. Characters that could make two names look the same are there by their numbers:
 * everything but letters, marks, numbers, punctuation, symbols and emoji; what is blank; spaces at the ends or in a row; marks
 * without a letter, or more than two on one.
 */
export declare function legible(/** @type {string} */ user: string): any;
/** Returns a message as it is shown: with a bound, without empty lines in a row, with at most four marks on a letter. */
export declare function tidy(/** @type {string} */ s: string): string;
/** Returns a hue for a name, the same in every window. */
export declare function hue(/** @type {string} */ author: string): number;
export declare function bytes(/** @type {string} */ text: string): number;
/**
 * Makes an element. The attributes `data-text`, `data-title` and so on name phrases: see `speak`.
 * @type {Make}
 */
export declare function make<K extends keyof HTMLElementTagNameMap>(tag: K, attributes?: {}, ...children: (string | Node)[]): HTMLElementTagNameMap[K];
/** Gives a style to the shadow root that a node is in. */
export declare function dress(/** @type {Node} */ node: Node, /** @type {string} */ css: string): void;
/** Makes an icon of lines. */
export declare function icon(/** @type {number} */ size: number, /** @type {string} */ d: string): SVGElement;
export declare function avatar(/** @type {string} */ name: string): HTMLSpanElement;
/** Puts phrases into the elements that name them. */
export declare function speak(/** @type {Element} */ root: Element, /** @type {Speaker} */ speaker: Speaker): void;
/** Sets a text, unless it is the same: a screen reader might read it out again. */
export declare function setText(/** @type {Node} */ element: Node, /** @type {string} */ text: string): void;
export declare function recall(/** @type {StorageName} */ storage: StorageName, /** @type {string} */ key: string): string;
export declare function remember(/** @type {StorageName} */ storage: StorageName, /** @type {string} */ key: string, /** @type {string} */ value: string): void;
