/**
 * A connection to a hub that reconnects by itself (docs/protocol.md).
 *
 *     import { Chat } from './chat.js';
 *
 *     const chat = new Chat('/chat/lobby');
 *     chat.addEventListener('message', ({ user, data }) => console.log(user, data));
 *     chat.send('hello');
 *
 * Messages are text from strangers: show them with `textContent`. chat-types.js has events and options.
 *
 * @typedef {import('./chat-types.js').State} State
 * @typedef {import('./chat-types.js').Data} Data
 * @typedef {import('./chat-types.js').Options} Options
 * @typedef {import('./chat-types.js').Page} Page
 * @typedef {import('./chat-types.js').Hello} Hello
 * @typedef {import('./chat-types.js').Events} Events
 */

/** The close codes after which a client must not reconnect. */
const FINAL = [1000, 1002, 1007, 1008, 1009];

/** How many messages to recognize. */
const MEMORY = 4096;

/** After this silence a client asks for a sign of life, before the server does, which then need not. */
const QUIET = 20_000;

/** How long the sign may take when one of these has happened, which may end a connection unseen. */
const HASTE = 4000;
const HAPPENINGS = ['online', 'offline', 'pageshow', 'visibilitychange', 'resume'];

/** Returns a copy of a message as WebSocket would send it: the caller may change the original. */
function copy(/** @type {Data} */ data) {
  if (typeof data === 'string') return data.toWellFormed?.() ?? data;
  if (data instanceof ArrayBuffer) return new Uint8Array(data.slice(0));
  if (ArrayBuffer.isView(data)) return new Uint8Array(data.buffer, data.byteOffset, data.byteLength).slice();
  if (data instanceof Blob) return data;
  throw new TypeError('a message is a string, an ArrayBuffer, a typed array, a DataView or a Blob');
}

/** Asks a server how it would answer a handshake. Returns null if it would accept, or cannot be asked. */
async function whyNot(/** @type {any} */ url, /** @type {any} */ timeout) {
  const check = `${url.replace('ws', 'http')}${url.includes('?') ? '&' : '?'}chat_broadcast_check`;
  const ask = (/** @type {any} */ address, /** @type {any} */ credentials) => {
    const url = new URL(address), signal = AbortSignal.timeout(timeout);
    url.username = url.password = ''; // `fetch` takes none
    return fetch(url, { credentials, signal, cache: 'no-store', redirect: 'manual' });
  };
  const challenges = (/** @type {Response} */ { status, headers }) => status === 401 && headers.has('WWW-Authenticate');
  try {
    let answer = await ask(check, 'omit');
    // After a challenge a browser asks for a password, unless it has one. Then the page was challenged, too.
    if (!challenges(answer) || (globalThis.document && challenges(await ask(document.URL, 'omit')))) {
      answer = await ask(check, 'include');
    }
    const { status, headers } = answer, refused = status >= 400;
    if (status === 204) return null;
    const text = refused && headers.get('Content-Type')?.startsWith('text/plain') ? await answer.text() : '';
    return {
      status: refused ? status : answer.ok ? 404 : 401, // a page is no hub, and logins redirect
      reason: text.split('\n')[0].slice(0, 300),
      after: Math.min(Number(headers.get('Retry-After')) || 0, 3600) * 1000,
    };
  } catch {
    return null;
  }
}

/** Messages arrive in order and once. */
export class Chat extends /** @type {new () => import('./chat-types.js').Target} */ (EventTarget) {
  /** @type {string | URL} The address. A change applies to the next attempt. */
  url;
  #options;
  /** @type {State} */
  #state = 'connecting';
  /** @type {any} The other fields of the last event `state`. */
  #details;
  /** @type {any} */
  #socket;
  // Failed attempts since the last stable connection, and failed handshakes in a row.
  #failures = 0;
  #refusals = 0;
  // Waits for the handshake, stability or the next attempt.
  #timer = 0;
  #due = 0;
  // Waits for an expected answer, or for silence.
  #watchdog = 0;
  #expects = false;
  #heard = 0;
  #offline = false; // as the browser says, and nothing has come since
  /** @type {any} */
  #inquiry;
  /** @type {any} */
  #hello = {};
  #seq = 0;
  // Names of the newest messages, of any epoch.
  #had = new Set();
  // The clients that this object has been.
  #own = new Set();
  // Makes ids that nobody can guess.
  #prefix = crypto.getRandomValues(new Uint32Array(4)).join('-');
  #lastId = 0;
  // When the bucket of the hub's `rate` is full.
  #full = 0;
  #pacer = 0;
  // Unanswered messages. `wire` is the last socket; `token`, `user` and `at` (the time) are of the first.
  /** @type {any[]} */
  #queue = [];
  /** @type {any[]} */
  #asking = []; // callers of `who`

