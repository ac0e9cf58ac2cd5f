/**
 * A connection to a hub that comes back by itself. Copy this file: it needs nothing else.
 *
 *     import { Chat } from './chat.js';
 *
 *     const chat = new Chat('/chat/lobby');
 *     chat.addEventListener('message', (event) => console.log(event.data));
 *     chat.addEventListener('open', () => chat.send('hello'));
 *
 * The server relays what it gets, unchanged, to every client of the hub, the sender included. Treat it as
 * what it is, text from strangers: show it with `textContent`, never with `innerHTML`.
 */

/**
 * What a connection is up to: `connecting`, `open`, `waiting` for its next attempt, or `closed` for good.
 * @typedef {'connecting' | 'open' | 'waiting' | 'closed'} State
 */

/**
 * The `detail` of a `state` event.
 * @typedef {object} StateDetail
 * @property {State} state
 * @property {number} [retryIn] milliseconds until the next attempt, when `waiting`
 * @property {number} [code] the close code that ended the last connection, when `waiting` or `closed`
 * @property {string} [reason] and its reason
 */

/**
 * All in milliseconds.
 * @typedef {object} Options
 * @property {number} [base] the first wait is at most this long, and each further one twice as long; 1000
 * @property {number} [cap] no wait is longer than this; 30000
 * @property {number} [stable] a connection that lasts this long starts the waits over; 10000
 * @property {number} [timeout] an attempt that takes longer has failed; 15000
 */

/**
 * The close codes after which another attempt would end in the same way: goodbye (1000), protocol error
 * (1002), not UTF-8 (1007), policy (1008: `read_only`, `rate_limited`, `kicked`), and too big (1009). All
 * others pass: restarts, reloads, falling behind, lost networks (1001, 1011, 1012, 1013, 1006).
 */
const FINAL = new Set([1000, 1002, 1007, 1008, 1009]);

/**
 * Dispatches `open`; `message` (a MessageEvent); `close` (a CloseEvent, for each connection that ends); and
 * `state` (a CustomEvent with a {@link StateDetail}, for each change after the initial `connecting`).
 */
export class Chat extends EventTarget {
  #url;
  #options;
  /** @type {State} */
  #state = 'connecting';
  /** @type {?WebSocket} the current one; events of any other are stale */
  #socket = null;
  /** How many attempts in a row have not led to a stable connection. */
  #failures = 0;
  /** The one thing that is waited for: the handshake, stability, or the next attempt. */
  #timer = 0;
  #online = () => {
    if (this.#state === 'waiting') this.connect();
  };

  /**
   * Connects at once.
   * @param {string | URL} url where to: absolute, or relative to the page; http and https stand for ws and wss
   * @param {Options} [options]
   */
  constructor(url, options = {}) {
    super();
    this.#options = { base: 1000, cap: 30_000, stable: 10_000, timeout: 15_000, ...options };
    this.#url = new URL(url, globalThis.document?.baseURI ?? location.href);
    this.#url.protocol = this.#url.protocol.replace('http', 'ws');
    this.#url.hash = ''; // WebSocket refuses one
    this.connect();
  }

  /** @returns {State} */
  get state() {
    return this.#state;
  }

  /**
   * Sends a message. `false` means that it was not sent because the connection is not open: keep it. `true`
   * means that it is on its way; that it arrived is known when it comes back.
   * @param {string} text
   * @returns {boolean}
   */
  send(text) {
    if (this.#state !== 'open' || this.#socket?.readyState !== WebSocket.OPEN) return false;
    this.#socket.send(text);
    return true;
  }

  /** Connects now instead of later, or again after `closed`. Does nothing while connecting or open. */
  connect() {
    if (this.#socket) return;
    clearTimeout(this.#timer);
    globalThis.addEventListener('online', this.#online);
    const socket = new WebSocket(this.#url);
    this.#socket = socket;
    socket.onopen = () => {
      if (socket === this.#socket) this.#opened();
    };
    socket.onmessage = ({ data }) => {
      if (socket === this.#socket) this.dispatchEvent(new MessageEvent('message', { data }));
    };
    socket.onclose = ({ code, reason, wasClean }) => {
      if (socket === this.#socket) this.#ended(code, reason, wasClean);
    };
    // In a network that swallows packets browsers try for minutes.
    this.#timer = setTimeout(() => socket.close(), this.#options.timeout);
    if (this.#state !== 'connecting') this.#become({ state: 'connecting' });
  }

  /** Says goodbye and stays away until `connect` is called. What was sent before is still delivered. */
  close() {
    if (this.#state === 'closed') return;
    const socket = this.#socket;
    this.#ended(1000, '', true);
    socket?.close(1000);
  }

  #opened() {
    clearTimeout(this.#timer);
    // A server that accepts and then closes (1013) must not be asked again at once, for ever.
    this.#timer = setTimeout(() => (this.#failures = 0), this.#options.stable);
    this.#become({ state: 'open' });
    this.dispatchEvent(new Event('open'));
  }

  #ended(code, reason, wasClean) {
    clearTimeout(this.#timer);
    const connection = this.#socket;
    this.#socket = null;
    if (FINAL.has(code)) {
      globalThis.removeEventListener('online', this.#online);
      this.#failures = 0;
      this.#become({ state: 'closed', code, reason });
    } else {
      const retryIn = this.#backOff();
      this.#timer = setTimeout(() => this.connect(), retryIn);
      this.#become({ state: 'waiting', retryIn, code, reason });
    }
    if (connection) this.dispatchEvent(new CloseEvent('close', { code, reason, wasClean }));
  }

  /**
   * Full jitter: anything from nothing to a bound that doubles. The clients of a server that restarts have
   * all lost it in the same moment, and come back spread evenly.
   */
  #backOff() {
    const { base, cap } = this.#options;
    return Math.random() * Math.min(cap, base * 2 ** this.#failures++);
  }

  /** @param {StateDetail} detail */
  #become(detail) {
    this.#state = detail.state;
    this.dispatchEvent(new CustomEvent('state', { detail }));
  }
}
