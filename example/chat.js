/**
 * A connection to a hub that comes back by itself (docs/protocol.md).
 *
 *     import { Chat } from './chat.js';
 *
 *     const chat = new Chat('/chat/lobby');
 *     chat.addEventListener('message', ({ user, data }) => console.log(user, data));
 *     chat.send('hello');
 *
 * What comes is text from strangers: show it with `textContent`.
 */

/**
 * @typedef {'connecting' | 'open' | 'waiting' | 'closed'} State `closed` is for good
 *
 * @typedef {object} Options times are in milliseconds
 * @property {number} [base=1000] the first wait is at most so long, each next twice that
 * @property {number} [cap=30000] no wait is longer
 * @property {number} [stable=10000] a connection this long starts the waits over
 * @property {number} [timeout=15000] for an attempt or an answer
 * @property {number} [queue=100] messages that may wait to be sent or answered
 * @property {boolean} [raw=false] the server does not speak docs/protocol.md
 */

/** The codes of connections that must not be opened again. */
const FINAL = [1000, 1002, 1007, 1008, 1009];

/** The message as it stays, whatever becomes of the caller's: as WebSocket would send it. */
function copy(data) {
  if (typeof data === 'string') return data.toWellFormed?.() ?? data;
  if (data instanceof ArrayBuffer) return new Uint8Array(data.slice(0));
  if (ArrayBuffer.isView(data)) return new Uint8Array(data.buffer, data.byteOffset, data.byteLength).slice();
  throw new TypeError('a message is a string, an ArrayBuffer, a typed array or a DataView');
}

/**
 * Messages come in order and once. The events and their fields:
 *
 * - `message`: `data` (string or Uint8Array), `seq`, `time` (Date), `client`, `user`, `own` (sent by this object),
 *   `replayed` (older than the connection)
 * - `sent`: `id`, `seq`, `time`: published
 * - `failed`: `id`, `data`, `code`, `message`: not published. The code is the server's, `closed`, or `unknown`: it was on its
 *   way, and may have arrived.
 * - `missed`: `count` messages are lost; if `restarted`, the hub is new, and more may be
 * - `join`, `leave`, `presence`, `error`: from the server, but not answers
 * - `open`: what is in `hello`
 * - `close`: `code`, `reason`: a connection has ended
 * - `state`: `state`; if `waiting`, `retryIn`; then or if `closed`, `code` and `reason`. With 1006 it is `closed` because
 *   `WebSocket` did not take the `url`, and the reason is the error's.
 *
 * With `raw` there are the last three, `failed`, and `message` with `data`.
 */
export class Chat extends EventTarget {
  /** May be changed to another of the same kinds. Changes hold from the next attempt on. */
  url;
  #options;
  #state = 'connecting';
  /** @type {?WebSocket} */
  #socket = null;
  // Since the last stable connection.
  #failures = 0;
  // For the handshake, stability, or the next attempt.
  #timer = 0;
  // For an answer.
  #watchdog;
  // Finds a connection that died with its network.
  #online = () => (this.#state === 'waiting' ? this.#retry() : this.who({ limit: 1 }));
  #hello = {};
  #seq = 0;
  // The client ids so far.
  #own = new Set();
  // Nobody else can guess the ids of messages.
  #prefix = crypto.getRandomValues(new Uint32Array(4)).join('-');
  #lastId = 0;
  // When the bucket of the hub's `rate` is full.
  #full = 0;
  #pacer;
  // Not answered. `wire`: the socket it went to; `token`, `user`, `at` (the time): of the first one.
  #queue = [];
  // Who waits for `who`.
  #asking = [];

  /**
   * @param {string | URL} url may be relative (in a page), http or https
   * @param {Options} [options]
   */
  constructor(url, options = {}) {
    super();
    this.#options = { base: 1000, cap: 30000, stable: 10000, timeout: 15000, queue: 100, ...options };
    this.url = url;
    this.url = this.#resolve();
    this.connect();
  }

  /** @returns {State} */
  get state() {
    return this.#state;
  }

