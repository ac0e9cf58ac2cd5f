/** A panel below the header that a button opens: a list of people, or settings. */
import { dress, make, speak } from './chat-room-tools.js';

const css = `
.panel { padding: 1rem; overflow-y: auto; overscroll-behavior: contain; scrollbar-width: thin; }
.panel .heading { margin-block-end: 0.6rem; font-size: 0.85rem; font-weight: 600; color: var(--muted); }
.panel:not(.open) { display: none; }
.panel.open {
  position: absolute;
  z-index: 2;
  inset-block-start: calc(4.1rem + env(safe-area-inset-top));
  inset-inline-end: 0.75rem;
  inline-size: min(17rem, calc(100% - 1.5rem));
  max-block-size: calc(100% - 5rem);
  border: 1px solid var(--line);
  border-radius: 1.1rem;
  background: var(--background);
  box-shadow: 0 18px 50px light-dark(rgb(20 40 30 / 14%), rgb(0 0 0 / 50%));
}
:is(#who, #bell)[aria-expanded="true"] { border-color: var(--accent); color: var(--accent); }
`;

/** What a panel of a kind has in common with the others. */
export class Panel {
  #button;
  #panel;
  // Ends what an open panel listens to.
  #open = new AbortController();

  /**
   * Puts a panel into the element, closed.
   * @param {HTMLElement} button opens it, and closes it again
   * @param {HTMLElement} next what it stands before, for readers of the page from top to bottom
   * @param {import('./chat-room-words.js').Speaker} speaker
   * @param {string} id
   * @param {Record<string, string>} attributes
   * @param {...HTMLElement} children the first is its heading
   */
  constructor(button, next, speaker, id, attributes, ...children) {
    children[0].id = `${id}-title`;
    this.#button = button;
    this.#panel = make('div', { id, class: 'panel', role: 'group', 'aria-labelledby': `${id}-title`, tabindex: '-1', ...attributes }, ...children);
    dress(next, css);
    speak(this.#panel, speaker);
    next.before(this.#panel);
  }

  toggle(open = !this.#panel.classList.contains('open')) {
    this.#panel.classList.toggle('open', open);
    this.#button.setAttribute('aria-expanded', String(open));
    this.#open.abort();
    if (!open) return;
    this.#open = new AbortController();
    const { signal } = this.#open;
    // It closes when the visitor goes elsewhere.
    for (const type of ['pointerdown', 'focusin']) {
      document.addEventListener(type, (event) => {
        const path = event.composedPath();
        if (!path.includes(this.#panel) && !path.includes(this.#button)) this.toggle(false);
      }, { signal });
    }
    this.#panel.parentElement?.addEventListener('keydown', (/** @type {KeyboardEvent} */ { key }) => {
      if (key !== 'Escape') return;
      this.toggle(false);
      this.#button.focus();
    }, { signal });
    this.#panel.focus({ preventScroll: true });
  }
}
