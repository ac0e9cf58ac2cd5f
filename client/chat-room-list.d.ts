export type Item = {
    order: number;
};
/**
 * What a list shows. It stands where its `order` says; items of one order stand as they came.
 * @typedef {{ order: number }} Item
 */
/**
 * A list that ends at the newest item. The document has only the items around the reader, so that a long conversation costs
 * no more than a short one. Changes are collected and shown together in the next frame, with one layout.
 *
 * A reader at the end follows new items. For any other, nothing moves.
 * @template {Item} T
 */
export declare class ItemList<T extends Item> {
    #private;
    /**
     * @param {HTMLElement} scroller what scrolls
     * @param {HTMLElement} list its only content, which gets the elements
     * @param {object} how
     * @param {(item: T, mark: string) => HTMLElement} how.draw makes an element
     * @param {(item: T, previous: T | undefined) => string} how.mark what an element shows of its neighbor; another value
     *   has it drawn again
     * @param {(item: T) => void} how.forget is called for items that the list has dropped
     */
    constructor(scroller: HTMLElement, list: HTMLElement, { draw, mark, forget }: {
        draw: (item: T, mark: string) => HTMLElement;
        mark: (item: T, previous: T | undefined) => string;
        forget: (item: T) => void;
    });
    get size(): number;
    /** The newest item. */
    get last(): T | undefined;
    /** Whether the reader sees the newest item. */
    get atEnd(): boolean;
    /** Whether the newest item is more than two screens away. */
    get farAway(): boolean;
    [Symbol.iterator](): ArrayIterator<T>;
    /**
     * Adds an item.
     * @param {T} item
     */
    add(item: T): void;
    /** @param {T} item */
    remove(item: T): void;
    /**
     * Puts an item where its order says now, and draws it again.
     * @param {T} item
     */
    update(item: T): void;
    /** Has all items drawn again. */
    redraw(): void;
    clear(): void;
    /** Shows nothing new until `release`, for the items of a history come one by one. */
    hold(): void;
    release(): void;
    /** Shows what has changed, in the next frame. A page in the background has no frames. */
    changed(): void;
    /** Shows what has changed. */
    show(): void;
    /** Goes to the newest item. */
    toEnd(): void;
    /** Goes to the oldest item. */
    toStart(): void;
}