  /**
   * Sends a message as soon as connection and `rate` allow. What was on its way when a connection broke is sent again
   * where `history` makes that once, else it has `failed`; with `raw` it may be lost.
   * @param {string | ArrayBuffer | ArrayBufferView} data
   * @returns {?string} the id of `sent` or `failed`; null: the queue is full
   * @throws {TypeError} for anything else
   */
  send(data) {
    data = copy(data);
    if (this.#state === 'closed' || this.#queue.length >= this.#options.queue) return null;
    const id = `${this.#prefix}-${++this.#lastId}`;
    this.#queue.push({ id, data });
    this.#flush();
    return id;
  }

  /**
   * Asks who is here.
   * @param {{ after?: string, limit?: number }} [page]
   * @returns {Promise<?object>} `presence` with `users`, or null: no answer
   */
  async who(page) {
    if (this.#state !== 'open' || !this.#socket.protocol) return null;
    const answer = new Promise((resolve) => this.#asking.push(resolve));
    this.#write({ type: 'who', ...page });
    return answer;
  }

  /**
   * Now instead of later, or again after `closed`.
   * @throws where `WebSocket` does: for a `url` that it does not take
   */
  connect() {
    if (this.#socket) return;
    const url = this.#resolve(), { epoch } = this.#hello;
    if (epoch) {
      // Not with searchParams, which would write the page's own query in another way.
      const own = url.search.slice(1).split('&').filter((pair) => pair && !pair.startsWith('chat_broadcast_since='));
      url.search = [...own, `chat_broadcast_since=${epoch}:${this.#seq}`].join('&');
    }
    const socket = new WebSocket(url, this.#options.raw ? [] : 'chat-broadcast.v1');
    socket.binaryType = 'arraybuffer';
    this.#socket = socket;
    globalThis.addEventListener?.('online', this.#online);
    socket.onopen = () => socket.protocol || this.#opened({});
    socket.onmessage = ({ data }) => {
      if (socket.protocol) this.#received(JSON.parse(data));
      else this.#emit('message', { data: copy(data) });
    };
    socket.onclose = ({ code, reason }) => this.#ended(code, reason);
    // Browsers may try for minutes.
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#ended(1006, ''), this.#options.timeout);
    this.#become('connecting');
  }

  /** As `WebSocket` takes it: with a scheme of its own, and without a hash. */
  #resolve() {
    const url = new URL(this.url, globalThis.document?.baseURI ?? globalThis.location?.href);
    url.protocol = url.protocol.replace('http', 'ws');
    url.hash = '';
    return url;
  }

  /** Until `connect` is called. What waits has `failed`. */
  close() {
    if (this.#state !== 'closed') this.#ended(1000, '');
  }

  #retry() {
    try {
      this.connect();
    } catch (error) {
      this.#ended(1006, error.message, true);
    }
  }

  #received({ type, ...frame }) {
    this.#watchdog = clearTimeout(this.#watchdog);
    const { id, seq, data64 } = frame;
    if (frame.time) frame.time = new Date(frame.time);
    if (type === 'hello') this.#opened(frame);
    else if (type === 'message' && seq > this.#seq) {
      this.#seq = seq;
      if (data64 != null) frame.data = Uint8Array.from(atob(data64), (c) => c.charCodeAt(0));
      this.#emit(type, { ...frame, own: this.#own.has(frame.client), replayed: seq <= this.#hello.head });
    } else if (type === 'lagged') {
      this.#seq = frame.next - 1;
      this.#emit('missed', { count: frame.missed, restarted: false });
    } else if (type === 'sent' && this.#take(id)) this.#emit(type, frame);
    else if (type === 'error' && id) this.#fail(this.#take(id), frame.code, frame.message);
    else if (/^(join|leave|presence|error)$/.test(type)) {
      const resolve = (frame.users || type === 'error') && this.#asking.shift();
      if (resolve) resolve(frame.users ? frame : null);
      else this.#emit(type, frame);
    }
    this.#watch();
  }

  #opened(hello) {
    clearTimeout(this.#timer);
    // Who accepts and then closes must not be asked at once.
    this.#timer = setTimeout(() => (this.#failures = 0), this.#options.stable);
    const { epoch, user, age, missed: count = 0 } = hello, before = this.#hello.epoch;
    const restarted = !!before && epoch !== before;
    if (epoch) {
      this.#hello = hello;
      this.#seq = hello.head - hello.replay;
      this.#own.add(hello.client);
      this.#full = 0;
    }
    // Nobody can know what became of these. The others are sent again, with the token of the first time.
    const known = (m) => m.token && m.user === user && Date.now() - m.at < 0.9 * age; // the way takes time, too
    const lost = this.#queue.filter((m) => m.wire && !known(m));
    for (const m of lost) this.#take(m.id);
    this.#become('open');
    if (this.#state === 'open') this.#emit('open', hello);
    if (count || restarted) this.#emit('missed', { count, restarted });
    for (const m of lost) this.#fail(m, 'unknown');
  }

  #ended(code, reason, final = FINAL.includes(code)) {
    clearTimeout(this.#timer);
    this.#watchdog = clearTimeout(this.#watchdog);
    const socket = this.#socket ?? {};
    socket.onopen = socket.onmessage = socket.onclose = this.#socket = null;
    socket.close?.(1000);
    for (const resolve of this.#asking.splice(0)) resolve(null);
    if (final) {
      globalThis.removeEventListener?.('online', this.#online);
      this.#failures = 0;
      const given = this.#queue.splice(0);
      this.#become('closed', { code, reason });
      for (const m of given) this.#fail(m, m.wire ? 'unknown' : 'closed');
    } else {
      // Full jitter: a restart loses all clients at once.
      const { base, cap } = this.#options;
      const retryIn = Math.random() * Math.min(cap, base * 2 ** this.#failures++);
      this.#timer = setTimeout(() => this.#retry(), retryIn);
      this.#become('waiting', { retryIn, code, reason });
    }
    if (socket.close) this.#emit('close', { code, reason });
  }

  #flush() {
    const socket = this.#socket;
    if (this.#state !== 'open' || socket.readyState !== WebSocket.OPEN) return;
    clearTimeout(this.#pacer);
    const { messages = 1, window = 0 } = this.#hello.rate ?? {};
    const step = window && (1.1 * window + 200) / messages; // networks jitter
    for (const m of this.#queue.filter(({ wire }) => wire !== socket)) {
      const { id, data } = m, now = performance.now();
      const wait = this.#full - now - (messages - 1) * step;
      if (wait > 0) return (this.#pacer = setTimeout(() => this.#flush(), wait));
      this.#full = Math.max(this.#full, now) + step;
      const again = m.wire && { token: m.token };
      if (!m.wire) Object.assign(m, { token: this.#hello.token, user: this.#hello.user, at: Date.now() });
      m.wire = socket;
      if (!socket.protocol) {
        this.#take(id);
        socket.send(data);
      } else if (typeof data === 'string') this.#write({ type: 'send', id, ...again, data });
      else this.#write({ type: 'send', id, ...again, data64: btoa(data.reduce((s, b) => s + String.fromCharCode(b), '')) });
    }
  }

  #write(frame) {
    this.#socket.send(JSON.stringify(frame));
    this.#watch();
  }

  #watch() {
    if (!this.#asking.length && !this.#queue.some((m) => m.wire === this.#socket)) return;
    this.#watchdog ||= setTimeout(() => this.#ended(1006, ''), this.#options.timeout);
  }

  #take(id) {
    const i = this.#queue.findIndex((m) => m.id === id);
    return i < 0 ? null : this.#queue.splice(i, 1)[0];
  }

  #fail(m, code, message = '') {
    if (m) this.#emit('failed', { id: m.id, data: m.data, code, message });
  }

  #become(state, more) {
    this.#state = state;
    this.#flush();
    this.#emit('state', { state, ...more });
  }

  #emit(type, fields) {
    this.dispatchEvent(Object.defineProperties(new Event(type), Object.getOwnPropertyDescriptors(fields)));
  }
}
