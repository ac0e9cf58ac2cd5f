/** The interface of `<chat-room>` in English, and where the other languages are. */
import type { Languages, Words } from './chat-room-types.js';
/** @type {Languages} */
export declare const languages: Languages;
/** Adds the English of a module that not every page loads. */
export declare function learn(/** @type {Words} */ words: Words): void;
/** Makes up a name. */
export declare function guest(/** @type {string} */ tag: string): string;
/** Returns who speaks a language, or English. `own` has phrases instead of others. */
export declare function speakerOf(/** @type {string} */ tag: string, /** @type {Words} */ own: Words): Promise<Speaker>;
/** Speaks one language. What it has no phrase for, it says in English. */
export declare class Speaker {
    #private;
    language: string;
    constructor(/** @type {string} */ language: string, /** @type {Words} */ words?: Words);
    /** Says the first phrase that there is. */
    first(/** @type {string[]} */ ...keys: string[]): string;
    say(/** @type {string} */ key: string, /** @type {Record<string, string | number>} */ values?: Record<string, string | number>): string;
    /** Formats a time, with the day if it is not today. */
    clock(/** @type {Date} */ time: Date): string;
    exactly(/** @type {Date} */ time: Date): string;
}
