/** @import { How } from './chat-room-types.js' */

/** How many items the document has, and a page more before any leave it. */
const WINDOW = 200;

/** How many items come into the document at once: one frame has time for them. */
const PAGE = 20;

/** How many items the list remembers, and more under the eyes of a reader. */
const KEPT = 2000;

/** Within this many pixels of the end the reader is there, and stays there. */
const NEAR = 40;

/**
 * A list of items, sorted by their `order`. The document has only those around the reader. Changes show together, in the next
 * frame. A reader at the end follows new items; for any other, nothing moves.
 * @template {{ order: number }} T
 */
export class ItemList {
  /** @type {T[]} */
  #items = [];
  // The document has the items in between, without the last one.
  #from = 0;
  #to = 0;
  #atEnd = true;
  #top = 0;
  // The element and the mark of each item in the document.
  /** @type {Map<T, { element: HTMLElement, mark: string }>} */
  #drawn = new Map();
  #frame = 0;
  #timer = 0;
  #held = false;
  #scroller;
  #list;
  #how;

  /** `list` is all that is in `scroller`. */
  constructor(/** @type {HTMLElement} */ scroller, /** @type {HTMLElement} */ list, /** @type {How<T>} */ how) {
    this.#scroller = scroller;
    this.#list = list;
    this.#how = how;
    scroller.addEventListener('scroll', () => this.#scrolled(), { passive: true });
    const resized = new ResizeObserver(() => this.#atEnd && this.#stay());
    resized.observe(scroller);
    resized.observe(list); // fonts that come late
  }

  get size() {
    return this.#items.length;
  }

  get last() {
    return this.#items.at(-1);
  }

  get atEnd() {
    return this.#atEnd;
  }

  /** Whether the newest item is more than two screens away. */
  get farAway() {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroller;
    return !this.#atEnd && (this.#to < this.#items.length || scrollHeight - scrollTop > 3 * clientHeight);
  }

  [Symbol.iterator]() {
    return this.#items[Symbol.iterator]();
  }

  add(/** @type {T} */ item) {
    let i = this.#items.length;
    while (i > 0 && this.#items[i - 1].order > item.order) i--;
    this.#items.splice(i, 0, item);
    if (i < this.#from) this.#from++;
    // A reader who is not at the end gets what has room, and the rest when they come to it.
    if (i < this.#from || i < this.#to || (i === this.#to && this.#to - this.#from < WINDOW)) this.#to++;
    this.changed();
  }

  remove(/** @type {T} */ item) {
    const i = this.#items.lastIndexOf(item);
    if (i < 0) return;
    this.#items.splice(i, 1);
    if (i < this.#from) this.#from--;
    if (i < this.#to) this.#to--;
    this.changed();
  }

  /** Puts an item where its order says now, and draws it again. */
  update(/** @type {T} */ item) {
    const i = this.#items.lastIndexOf(item);
    if (i < 0) return;
    const { [i - 1]: before, [i + 1]: after } = this.#items;
    if ((before && before.order > item.order) || (after && after.order < item.order)) {
      this.remove(item);
      this.add(item);
    }
    const drawn = this.#drawn.get(item);
    if (drawn) drawn.mark = '?'; // no item has this mark
    this.changed();
  }

  redraw() {
    for (const drawn of this.#drawn.values()) drawn.mark = '?';
    this.changed();
  }

  clear() {
    this.#items = [];
    this.#from = this.#to = 0;
    this.#atEnd = true;
    this.#held = false;
    this.show();
  }

  /** Shows nothing new until `release`, for the items of a history come one by one. */
  hold() {
    this.#held = true;
  }

  release() {
    if (!this.#held) return;
    this.#held = false;
    this.changed();
  }

  /** Shows what has changed, in the next frame. A page in the background has no frames. */
  changed() {
    if (this.#frame || this.#timer || this.#held) return;
    if (document.hidden) this.#timer = setTimeout(() => this.show(), 100);
    else this.#frame = requestAnimationFrame(() => this.show());
  }

  /** Shows what has changed. */
  show() {
    cancelAnimationFrame(this.#frame);
    clearTimeout(this.#timer);
    this.#frame = this.#timer = 0;
    this.#trim();
    const anchor = this.#atEnd ? null : this.#anchor();
    this.#reconcile();
    if (this.#atEnd) this.#stay();
    else if (anchor) this.#restore(anchor);
  }

  toEnd() {
    this.#atEnd = true;
    this.show();
  }

  toStart() {
    this.#atEnd = false;
    this.#from = 0;
    this.#to = Math.min(this.#items.length, WINDOW);
    this.#reconcile();
    this.#scroller.scrollTop = 0;
  }

  /** Forgets the oldest items, and chooses those for the document. */
  #trim() {
    let many = this.#items.length - KEPT;
    if (many < PAGE) many = 0; // not one by one
    // Not what is being read, unless the reader stays away for long.
    if (!this.#atEnd && many < 4 * KEPT) many = Math.min(many, this.#from);
    if (many > 0) {
      for (const item of this.#items.splice(0, many)) this.#how.forget(item);
      this.#from = Math.max(0, this.#from - many);
      this.#to = Math.max(this.#from, this.#to - many);
    }
    if (!this.#atEnd) {
      this.#to = Math.max(this.#to, Math.min(this.#items.length, this.#from + PAGE));
      return;
    }
    this.#to = this.#items.length;
    // Items leave the document by pages. A history begins with few: the rest is out of sight.
    if (this.#to - this.#from > WINDOW + PAGE) this.#from = this.#to - (this.#drawn.size ? WINDOW : 2 * PAGE);
  }

  /** Makes the elements in the document those of the items from `from` to `to`. */
  #reconcile() {
    const shown = new Set(this.#items.slice(this.#from, this.#to));
    for (const [item, { element }] of this.#drawn) {
      if (shown.has(item)) continue;
      element.remove();
      this.#drawn.delete(item);
    }
    let previous = this.#items[this.#from - 1];
    let next = this.#list.firstElementChild;
    for (const item of shown) {
      const mark = this.#how.mark(item, previous);
      previous = item;
      let drawn = this.#drawn.get(item);
      if (drawn?.mark !== mark) {
        const element = this.#how.draw(item, mark);
        if (drawn?.element === next) next = next?.nextElementSibling ?? null;
        drawn?.element.remove();
        drawn = { element, mark };
        this.#drawn.set(item, drawn);
      }
      if (drawn.element === next) next = next.nextElementSibling;
      else this.#list.insertBefore(drawn.element, next);
    }
  }

  #stay() {
    this.#scroller.scrollTop = this.#scroller.scrollHeight;
    this.#top = this.#scroller.scrollTop;
  }

  /** Notes where the first item in sight is. */
  #anchor() {
    const { top } = this.#scroller.getBoundingClientRect();
    for (let i = this.#from; i < this.#to; i++) {
      const item = this.#items[i], box = this.#drawn.get(item)?.element.getBoundingClientRect();
      if (box && box.bottom > top) return { item, top: box.top };
    }
    return null;
  }

  /** Scrolls so that the item is where it was. */
  #restore(/** @type {{ item: T, top: number }} */ { item, top }) {
    const now = this.#drawn.get(item)?.element.getBoundingClientRect().top;
    if (now !== undefined && now !== top) this.#scroller.scrollTop += now - top;
    this.#top = this.#scroller.scrollTop;
  }

  #scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroller;
    const below = scrollHeight - scrollTop - clientHeight;
    // Neither new items nor a smaller window move a reader away from the end: only scrolling up does.
    if (below < NEAR) this.#atEnd ||= this.#to === this.#items.length;
    else if (scrollTop < this.#top) this.#atEnd = false;
    this.#top = scrollTop;
    const [from, to] = [this.#from, this.#to];
    if (scrollTop < clientHeight && from > 0) {
      this.#from = Math.max(0, from - PAGE);
      this.#to = Math.min(to, this.#from + WINDOW + PAGE);
    } else if (below < clientHeight && to < this.#items.length) {
      this.#to = Math.min(this.#items.length, to + PAGE);
      this.#from = Math.max(from, this.#to - WINDOW - PAGE);
    }
    if (this.#from !== from || this.#to !== to) {
      const anchor = this.#anchor();
      this.#reconcile();
      if (anchor) this.#restore(anchor);
    }
  }
}
