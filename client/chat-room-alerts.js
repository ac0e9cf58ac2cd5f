/**
 * Notifications and a sound for messages that come while the visitor looks elsewhere. A page loads this module when somebody
 * opens the panel, or has turned one of them on.
 */
import { Panel } from './chat-room-panel.js';
import { dress, make, recall, remember, setText } from './chat-room-tools.js';
import { learn } from './chat-room-words.js';

/** @import { Speaker, UI } from './chat-room-types.js' */

learn({
  notify: 'Show notifications',
  sound: 'Play a sound',
  alertsHint: 'For messages that come while you look elsewhere.',
  denied: 'This browser does not allow notifications here.',
});

const css = `
#alerts label { display: flex; align-items: center; gap: 0.6rem; min-block-size: 2.2rem; }
#alerts input { inline-size: 1.15rem; block-size: 1.15rem; margin: 0; accent-color: var(--accent); }
#alerts p:last-child { margin-block-start: 0.4rem; font-size: 0.82rem; color: var(--muted); }
#bell.on svg { fill: currentColor; }
`;

/** The panel, and what it turns on. */
export default class Alerts extends Panel {
  /** @type {HTMLInputElement} */
  #notify;
  /** @type {HTMLInputElement} */
  #sound;
  /** @type {HTMLElement} */
  #hint;
  /** @type {() => Speaker} */
  #speaker;
  /** @type {AudioContext | undefined} */
  #audio;

  /**
   * @param {UI} ui
   * @param {() => Speaker} speaker
   */
  constructor(ui, speaker) {
    const notify = make('input', { type: 'checkbox', id: 'notify' }), sound = make('input', { type: 'checkbox', id: 'sound' });
    const hint = make('p', { 'data-text': 'alertsHint' });
    super(ui.bell, ui.main, speaker(), 'alerts', {}, make('p', { class: 'heading', 'data-text': 'alerts' }),
      make('label', {}, notify, make('span', { 'data-text': 'notify' })),
      make('label', {}, sound, make('span', { 'data-text': 'sound' })), hint);
    dress(ui.room, css);
    [this.#notify, this.#sound, this.#hint, this.#speaker] = [notify, sound, hint, speaker];
    notify.checked = recall('localStorage', 'notify') === 'on' && globalThis.Notification?.permission === 'granted';
    sound.checked = recall('localStorage', 'sound') === 'on';
    const show = () => ui.bell.classList.toggle('on', notify.checked || sound.checked);
    notify.addEventListener('change', () => this.#ask().then(show));
    sound.addEventListener('change', () => {
      remember('localStorage', 'sound', sound.checked ? 'on' : '');
      if (sound.checked) this.#beep(); // lets the visitor hear it
      show();
    });
    show();
  }

  /**
   * Draws attention to a message.
   * @param {import('./chat-room-types.js').Message} message
   * @param {string} tag has a notification replace the one before
   */
  alert({ author, text }, tag) {
    if (this.#sound.checked) this.#beep();
    if (!this.#notify.checked) return;
    try {
      const notification = new Notification(author, { body: text.slice(0, 200), tag });
      notification.onclick = () => {
        window.focus();
        notification.close();
      };
    } catch { /* phones have notifications only from a service worker */ }
  }

  async #ask() {
    const wanted = this.#notify.checked;
    const allowed = wanted && (await globalThis.Notification?.requestPermission?.()) === 'granted';
    setText(this.#hint, this.#speaker().say(wanted && !allowed ? 'denied' : 'alertsHint'));
    this.#notify.checked = allowed;
    remember('localStorage', 'notify', allowed ? 'on' : '');
  }

  /** Plays two short tones. A browser may want a click on the page before that. */
  #beep() {
    try {
      const audio = this.#audio ??= new AudioContext();
      audio.resume();
      for (const [i, frequency] of [660, 880].entries()) {
        const tone = audio.createOscillator(), volume = audio.createGain(), at = audio.currentTime + i * 0.11;
        tone.frequency.value = frequency;
        volume.gain.setValueAtTime(0.08, at);
        volume.gain.exponentialRampToValueAtTime(0.001, at + 0.16);
        tone.connect(volume).connect(audio.destination);
        tone.start(at);
        tone.stop(at + 0.16);
      }
    } catch { /* no sound device */ }
  }
}
