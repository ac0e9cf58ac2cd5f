/**
 * A connection to a hub that reconnects by itself (docs/protocol.md).
 *
 *     import { Chat } from './chat.js';
 *
 *     const chat = new Chat('/chat/lobby');
 *     chat.addEventListener('message', ({ user, data }) => console.log(user, data));
 *     chat.send('hello');
 *
 * Messages are text from strangers: show them with `textContent`.
 */

/**
 * @typedef {'connecting' | 'open' | 'waiting' | 'closed'} State `closed` is final
 *
 * @typedef {object} Options times in milliseconds
 * @property {number} [base=1000] the longest first wait; each further wait may be twice as long
 * @property {number} [cap=30000] the longest wait of all
 * @property {number} [stable=10000] after a connection of this length the waits start over
 * @property {number} [timeout=15000] how long to wait for a connection or an answer
 * @property {number} [queue=100] how many messages may wait to be sent or answered
 * @property {boolean} [raw=false] whether the server does not speak the protocol
 */

/** The close codes after which a client must not reconnect. */
const FINAL = [1000, 1002, 1007, 1008, 1009];

/** How many messages to recognize when they come again. */
const MEMORY = 4096;

/** Returns a copy of a message as WebSocket would send it, so that the caller may change the original. */
function copy(data) {
  if (typeof data === 'string') return data.toWellFormed?.() ?? data;
  if (data instanceof ArrayBuffer) return new Uint8Array(data.slice(0));
  if (ArrayBuffer.isView(data)) return new Uint8Array(data.buffer, data.byteOffset, data.byteLength).slice();
  throw new TypeError('a message is a string, an ArrayBuffer, a typed array or a DataView');
}

/**
 * Messages arrive in order and once. The events and their fields:
 *
 * - `message`: `data` (string or Uint8Array), `seq`, `time` (Date), `client`, `user`, `own` (sent by this object),
 *   `replayed` (older than the connection)
 * - `sent`: `id`, `seq`, `time`: the server published the message
 * - `failed`: `id`, `data`, `code`, `message`: the message was not published. The code is the server's, `closed`, or
 *   `unknown`: then the message was on its way and may have arrived. After `unavailable` it can be sent again later.
 * - `missed`: `count` messages are lost; if `restarted`, the hub has begun anew and more may be lost
 * - `join`, `leave`, `presence`, `error`: frames of the server that answer nothing
 * - `open`: the fields of `hello`
 * - `close`: `code`, `reason`: a connection has ended
 * - `state`: `state`; `retryIn` if it is `waiting`; `code` and `reason` if it is `waiting` or `closed`. It is `closed` with
 *   1006 if `WebSocket` refused the `url`; the reason is then the message of the error.
 *
 * With `raw` the events are the last three, `failed`, and `message` with `data`.
 */
export class Chat extends EventTarget {
  /** The address, a string or URL. A change applies to the next attempt. */
  url;
  #options;
  #state = 'connecting';
  /** @type {?WebSocket} */
  #socket = null;
  // Failed attempts since the last stable connection.
  #failures = 0;
  // Waits for the handshake, for stability, or for the next attempt.
  #timer = 0;
  // Waits for an answer.
  #watchdog;
  // Finds a connection that died with its network.
  #online = () => (this.#state === 'waiting' ? this.#retry() : this.who({ limit: 1 }));
  #hello = {};
  #seq = 0;
  // What identifies the newest messages, in whatever epoch.
  #had = new Set();
  // The client ids of this object's connections.
  #own = new Set();
  // Makes message ids that nobody else can guess.
  #prefix = crypto.getRandomValues(new Uint32Array(4)).join('-');
  #lastId = 0;
  // When the bucket of the hub's `rate` is full.
  #full = 0;
  #pacer;
  // Unanswered messages. `wire` is the last socket that a message went to; `token`, `user` and `at` (the time) are those
  // of the first.
  #queue = [];
  // The callers that wait for an answer to `who`.
  #asking = [];

  /**
   * @param {string | URL} url may be relative (in a page), and http or https
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
   * Sends a message as soon as connection and `rate` allow. If the connection breaks while the message is on its way, it
   * is sent again where the hub's `history` prevents a duplicate, and otherwise it has `failed`. With `raw` it may be lost.
   * @param {string | ArrayBuffer | ArrayBufferView} data
   * @returns {?string} the id in `sent` or `failed`; null if the queue is full or the state is `closed`
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
   * Asks who is in the hub.
   * @param {{ after?: string, limit?: number }} [page]
   * @returns {Promise<?object>} `presence` with `users`, or null if no answer came
   */
  async who(page) {
    if (this.#state !== 'open' || !this.#socket.protocol) return null;
    const answer = new Promise((resolve) => this.#asking.push(resolve));
    this.#write({ type: 'who', ...page });
    return answer;
  }

  /**
   * Connects now instead of later, or again after `closed`.
   * @throws if `WebSocket` refuses the `url`
   */
  connect() {
    if (this.#socket) return;
    const url = this.#resolve(), { epoch } = this.#hello;
    if (epoch) {
      // searchParams would rewrite the page's own query.
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
    // A browser may try for minutes.
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#ended(1006, ''), this.#options.timeout);
    this.#become('connecting');
  }

  /** Returns the URL as `WebSocket` accepts it: absolute, with the scheme ws or wss, without a hash. */
  #resolve() {
    const url = new URL(this.url, globalThis.document?.baseURI ?? globalThis.location?.href);
    url.protocol = url.protocol.replace('http', 'ws');
    url.hash = '';
    return url;
  }

  /** Closes the connection until `connect` is called. Messages that wait have `failed`. */
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
      const own = this.#own.has(frame.client), replayed = seq <= this.#hello.head;
      if (this.#isNew(frame)) this.#emit(type, { ...frame, own, replayed });
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

  /** Notes a message. Returns whether it is new: a hub that begins anew may send what it sent before. */
  #isNew({ seq, client, time }) {
    const name = `${seq} ${client} ${+time}`;
    if (this.#had.has(name)) return false;
    this.#had.add(name);
    if (this.#had.size > MEMORY) this.#had.delete(this.#had.values().next().value);
    return true;
  }

  #opened(hello) {
    clearTimeout(this.#timer);
    // A server that accepts and then closes must not be asked again at once.
    this.#timer = setTimeout(() => (this.#failures = 0), this.#options.stable);
    const { epoch, user, age, missed: count = 0 } = hello, before = this.#hello.epoch;
    const restarted = !!before && epoch !== before;
    if (epoch) {
      this.#hello = hello;
      this.#seq = hello.head - hello.replay;
      this.#own.add(hello.client);
      this.#full = 0;
    }
    // Nobody can know whether these arrived. The others are sent again, with the token of the first time.
    const known = (m) => m.token && m.user === user && Date.now() - m.at < 0.9 * age; // the frame takes time, too
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
      // Full jitter, because a restart disconnects all clients at once.
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
