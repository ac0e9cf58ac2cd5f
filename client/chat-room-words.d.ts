/** The interface of `<chat-room>` in English, and where the other languages are. */
/** @type {import('./chat-room-types.js').Languages} */
export declare const languages: import('./chat-room-types.js').Languages;
/** Adds the English of a module that not every page loads. */
export declare function learn(words: any): void;
/** Makes up a name. */
export declare function guest(tag: any): string;
/** Returns who speaks a language, or English. `own` has phrases instead of others. */
export declare function speakerOf(tag: any, own: any): Promise<Speaker>;
/** Speaks one language. What it has no phrase for, it says in English. */
export declare class Speaker {
    #private;
    language: any;
    constructor(language: any, words?: {});
    /** Says the first phrase that there is. */
    first(...keys: any[]): any;
    say(key: any, values?: {}): any;
    /** Formats a time, with the day if it is not today. */
    clock(time: any): any;
    exactly(time: any): any;
}
