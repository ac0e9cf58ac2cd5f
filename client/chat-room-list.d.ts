/** @import { How } from './chat-room-types.js' */
import type { How } from './chat-room-types.js';
/**
 * A list of items, sorted by their `order`. The document has only those around the reader. Changes show together, in the next
 * frame. A reader at the end follows new items; for any other, nothing moves.
 * @template {{ order: number }} T
 */
export declare class ItemList<T extends {
    order: number;
}> {
    #private;
    /** `list` is all that is in `scroller`. */
    constructor(/** @type {HTMLElement} */ scroller: HTMLElement, /** @type {HTMLElement} */ list: HTMLElement, /** @type {How<T>} */ how: How<T>);
    get size(): number;
    get last(): T | undefined;
    get atEnd(): boolean;
    /** Whether the newest item is more than two screens away. */
    get farAway(): boolean;
    [Symbol.iterator](): ArrayIterator<T>;
    add(/** @type {T} */ item: T): void;
    remove(/** @type {T} */ item: T): void;
    /** Puts an item where its order says now, and draws it again. */
    update(/** @type {T} */ item: T): void;
    redraw(): void;
    clear(): void;
    /** Shows nothing new until `release`, for the items of a history come one by one. */
    hold(): void;
    release(): void;
    /** Shows what has changed, in the next frame. A page in the background has no frames. */
    changed(): void;
    /** Shows what has changed. */
    show(): void;
    toEnd(): void;
    toStart(): void;
}
