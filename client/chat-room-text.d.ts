/** What strangers write, made fit to be shown. Nothing here makes markup: the results are text. */
/** The longest name that is shown, in characters. */
export declare const MAX_NAME = 32;
/** The longest message that is shown or sent, in UTF-16 units. A client that sends more only makes pages slow. */
export declare const MAX_TEXT = 4000;
/**
 * Makes a visitor's own name: one line of at most `max` characters, without characters that reverse the text beside it.
 * @param {string} s
 */
export declare function clean(s: string, max?: number): string;
/**
 * Returns another person's name as one line. Characters that are invisible or cover others could make two names look the
 * same, so the line has their numbers instead: everything but letters, marks, numbers, punctuation, symbols and emoji;
 * characters that are blank; spaces at the ends or in a row; marks without a letter, or more than two on one.
 * @param {string} user
 */
export declare function legible(user: string): string;
/**
 * Returns a message as it is shown: not too long, without empty lines in a row, and with at most four marks on a letter.
 * @param {string} s
 */
export declare function tidy(s: string): string;
/**
 * Splits a text into strings, and links to the addresses of web pages and mailboxes in it.
 * @param {string} text
 * @returns {(string | HTMLAnchorElement)[]}
 */
export declare function linked(text: string): (string | HTMLAnchorElement)[];
/**
 * Returns a hue for a name, the same in every window.
 * @param {string} author
 */
export declare function hue(author: string): number;
/**
 * Returns how many bytes a text takes on its way.
 * @param {string} text
 */
export declare function bytes(text: string): number;
