/** What the modules of `<chat-room>` share. */
/** The longest name that is shown, in characters. */
export declare const MAX_NAME = 32;
/** The longest message that is shown or sent. More only makes pages slow. */
export declare const MAX_TEXT = 4000;
/** Makes a visitor's own name: one line with a bound, without characters that reverse the text beside it. */
export declare function clean(s: any): string;
/**
 * Returns another person's name as one line. Characters that could make two names look the same are there by their numbers:
 * everything but letters, marks, numbers, punctuation, symbols and emoji; what is blank; spaces at the ends or in a row; marks
 * without a letter, or more than two on one.
 */
export declare function legible(user: any): any;
/** Returns a message as it is shown: with a bound, without empty lines in a row, with at most four marks on a letter. */
export declare function tidy(s: any): any;
/** Returns a hue for a name, the same in every window. */
export declare function hue(author: any): number;
export declare function bytes(text: any): number;
/** Makes an element. The attributes `data-text`, `data-title` and so on name phrases: see `speak`. */
export declare function make(tag: any, attributes?: {}, ...children: any[]): any;
/** Gives a style to the shadow root that a node is in. */
export declare function dress(node: any, css: any): void;
/** Makes an icon of lines. */
export declare function icon(size: any, d: any): SVGElement;
export declare function avatar(name: any): any;
/** Puts phrases into the elements that name them. */
export declare function speak(root: any, speaker: any): void;
/** Sets a text, unless it is the same: a screen reader might read it out again. */
export declare function setText(element: any, text: any): void;
export declare function recall(storage: any, key: any): any;
export declare function remember(storage: any, key: any, value: any): void;
