/**
 * The interface of `<chat-room>`: English, and where the other languages are.
 *
 * A value is a text, or one text for each plural form (`one`, `other`) of the number `{n}`. Words in braces are filled in.
 *
 * @typedef {string | { one: string, other: string }} Phrase
 * @typedef {Record<string, Phrase>} Words
 */
export type Phrase = string | {
    one: string;
    other: string;
};
export type Words = Record<string, Phrase>;
/**
 * The phrases of each language, or what loads them.
 * @type {Record<string, Words | (() => Promise<{ default: Words }>)>}
 */
export declare const languages: Record<string, Words | (() => Promise<{
    default: Words;
}>)>;
/**
 * Makes up a name.
 * @param {string} tag
 */
export declare function guest(tag: string): string;
/**
 * Returns who speaks a language, or English if nobody does.
 * @param {string} tag such as `de` or `de-AT`
 * @param {Words} own phrases that stand instead of others
 */
export declare function speakerOf(tag: string, own: Words): Promise<Speaker>;
/** Speaks one language. */
export declare class Speaker {
    #private;
    language: string;
    /**
     * @param {string} language
     * @param {Words} [words] stand instead of those in English
     */
    constructor(language: string, words?: Words);
    /**
     * Whether it has a phrase.
     * @param {string} key
     */
    knows(key: string): boolean;
    /**
     * Returns a phrase, filled in.
     * @param {string} key
     * @param {Record<string, string | number>} [values]
     */
    say(key: string, values?: Record<string, string | number>): string;
    /**
     * Joins names into a phrase: all of up to three, or two and a number.
     * @param {string[]} names
     */
    list(names: string[]): string;
    /**
     * Formats a time, with the day if it is not today.
     * @param {Date} time
     */
    clock(time: Date): string;
    /**
     * Formats a time with its day and second.
     * @param {Date} time
     */
    exactly(time: Date): string;
}