  /**
   * @param {string | URL} url also relative (in a page), or http(s)
   * @param {Options} [options]
   */
  constructor(url, options) {
    super();
    this.#options = { base: 1000, cap: 30000, stable: 10000, timeout: 15000, queue: 100, raw: false, ...options };
    this.url = url;
    this.url = this.#resolve();
    this.connect();
  }

  get state() {
    return this.#state;
  }

  /** The most bytes of a message as JSON with its id, or null if the server has not said so. @returns {?number} */
  get maxMessageSize() {
    return this.#hello.max_message_size ?? null;
  }

  /**
   * Sends a message as soon as connection and `rate` allow. If a connection breaks with the message on its way, it is sent
   * again if the hub's `history` prevents a duplicate, and otherwise has `failed`. With `raw` it may be lost.
   * @param {Data} data
   * @returns {?string} the id in `sent` or `failed`; null if the queue is full or the state is `closed`
   * @throws {TypeError} for anything else
   */
  send(data) {
    const given = copy(data);
    if (this.#state === 'closed' || this.#queue.length >= this.#options.queue) return null;
    const id = `${this.#prefix}-${++this.#lastId}`, m = { id, data: given };
    this.#queue.push(m);
    if (given instanceof Blob) this.#read(m, given);
    this.#flush();
    return id;
  }

  /**
   * Asks who is in the hub.
   * @param {{ after?: string, limit?: number }} [page]
   * @returns {Promise<?Page>} null if no answer came
   */
  async who(page) {
    if (this.#state !== 'open' || !this.#socket.protocol) return null;
    return new Promise((resolve) => {
      this.#asking.push(resolve);
      this.#write({ type: 'who', ...page });
    });
  }

  /**
   * Connects now instead of later, or again after `closed`.
   * @throws if `WebSocket` refuses the `url`
   */
  connect() {
    if (this.#socket) return;
    const url = this.#resolve(), { epoch } = this.#hello;
    if (!this.#options.raw) {
      // searchParams would rewrite the page's own query.
      const own = url.search.slice(1).split('&').filter((pair) => pair && !pair.startsWith(epoch ? 'chat_broadcast_' : 'chat_broadcast_replay='));
      if (epoch) own.push(`chat_broadcast_since=${epoch}:${this.#seq}`);
      url.search = [...own, 'chat_broadcast_replay=bundles'].join('&');
    }
    const socket = new WebSocket(url, this.#options.raw ? [] : 'chat-broadcast.v1');
    socket.binaryType = 'arraybuffer';
    this.#socket = socket;
    if (this.#state !== 'waiting') this.#offline = globalThis.navigator?.onLine === false;
    for (const type of HAPPENINGS) globalThis.addEventListener?.(type, this.#happened, true);
    socket.onopen = () => socket.protocol || this.#opened({});
    socket.onmessage = ({ data }) => {
      if (socket.protocol) {
        this.#received(JSON.parse(data));
        this.#listen();
      } else this.#emit('message', { data: copy(data) });
    };
    socket.onclose = ({ code, reason }) => this.#ended(code, reason);
    socket.onerror = () => socket.readyState || this.#ended(1006, ''); // all that Node.js says of a failed handshake
    // A browser may try for minutes.
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#ended(1006, ''), this.#options.timeout);
    this.#become('connecting');
  }

  /** Closes the connection until `connect` is called. Messages that wait have `failed`. */
  close() {
    if (this.#state !== 'closed') this.#ended(1000, '');
  }

  /** Returns the URL as `WebSocket` accepts it. */
  #resolve() {
    const absolute = /^[\w+.-]+:/.test(String(this.url));
    const url = new URL(this.url, absolute ? undefined : globalThis.document?.baseURI ?? globalThis.location?.href);
    url.protocol = url.protocol.replace('http', 'ws');
    url.hash = '';
    return url;
  }

  #retry() {
    try {
      this.connect();
    } catch (/** @type {any} */ { message }) {
      this.#finish({ code: 1006, reason: message });
    }
  }

  // Finds a connection that died with its network, or while the page slept.
  #happened = (/** @type {any} */ { type }) => {
    if (type === 'visibilitychange' && document.hidden) return;
    const now = performance.now(), waiting = this.#state === 'waiting';
    if (/line$/.test(type)) this.#offline = type === 'offline';
    if (waiting && type !== 'offline' && !this.#details.status) return this.#retry();
    if (this.#state === 'open' && now - this.#heard > 1000) this.#ping(HASTE);
    if (/line$/.test(type)) this.#become(this.#state, { ...this.#details, ...(waiting && { retryIn: this.#due - now }) });
  };

  #received(/** @type {any} */ { type, ...frame }) {
    const { id, seq, data64 } = frame;
    if (frame.time) frame.time = new Date(frame.time);
    if (type === 'hello') this.#opened(frame);
    else if (type === 'replay') {
      const socket = this.#socket;
      for (const m of frame.messages) if (this.#socket === socket) this.#received(m);
    }
    else if (type === 'message' && seq > this.#seq) {
      this.#seq = seq;
      if (data64 != null) frame.data = Uint8Array.from(atob(data64), (c) => c.charCodeAt(0));
      // A hub that begins anew may repeat messages.
      const had = this.#had, name = `${seq} ${frame.client} ${+frame.time}`, repeated = had.has(name);
      if (had.add(name).size > MEMORY) had.delete(had.values().next().value);
      frame.own = this.#own.has(frame.client);
      frame.replayed = seq <= this.#hello.head;
      if (!repeated) this.#emit(type, frame);
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
  }

  #opened(/** @type {any} */ hello) {
    clearTimeout(this.#timer);
    // A server that accepts and closes is not asked again at once.
    this.#timer = setTimeout(() => (this.#failures = 0), this.#options.stable);
    this.#refusals = 0;
    this.#inquiry = null;
    this.#offline = false;
    const { epoch, user, age, missed: count = 0 } = hello, before = this.#hello.epoch;
    const restarted = !!before && epoch !== before;
    if (epoch) {
      this.#hello = hello;
      this.#seq = hello.head - hello.replay;
      this.#own.add(hello.client);
      this.#full = 0;
    }
    // Nobody can know whether these arrived. The others are sent again, which takes time, too.
    const lost = this.#queue.filter((m) => m.wire && !(m.token && m.user === user && Date.now() - m.at < 0.9 * age));
    for (const m of lost) this.#take(m.id);
    this.#become('open');
    if (this.#state === 'open') this.#emit('open', hello);
    if (count || restarted) this.#emit('missed', { count, restarted });
    for (const m of lost) this.#fail(m, 'unknown');
  }

  #ended(/** @type {any} */ code, /** @type {any} */ reason) {
    const socket = this.#leave();
    if (FINAL.includes(code)) this.#finish({ code, reason });
    else {
      const refused = this.#state === 'connecting' && ++this.#refusals > 1 && !this.#options.raw;
      this.#wait({ code, reason });
      if (refused) this.#inquire(socket.url);
    }
    if (socket) this.#emit('close', { code, reason });
  }

  #leave() {
    for (const timer of [this.#timer, this.#watchdog, this.#pacer]) clearTimeout(timer);
    this.#expects = false;
    const socket = this.#socket;
    this.#socket = null;
    if (socket) socket.onopen = socket.onmessage = socket.onerror = socket.onclose = null;
    socket?.close(1000);
    for (const resolve of this.#asking.splice(0)) resolve(null);
    return socket;
  }

  #finish(/** @type {any} */ details) {
    for (const type of HAPPENINGS) globalThis.removeEventListener?.(type, this.#happened, true);
    this.#failures = 0;
    this.#inquiry = null;
    const given = this.#queue.splice(0);
    this.#become('closed', details);
    for (const m of given) this.#fail(m, m.wire ? 'unknown' : 'closed');
  }

  #wait(/** @type {any} */ details, atLeast = 0) {
    // Full jitter, because a restart disconnects all clients at once.
    const { base, cap } = this.#options, usual = Math.random() * Math.min(cap, base * 2 ** this.#failures++);
    const retryIn = Math.max(usual, atLeast);
    this.#timer = setTimeout(() => this.#retry(), retryIn);
    this.#due = performance.now() + retryIn;
    this.#become('waiting', { retryIn, ...details });
  }

  /** Tells why handshakes fail: `WebSocket` does not. */
  async #inquire(/** @type {any} */ url) {
    if (this.#inquiry) return;
    const inquiry = this.#inquiry = whyNot(url, this.#options.timeout), refusal = await inquiry;
    if (this.#inquiry !== inquiry) return; // it is open or closed
    this.#inquiry = null;
    if (!refusal) return;
    const { after, ...why } = refusal, { status } = why;
    // A server that is being exchanged may answer anything.
    const final = this.#hello.epoch ? [401, 403].includes(status) : status < 500 && ![408, 425, 429].includes(status);
    this.#leave();
    if (final) this.#finish({ code: 1006, ...why });
    else this.#wait({ code: 1006, ...why }, after);
    this.#emit('refused', { ...why, final, retryIn: this.#details.retryIn });
  }

  /** Reads a message, for which those behind it wait. */
  async #read(/** @type {any} */ m, /** @type {Blob} */ blob) {
    try {
      m.data = new Uint8Array(await blob.arrayBuffer());
    } catch {
      this.#fail(this.#take(m.id), 'unreadable');
    }
    this.#flush();
  }

  #flush() {
    const socket = this.#socket;
    if (this.#state !== 'open' || socket.readyState !== WebSocket.OPEN) return;
    clearTimeout(this.#pacer);
    const { messages = 1, window = 0 } = this.#hello.rate ?? {};
    const step = window && (1.1 * window + 200) / messages; // networks jitter
    for (const m of this.#queue.filter(({ wire }) => wire !== socket)) {
      const { id, data } = m, now = performance.now();
      if (data instanceof Blob) return;
      const wait = this.#full - now - (messages - 1) * step;
      if (wait > 0) {
        this.#pacer = setTimeout(() => this.#flush(), wait);
        return;
      }
      const payload = typeof data === 'string' ? { data }
        : { data64: btoa(Array.from(data, (b) => String.fromCharCode(b)).join('')) };
      const frame = { type: 'send', id, token: m.wire && m.token, ...payload };
      if (new TextEncoder().encode(JSON.stringify(frame)).length > (this.maxMessageSize ?? Infinity)) {
        this.#take(id);
        queueMicrotask(() => this.#fail(m, m.wire ? 'unknown' : 'too_big')); // `send` returns the id first
        continue;
      }
      this.#full = Math.max(this.#full, now) + step;
      if (!m.wire) Object.assign(m, { token: this.#hello.token, user: this.#hello.user, at: Date.now() });
      m.wire = socket;
      if (socket.protocol) this.#write(frame);
      else {
        this.#take(id);
        socket.send(data);
      }
    }
  }

  /** Writes a frame that the server answers. */
  #write(/** @type {any} */ frame) {
    this.#socket.send(JSON.stringify(frame));
    if (!this.#expects) this.#expect(this.#options.timeout);
  }

  #expect(/** @type {any} */ patience) {
    clearTimeout(this.#watchdog);
    this.#watchdog = setTimeout(() => this.#ended(1006, ''), patience);
    this.#expects = true;
  }

  #ping(/** @type {any} */ patience) {
    if (!this.#socket.protocol) return;
    // A server that does not tell its size knows no ping.
    if (this.maxMessageSize) this.#write({ type: 'ping' });
    else this.who({ limit: 1 });
    this.#expect(patience);
  }

  /** Waits for the next frame. */
  #listen() {
    if (this.#state !== 'open') return;
    if (this.#offline) {
      this.#offline = false;
      this.#become('open');
    }
    const { timeout } = this.#options;
    this.#heard = performance.now();
    if (this.#asking.length || this.#queue.some((m) => m.wire === this.#socket)) return this.#expect(timeout);
    clearTimeout(this.#watchdog);
    this.#watchdog = setTimeout(() => this.#ping(timeout), QUIET);
    this.#expects = false;
  }

  #take(/** @type {any} */ id) {
    const i = this.#queue.findIndex((m) => m.id === id);
    return i < 0 ? null : this.#queue.splice(i, 1)[0];
  }

  #fail(/** @type {any} */ m, /** @type {any} */ code, message = '') {
    if (m) this.#emit('failed', { id: m.id, data: m.data, code, message });
  }

  #become(/** @type {State} */ state, details = {}) {
    this.#state = state;
    this.#details = details;
    this.#flush();
    this.#emit('state', { state, ...details, ...(this.#offline && { offline: true }) });
  }

  #emit(/** @type {any} */ type, /** @type {any} */ fields) {
    this.dispatchEvent(Object.defineProperties(new Event(type), Object.getOwnPropertyDescriptors(fields)));
  }
}
