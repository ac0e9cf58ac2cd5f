/**
 * A list of items, sorted by their `order`. The document has only those around the reader. Changes show together, in the next
 * frame. A reader at the end follows new items; for any other, nothing moves.
 */
export declare class ItemList {
    #private;
    /**
     * `list` is all that scrolls. `draw(item, mark)` makes an element, and again when `mark(item, previous)` has changed. The list
     * calls `forget(item)` for an item that it has dropped.
     */
    constructor(scroller: any, list: any, { draw, mark, forget }: {
        draw: any;
        forget: any;
        mark: any;
    });
    get size(): number;
    get last(): any;
    get atEnd(): boolean;
    /** Whether the newest item is more than two screens away. */
    get farAway(): boolean;
    [Symbol.iterator](): ArrayIterator<any>;
    add(item: any): void;
    remove(item: any): void;
    /** Puts an item where its order says now, and draws it again. */
    update(item: any): void;
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
