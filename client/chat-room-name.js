/** The visitor's name below the text box. A page loads this module when its `<chat-room>` has a `name`. */
import { MAX_NAME, dress, make, speak } from './chat-room-tools.js';
import { learn } from './chat-room-words.js';

/** @import { Speaker, UI } from './chat-room-types.js' */

learn({ youAre: 'You are' });

const css = `
#me { display: flex; align-items: baseline; gap: 0.2rem; min-inline-size: 0; }
#name {
  field-sizing: content;
  min-inline-size: 4rem;
  max-inline-size: 14rem;
  padding: 0.15rem 0.3rem;
  border: 1px solid transparent;
  border-block-end: 1px dashed var(--muted);
  background: none;
  color: var(--text);
  font-weight: 600;
}
#name:focus { border-radius: 0.4rem; background: var(--field); }
#name:read-only { border-block-end-color: transparent; }
/* Touch screens zoom into fields whose letters are smaller. */
@media (pointer: coarse) {
  #name { font-size: 1rem; }
}
`;

/** A field for the name. */
export default class Name {
  #name = make('input', {
    id: 'name', maxlength: String(MAX_NAME), autocomplete: 'nickname', autocapitalize: 'words', spellcheck: 'false', enterkeyhint: 'done',
  });
  #label = make('label', { id: 'me', hidden: '' }, make('span', { 'data-text': 'youAre' }), ' ', this.#name);

  /** @type {(name: string) => void} */
  #changed = () => {};

  /**
   * @param {UI} ui
   * @param {() => Speaker} speaker
   */
  constructor({ below, text }, speaker) {
    dress(below, css);
    speak(this.#label, speaker());
    below.prepend(this.#label);
    this.#name.addEventListener('change', () => this.#changed(this.#name.value));
    // The first click selects the old name, as Tab does, and does not put the caret into it.
    this.#name.addEventListener('mousedown', (event) => {
      if (this.#name.matches(':focus')) return;
      event.preventDefault();
      this.#name.focus();
      this.#name.select();
    });
    this.#name.addEventListener('keydown', (event) => {
      if (event.key !== 'Enter' || event.isComposing) return;
      event.preventDefault(); // or Enter would also act on the text box
      text.focus();
    });
  }

  /**
   * @param {string} name
   * @param {boolean} shown
   * @param {boolean} fixed whether it cannot be changed
   * @param {(name: string) => void} changed
   */
  show(name, shown, fixed, changed) {
    this.#name.value = name;
    this.#name.readOnly = fixed;
    this.#label.hidden = !shown;
    this.#changed = changed;
  }
}
