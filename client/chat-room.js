/**
 * The element `<chat-room>`, a chat to put into a page. docs/clients.md has its attributes, slots, parts and events, and
 * client/README.md says what its modules do.
 */
import { Chat } from './chat.js';
import { ItemList } from './chat-room-list.js';
import style from './chat-room-style.js';
import {
  MAX_TEXT, avatar, bytes, clean, dress, hue, icon, legible, make, recall, remember, setText, speak, tidy,
} from './chat-room-tools.js';
import { Speaker, guest, languages, speakerOf } from './chat-room-words.js';

/** @import { Events, Item, Line, Load, Message, MessageFields, Notice, Parts, PeopleEvent, RoomElement, StateFields, UI, Words } from './chat-room-types.js' */

/** How long the messages of one author form a group, in milliseconds. */
const TOGETHER = 120_000;

/** The most people to ask for; nobody reads more names. */
const MAX_LISTED = 200;

/** How many bytes of a frame are not of its text. */
const AROUND = 150;

/** How long to wait for the rest of a history. */
const HISTORY_WAIT = 800;

function build() {
  const header = make('div', { id: 'header', part: 'header' },
    make('slot', { name: 'start' }),
    make('div', { id: 'where' },
      make('slot', { name: 'header' }, make('h2', { id: 'title', part: 'title', dir: 'auto' })),
      // A status would be read out every second.
      make('p', { id: 'pill', class: 'state', 'data-state': 'connecting' },
        make('span', { class: 'dot' }), make('span', { id: 'state', role: 'status' }), make('span', { id: 'countdown', 'aria-hidden': 'true' }))),
    make('button', { type: 'button', id: 'bell', 'aria-expanded': 'false', 'data-title': 'alerts', 'data-aria-label': 'alerts' },
      icon(20, 'M5 13.5V9a5 5 0 0 1 10 0v4.5l1.2 1.5H3.8zM8.5 17.3a1.8 1.8 0 0 0 3 0')),
    make('slot', { name: 'actions' }));
  const main = make('div', { id: 'main' },
    make('div', { id: 'empty' }, make('slot', { name: 'empty' },
      make('p', { class: 'heading', 'data-text': 'emptyTitle' }), make('p', { 'data-text': 'emptyText' }))),
    make('div', { id: 'log', part: 'messages', role: 'group', tabindex: '0', 'data-aria-label': 'messages' },
      make('ol', { id: 'messages', role: 'list' })),
    make('button', { type: 'button', id: 'jump', hidden: '' }, make('span'), icon(16, 'm4 6 4 4 4-4')));
  const footer = make('div', { id: 'footer' },
    make('div', { id: 'trouble', hidden: '' },
      make('p', { id: 'why' }), make('a', { id: 'login', target: '_top', 'data-text': 'signIn', hidden: '' }), make('button', { type: 'button', id: 'connect' })),
    make('p', { id: 'hint', role: 'status' }),
    make('form', { id: 'compose', autocomplete: 'off' },
      make('textarea', {
        id: 'text', part: 'text', rows: '1', enterkeyhint: 'send', 'aria-describedby': 'help hint', 'data-aria-label': 'message', 'data-placeholder': 'write',
      }),
      make('button', { type: 'submit', id: 'send', part: 'send', 'data-title': 'send', 'data-aria-label': 'send' },
        icon(24, 'M12 19V5m-6.5 6.5L12 5l6.5 6.5'))),
    make('div', { id: 'below' },
      make('span', { id: 'help', 'data-text': 'help' }), make('slot', { name: 'below' })));
  // A screen reader reads out what is new here: in the list, messages come and go.
  const news = make('div', { id: 'news', class: 'hidden', role: 'log', 'aria-live': 'polite', 'aria-relevant': 'additions' });
  return make('section', { id: 'room' }, header, main, footer, news);
}

// A server that renders pages has no HTMLElement, but may import the module.
const Base = /** @type {new () => RoomElement} */ (globalThis.HTMLElement ?? class {});

export class ChatRoom extends Base {
  static observedAttributes = ['src', 'name', 'readonly', 'transparent', 'login', 'lang'];

  /** The phrases of each language. A page may change them before it makes elements. */
  static languages = languages;

  /** @type {UI} */
  #ui;
  /** @type {ItemList<Item>} */
  #list;
  #speaker = new Speaker('en');
  #phrases = /** @type {Words} */ ({});
  /** @type {AbortController | undefined} */
  #attached;
  // What comes from the modules that not every page loads.
  /** @type {Parts} */
  #parts = {};
  #again = '';

  /** @type {?Chat} */
  #chat = null;
  /** @type {StateFields} */
  #state = { state: 'closed' };
  // Whether there has been a connection, and when the last one was lost.
  #met = false;
  /** @type {?Date} */
  #away = null;
  #renaming = false;
  #draftOf = '';
  #ticker = 0;

  // The name that the visitor has chosen, what the server calls them, and whether only a login can be called that.
  #chosen = '';
  #user = '';
  #decided = false;
  // The visitor's names up to now.
  #names = new Set();
  // The clients of this tab, also from before a reload, and of the browser's other tabs.
  #mine = new Set(recall('sessionStorage', 'clients').split(' '));
  #others = new Set(recall('localStorage', 'clients').split(' '));

  // The order of an item is its number in the hub, after those from before the hub began anew.
  #epoch = '';
  #start = 0;
  #newest = 0;
  // The newest number in the history, and whether it is the first connection's.
  #head = 0;
  #first = true;
  #historyTimer = 0;
  // Messages by their order, and those without an answer by their id.
  /** @type {Map<number, Message>} */
  #shown = new Map();
  /** @type {Map<string, Message>} */
  #pending = new Map();
  // Messages by their elements.
  /** @type {WeakMap<Element, Message>} */
  #drawn = new WeakMap();

  #some = false;
  #unread = 0;
  /** @type {?Line} */
  #line = null;
  /** @type {string[]} */
  #said = [];

  constructor() {
    super();
    const root = this.attachShadow({ mode: 'open' }), room = build();
    dress(root, style);
    root.append(room);
    this.#ui = /** @type {any} */ (Object.fromEntries([room, ...room.querySelectorAll('[id]')].map((element) => [element.id, element])));
    this.#list = new ItemList(this.#ui.log, this.#ui.messages, {
      draw: (item, mark) => this.#draw(item, mark),
      mark: (item, previous) => this.#mark(item, previous),
      forget: (item) => this.#shown.delete(item.order),
    });
    this.#listen();
  }

  // ---- for the page ----

  /** The connection, to listen to and to ask. A change of `src` makes another one. */
  get chat() { return this.#chat; }

  get state() { return this.#chat?.state ?? 'closed'; }

  /** What the server calls the visitor; empty if it does not know them. */
  get user() { return this.#user; }

  get unread() { return this.#unread; }

  get src() { return this.getAttribute('src') ?? ''; }
  set src(url) { this.setAttribute('src', url); }

  get name() { return this.getAttribute('name'); }
  set name(name) {
    if (name === null) this.removeAttribute('name');
    else this.setAttribute('name', name);
  }

  get readOnly() { return this.hasAttribute('readonly'); }
  set readOnly(on) { this.toggleAttribute('readonly', on); }

  get transparent() { return this.hasAttribute('transparent'); }
  set transparent(on) { this.toggleAttribute('transparent', on); }

  /** Phrases instead of the element's own. */
  get phrases() { return this.#phrases; }
  set phrases(phrases) {
    this.#phrases = phrases;
    this.#speak();
  }

  /** Sends a message and shows it. Returns the id in `sent` or `failed`, or null if it cannot be sent now. */
  send(/** @type {string} */ text) {
    const said = text.trim();
    if (!said || !this.#chat) return null;
    const id = this.#chat.send(said);
    if (id === null) return null;
    /** @type {Message} */
    const item = {
      kind: 'message', order: Infinity, author: this.#user || this.#chosen, sender: '', text: tidy(said), said,
      time: new Date(), status: 'pending', arrives: true,
    };
    this.#pending.set(id, item);
    this.#eraseLine();
    this.#list.add(item);
    this.#list.toEnd();
    this.#showEmpty();
    return id;
  }

  /** Connects now, or again after `close`. */
  connect() {
    if (this.#chat) this.#chat.connect();
    else this.#enter();
  }

  close() {
    this.#chat?.close();
  }

  /** Asks who is here: a page of the list. */
  async who(/** @type {{ after?: string, limit?: number }} */ page = {}) {
    return (await this.#chat?.who(page)) ?? null;
  }

  focus(/** @type {FocusOptions} */ options = {}) {
    (this.readOnly || this.transparent ? this.#ui.log : this.#ui.text).focus(options);
  }

  /** Shows the newest message. */
  scrollToEnd() {
    this.#list.toEnd();
    this.#see();
  }

  // ---- as an element ----

  connectedCallback() {
    if (this.#attached) return; // it was moved
    this.#attached = new AbortController();
    const { signal } = this.#attached;
    addEventListener('pagehide', () => this.#keepDraft(true), { signal });
    addEventListener('storage', ({ key, newValue }) => {
      if (key === 'chat-room.clients') this.#recognize(newValue ?? '');
    }, { signal });
    document.addEventListener('visibilitychange', () => {
      if (document.hidden) return;
      this.#list.changed();
      this.#see();
    }, { signal });
    this.#present();
    this.#speak();
    this.#enter();
  }

  disconnectedCallback() {
    queueMicrotask(() => {
      if (this.isConnected) return;
      this.#attached?.abort();
      this.#attached = undefined;
      this.#leave();
    });
  }

  attributeChangedCallback(/** @type {string} */ name, /** @type {?string} */ before, /** @type {?string} */ now) {
    if (!this.#attached || before === now) return;
    if (name === 'src') this.#enter();
    else if (name === 'lang') this.#speak();
    else {
      this.#present();
      this.#rename();
    }
  }

  #listen() {
    const { log, messages, jump, connect, text, compose, bell } = this.#ui;
    log.addEventListener('scroll', () => this.#see(), { passive: true });
    log.addEventListener('keydown', (event) => {
      if (event.target !== log || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
      if (event.key === 'Home') this.#list.toStart();
      else if (event.key === 'End') this.#list.toEnd();
      else return;
      event.preventDefault();
    });
    messages.addEventListener('click', (/** @type {any} */ event) => {
      const item = this.#drawn.get(event.target.closest('.failed button')?.closest('.message'));
      if (!item) return;
      this.#sendAgain(item);
      text.focus();
    });
    jump.addEventListener('click', () => {
      this.scrollToEnd();
      this.focus();
    });
    connect.addEventListener('click', () => {
      this.connect();
      this.focus();
    });
    text.addEventListener('input', () => {
      this.#check();
      this.#keepDraft(false);
    });
    text.addEventListener('keydown', (event) => {
      // Enter also ends a Japanese or Chinese word. Safari shows that only in the key code.
      if (event.key !== 'Enter' || event.shiftKey || event.isComposing || event.keyCode === 229) return;
      event.preventDefault();
      this.#submit();
    });
    compose.addEventListener('submit', (event) => {
      event.preventDefault();
      this.#submit();
      text.focus();
    });
    bell.addEventListener('click', async () => (await this.#part('alerts'))?.toggle());
    if (recall('localStorage', 'notify') || recall('localStorage', 'sound')) this.#part('alerts');
  }

  /**
   * Loads a module that not every page needs. Resolves to nothing if it does not come.
   * @type {Load}
   */
  #part(name) {
    return this.#parts[name] ??= import(`./chat-room-${name}.js${this.#again}`)
      .then(({ default: Part }) => new Part(this.#ui, () => this.#speaker))
      .catch(() => {
        delete this.#parts[name];
        this.#again = `?${Date.now()}`; // Firefox never asks for the same address again
      });
  }

  // ---- the visitor ----

  /** Shows what the attributes say. */
  #present() {
    const { room } = this.#ui;
    room.classList.toggle('readonly', this.readOnly || this.transparent);
    room.classList.toggle('transparent', this.transparent);
    if (this.transparent) this.#part('overlay');
    const given = this.name;
    this.#chosen = given ? clean(given) : this.#chosen || clean(recall('localStorage', 'name')) || guest(this.#language);
    if (given === '') remember('localStorage', 'name', this.#chosen);
    this.#showName();
  }

  /** Shows the visitor's name, where the page wants that. */
  async #showName() {
    if (this.name === null && !this.#parts.name) return;
    const known = this.#met ? this.#user !== '' : this.name === '', shown = this.name !== null && known && (this.name === '' || this.#decided);
    (await this.#part('name'))?.show(this.#user || this.#chosen, shown, this.#decided, (name) => {
      this.#chosen = clean(name);
      remember('localStorage', 'name', this.#chosen);
      this.#present();
      this.#rename();
    });
  }

  get #language() {
    return this.closest('[lang]')?.getAttribute('lang') || navigator.language;
  }

  async #speak() {
    const tag = this.#language, speaker = await speakerOf(tag, this.#phrases);
    if (tag !== this.#language) return; // it speaks yet another one
    this.#speaker = speaker;
    this.#ui.room.lang = speaker.language;
    speak(this.#ui.room, speaker);
    this.#showTitle();
    this.#parts.people?.then((people) => people?.show());
    this.#showJump();
    this.#showState(this.#state);
    this.#check();
    this.#list.redraw();
  }

  #showTitle() {
    const { room, title } = this.#ui;
    let last = this.src.split(/[?#]/)[0].split('/').filter(Boolean).at(-1) ?? '';
    try { last = decodeURIComponent(last); } catch { /* a literal % */ }
    title.textContent = last;
    room.setAttribute('aria-label', this.#speaker.say('chat', { room: last }).trim());
  }

  // ---- the connection ----

  /** Returns the URL of the hub, with the visitor's name added to its query. */
  #address() {
    const url = new URL(this.src, document.baseURI);
    if (!/^(https?|wss?):$/.test(url.protocol)) throw new TypeError(`${url.protocol} is not the protocol of a hub`);
    if (this.name !== null) url.search = [url.search.slice(1), `name=${encodeURIComponent(this.#chosen)}`].filter(Boolean).join('&');
    return url;
  }

  /** Joins the room of `src`, and leaves the previous one. */
  #enter() {
    this.#leave();
    this.#met = false;
    this.#away = null;
    this.#first = true;
    [this.#epoch, this.#start, this.#newest, this.#head] = ['', 0, 0, 0];
    this.#user = '';
    this.#pending.clear();
    this.#shown.clear();
    this.#list.clear();
    this.#line = null;
    this.#setUnread(0);
    this.#parts.people?.then((people) => people?.hide());
    this.#present();
    this.#showTitle();
    this.#showEmpty();
    this.#say('');
    this.#draftOf = this.src;
    this.#ui.text.value = recall('sessionStorage', `draft.${this.#draftOf}`);
    this.#check();

    let chat;
    try {
      if (!this.src) throw new TypeError('there is no src');
      chat = new Chat(this.#address());
    } catch {
      // A script may set src at once.
      queueMicrotask(() => this.#chat || this.#showState({ state: 'closed' }));
      return;
    }
    this.#chat = chat;
    /** @type {Record<string, ?((event: any) => void)>} */
    const handlers = {
      state: this.#showState, open: this.#opened, sent: this.#sent, failed: this.#failed, missed: this.#missed,
      join: this.#change, leave: this.#change, presence: this.#change, close: null, error: null, refused: null,
    };
    for (const [type, handle] of Object.entries(handlers)) {
      chat.addEventListener(type, (event) => {
        if (chat !== this.#chat) return;
        handle?.call(this, event);
        this.#repeat(event);
      });
    }
    chat.addEventListener('message', (event) => {
      if (chat !== this.#chat) return;
      const { data, seq, time, client, user, own, replayed } = event, frame = { data, seq, time, client, user, own, replayed };
      if (this.dispatchEvent(Object.assign(new Event('message', { cancelable: true }), frame))) this.#receive(frame);
    });
    this.#showState({ state: chat.state });
  }

  #leave() {
    if (!this.#chat) return;
    this.#keepDraft(true);
    const left = this.#chat;
    this.#chat = null; // so that its last events are not heard
    left.close();
    clearInterval(this.#ticker);
    clearTimeout(this.#historyTimer);
  }

  #repeat(/** @type {Event} */ event) {
    const { isTrusted: _, ...fields } = Object.getOwnPropertyDescriptors(event);
    this.dispatchEvent(Object.defineProperties(new Event(event.type), fields));
  }

  /** Connects again under the visitor's name. */
  #rename() {
    const chat = this.#chat;
    if (!chat) return;
    const url = this.#address();
    if (new URL(chat.url).search === url.search) return;
    url.protocol = new URL(chat.url).protocol;
    chat.url = url;
    if (chat.state === 'closed') return;
    const waiting = [...this.#pending.values()];
    this.#renaming = true;
    chat.close();
    chat.connect();
    this.#renaming = false;
    for (const item of waiting) {
      if (item.code === 'closed') this.#sendAgain(item);
    }
  }

  #showState(/** @type {StateFields} */ frame) {
    const { state, retryIn, code, reason = '', status, offline } = frame;
    if (this.#renaming && state === 'closed') return;
    this.#state = frame;
    const { room, countdown, state: shown, trouble, pill } = this.#ui;
    clearInterval(this.#ticker);
    countdown.textContent = '';
    const label = offline && state !== 'closed' ? 'offline' : state === 'open' ? 'connected' : state === 'closed' ? 'disconnected'
      : this.#met ? 'reconnecting' : 'connecting';
    pill.dataset.state = offline && state === 'open' ? 'offline' : state;
    pill.title = code ? `${code} ${reason}`.trim() : '';
    setText(shown, this.#speaker.say(label));
    room.classList.toggle('closed', state === 'closed');
    for (const item of this.#pending.values()) this.#list.update(item);
    if (state !== 'open') this.#endHistory();
    if (state === 'waiting' && this.#met) this.#away ??= new Date();
    if (state === 'waiting' && retryIn !== undefined && !offline) this.#countDown(retryIn);
    if (state === 'open') {
      trouble.hidden = true;
      if (!this.#tooLong(this.#ui.text.value)) this.#say('');
    }
    if (status === 401) this.#trouble(['refused 401'], 'connectAgain', `401 ${reason}`, this.getAttribute('login') ?? location.href);
    else if (status || (state === 'closed' && (code || !this.#chat))) this.#explain(frame);
    else if (state === 'waiting') {
      const reading = this.readOnly || this.transparent;
      this.#trouble([reading ? 'notYetReading' : offline ? 'noNetwork' : this.#met ? 'lost' : 'notYet'], 'tryNow');
    } else if (state === 'open' && offline) this.#trouble(['noNetwork'], 'tryNow');
  }

  async #explain(/** @type {StateFields} */ frame) {
    const { state, code = '', reason = '', status } = frame, exact = `${status ?? code} ${reason}`.trim();
    const keys = (await this.#part('more'))?.why(frame, exact) ?? [];
    if (frame !== this.#state) return; // it has changed meanwhile
    this.#trouble([...keys, 'refused'], state === 'closed' ? 'connectAgain' : 'tryNow', exact);
  }

  #countDown(/** @type {number} */ retryIn) {
    const due = Date.now() + retryIn;
    const tick = () => {
      this.#ui.countdown.textContent = this.#speaker.say('inSeconds', { n: Math.max(1, Math.ceil((due - Date.now()) / 1000)) });
    };
    tick();
    this.#ticker = setInterval(tick, 500);
  }

  #trouble(/** @type {string[]} */ keys, /** @type {string} */ action, detail = '', signIn = '') {
    const { trouble, why, login, connect } = this.#ui;
    const text = this.#speaker.first(...keys) + (detail && ` (${detail.trim()})`);
    if (trouble.hidden || why.textContent !== text) this.#announce(text);
    why.textContent = text;
    connect.textContent = this.#speaker.say(action);
    login.hidden = !signIn;
    const url = new URL(signIn, document.baseURI);
    login.href = /^https?:$/.test(url.protocol) ? url.href : location.href;
    trouble.hidden = false;
  }

  #opened(/** @type {Events['open']} */ hello) {
    if (hello.epoch !== this.#epoch) [this.#epoch, this.#start] = [hello.epoch ?? '', this.#newest];
    this.#user = hello.user ?? '';
    this.#names.add(this.#user);
    const url = new URL(this.#chat?.url ?? location.href);
    this.#decided = this.#user !== '' && ![...url.searchParams.values()].includes(this.#user);
    if (hello.client) {
      this.#mine.add(hello.client);
      remember('sessionStorage', 'clients', [...this.#mine].slice(-50).join(' '));
      this.#others = new Set(recall('localStorage', 'clients').split(' ')).add(hello.client);
      remember('localStorage', 'clients', [...this.#others].slice(-200).join(' '));
    }
    if (hello.read_only) this.readOnly = true;
    this.#first = !this.#met;
    this.#head = hello.head ?? 0;
    if (hello.replay > 0) {
      this.#list.hold();
      this.#historyTimer = setTimeout(() => this.#endHistory(), HISTORY_WAIT);
    }
    if (hello.resumed !== false) this.#away = null; // otherwise #missed still needs it
    this.#met = true;
    this.#showName();
    this.#ask();
  }

  #endHistory() {
    clearTimeout(this.#historyTimer);
    this.#list.release();
  }

  async #missed(/** @type {Events['missed']} */ event) {
    this.#ask();
    const n = event.count, away = this.#away;
    if (!n && !event.restarted) return; // only news of who is here is lost
    this.#away = null;
    /** @type {Notice} */
    const notice = { kind: 'notice', order: this.#newest, text: this.#speaker.say(n ? 'missed' : 'anew', { n }), missed: true };
    this.#list.add(notice);
    this.#showEmpty();
    notice.more = (await this.#part('more'))?.when(event, away) ?? '';
    this.#list.update(notice);
    this.#announce(`${notice.text}: ${notice.more}`);
  }

  // ---- who is here ----

  /** Asks who is here. If the server has join_leave, it announces later changes by itself. */
  async #ask() {
    const asked = this.#chat, page = await asked?.who({ limit: MAX_LISTED });
    const people = page && await this.#part('people');
    if (people && asked === this.#chat) people.set(page, this.#user);
  }

  /** Shows who came and went. */
  async #change(/** @type {PeopleEvent} */ event) {
    const told = this.#chat, people = await this.#part('people');
    if (told !== this.#chat || !people) return;
    if (people.change(event, this.#list, this.#newest, this.#names)) this.#ask();
    this.#showEmpty();
  }

  #nameOf(/** @type {string} */ user) {
    return legible(user) || this.#speaker.say('somebody');
  }

  // ---- sending ----

  /** Sends what is in the text box, or leaves it there. */
  #submit() {
    const { text } = this.#ui;
    if (!text.value.trim() || this.#tooLong(text.value)) return;
    if (this.send(text.value) === null) {
      this.#say(this.#speaker.say(this.state === 'closed' ? 'notSentClosed' : 'notSentFull'));
      return;
    }
    text.value = '';
    this.#say('');
    this.#check();
    this.#keepDraft(false);
    this.#see();
  }

  /** Returns by how many characters, or bytes, a text is too long. */
  #tooLong(/** @type {string} */ text) {
    const said = text.trim(), most = this.#chat?.maxMessageSize ?? Infinity;
    return Math.max(0, said.length - MAX_TEXT, bytes(JSON.stringify(said)) + AROUND - most);
  }

  #sent(/** @type {Events['sent']} */ { id, seq, time, epoch = this.#epoch }) {
    const item = this.#pending.get(id);
    // The hub may have published it before it began anew.
    if (item) this.#confirm(item, epoch === this.#epoch ? this.#start + seq : this.#newest, time);
  }

  #confirm(/** @type {Message} */ item, /** @type {number} */ order, /** @type {Date} */ time) {
    for (const [id, other] of this.#pending) if (other === item) this.#pending.delete(id);
    this.#newest = Math.max(this.#newest, order);
    this.#shown.set(order, item);
    this.#list.update(Object.assign(item, { status: 'sent', code: undefined, order, time }));
  }

  async #failed(/** @type {Events['failed']} */ { id, code }) {
    const item = this.#pending.get(id), aloud = !this.#renaming;
    if (!item) return;
    this.#pending.delete(id);
    this.#list.update(Object.assign(item, { status: 'gone', code, order: this.#newest }));
    if (code !== 'closed' && code !== 'unknown') await this.#part('more'); // there is a server
    this.#list.update(item);
    if (aloud) this.#announce(`${this.#failure(code)} ${item.text}`);
  }

  #failure(/** @type {string} */ code = '') {
    return this.#speaker.first(`failed ${code}`, 'failed');
  }

  #sendAgain(/** @type {Message} */ item) {
    if (this.send(item.said ?? item.text) !== null) this.#list.remove(item);
  }

  #say(/** @type {string} */ hint) {
    setText(this.#ui.hint, hint);
  }

  #check() {
    const { text } = this.#ui, over = this.#tooLong(text.value), was = text.ariaInvalid === 'true';
    text.ariaInvalid = String(over > 0);
    if (over > 0) this.#say(this.#speaker.say('tooLong', { n: over }));
    else if (was) this.#say('');
  }

  /** Stores the draft, with the messages that still wait if the visitor leaves. */
  #keepDraft(/** @type {boolean} */ leaving) {
    const waiting = leaving ? [...this.#pending.values()].map(({ said }) => said) : [];
    remember('sessionStorage', `draft.${this.#draftOf}`, [...waiting, this.#ui.text.value].filter(Boolean).join('\n'));
  }

  // ---- receiving ----

  #receive(/** @type {MessageFields} */ { data, seq, time, client, user, own, replayed }) {
    if (typeof data !== 'string') return;
    const order = this.#start + seq;
    if (seq >= this.#head) this.#endHistory();
    if (this.#shown.has(order)) return; // our own: `sent` came first, or the name has changed
    const ours = own || this.#isOurs(client, user);
    // Our own messages return in their order; those that may not have arrived, from the history.
    const waiting = own && this.#unanswered(data.trim());
    if (waiting) {
      this.#confirm(waiting, order, time);
      return;
    }
    const text = tidy(data);
    if (!text) return;
    const news = !ours && !(replayed && this.#first);
    const author = client ? this.#nameOf(user) : this.#speaker.say('announcement');
    /** @type {Message} */
    const item = {
      kind: 'message', order, author, sender: ours ? '' : user || client || '', client, user, text, time, arrives: !replayed,
      status: ours ? 'sent' : client ? 'theirs' : 'official',
    };
    if (news) this.#note(item);
    this.#newest = Math.max(this.#newest, order);
    this.#shown.set(order, item);
    this.#list.add(item);
    this.#showEmpty();
    if (news) this.#announce(`${author}: ${text}`);
  }

  /** Learns of the browser's other clients, whose messages may have come before. */
  #recognize(/** @type {string} */ clients) {
    for (const client of clients.split(' ')) this.#others.add(client);
    for (const item of this.#list) {
      if (item.status !== 'theirs' || !this.#isOurs(item.client, item.user)) continue;
      this.#list.update(Object.assign(item, { status: 'sent', sender: '' }));
    }
  }

  /** Whether a message is from this tab, from another one under one of our names, or of our login. */
  #isOurs(/** @type {string} */ client = '', /** @type {string} */ user = '') {
    if (!client) return false; // the site itself
    return this.#mine.has(client) || (this.#others.has(client) && this.#names.has(user)) || (this.#decided && user === this.#user);
  }

  /** Finds a message from here that has this text and no answer. */
  #unanswered(/** @type {string} */ said) {
    for (const item of [...this.#pending.values(), ...this.#list]) {
      if (item.kind === 'message' && item.said === said && (item.status === 'pending' || item.code === 'unknown')) return item;
    }
    return null;
  }

  /** What an item shows of the one before it. */
  #mark(/** @type {Item} */ item, /** @type {Item | undefined} */ previous) {
    if (item.kind !== 'message' || previous?.kind !== 'message') return 'timed';
    const follows = previous.sender === item.sender && (previous.status === 'official') === (item.status === 'official')
      && item.time.getTime() - previous.time.getTime() < TOGETHER;
    const timed = !follows || previous.time.getMinutes() !== item.time.getMinutes();
    return `${follows ? 'follows ' : ''}${timed ? 'timed' : ''}`;
  }

  #draw(/** @type {Item} */ item, /** @type {string} */ mark) {
    if (item.kind === 'line') return make('li', { class: 'unread' }, this.#speaker.say('unread'));
    if (item.kind === 'notice') {
      const body = make('p', { dir: 'auto' }, item.text);
      if (item.more) body.append(make('small', {}, item.more));
      return make('li', { class: item.missed ? 'notice missed' : 'notice' }, body);
    }
    return this.#bubble(item, mark.includes('follows'), mark.includes('timed'));
  }

  #bubble(/** @type {Message} */ item, /** @type {boolean} */ follows, /** @type {boolean} */ timed) {
    const { author, status, time } = item, speaker = this.#speaker, ours = /pending|sent|gone/.test(status);
    const name = make('bdi', { class: 'name' }, ours ? speaker.say('you') : author);
    const from = make('p', { class: 'from' }, name);
    if (status === 'official') from.prepend(icon(16, 'M2 6.500v3h2.500L11 13V3L4.500 6.500zM13 6v4'));
    const when = make('p', { class: 'when' });
    if (timed) when.append(make('time', { datetime: time.toISOString() }, speaker.clock(time)));
    if (status === 'sent') when.append(make('span', { role: 'img', 'aria-label': speaker.say('sent') }, timed ? ' ✓' : '✓'));
    if (status === 'pending') when.append(`${timed ? ' · ' : ''}${speaker.say(this.#state.state === 'open' ? 'sending' : 'waiting')}`);
    const text = make('p', { class: 'text', dir: 'auto' }, item.text);
    if (/:\/\/|www\.|@/i.test(item.text)) this.#part('links').then((links) => links?.link(text));
    const bubble = make('div', { class: 'bubble', part: ours ? 'bubble own-bubble' : 'bubble', title: speaker.exactly(time) }, from, text, when);
    if (status === 'gone') {
      bubble.append(make('p', { class: 'failed' }, make('span', {}, this.#failure(item.code)), ' ',
        make('button', { type: 'button' }, speaker.say('sendAgain'))));
    }
    const classes = ['message', ours && 'mine', status, follows && 'follows', item.arrives && 'arrives'].filter(Boolean).join(' ');
    const element = make('li', { class: classes }, bubble);
    if (!ours && status !== 'official') element.prepend(avatar(author));
    // Strangers without a name have the color of their connection.
    element.style.setProperty('--hue', String(hue(author === speaker.say('somebody') ? item.sender : author)));
    item.arrives = false;
    this.#drawn.set(element, item);
    return element;
  }

  #showEmpty() {
    const some = this.#list.size > 0;
    if (some !== this.#some) this.#some = this.#ui.empty.hidden = some; // not for each message of a history
  }

  /** Has a screen reader read something out. */
  #announce(/** @type {string} */ text) {
    if (this.#said.push(text) > 1) return;
    setTimeout(() => {
      const { news } = this.#ui;
      const said = this.#said.splice(0);
      // Nobody can listen to many at once.
      const lines = said.length > 3 ? [this.#speaker.say('newMessages', { n: said.length }), said[said.length - 1]] : said;
      const read = lines.map((line) => make('p', {}, line.slice(0, 500)));
      news.append(...read);
      setTimeout(() => read.forEach((line) => line.remove()), 5000); // or one would find them twice
    }, 100);
  }

  // ---- what is new ----

  /** Draws attention to a message that the visitor may not see. */
  #note(/** @type {Message} */ item) {
    if (document.hidden || !document.hasFocus()) this.#parts.alerts?.then((alerts) => alerts?.alert(item, `chat-room ${this.src}`));
    if (!document.hidden && this.#list.atEnd) return;
    if (!this.#unread) {
      this.#eraseLine();
      this.#line = { kind: 'line', order: item.order - 0.5 };
      this.#list.add(this.#line);
    }
    this.#setUnread(this.#unread + 1);
  }

  #eraseLine() {
    if (this.#line) this.#list.remove(this.#line);
    this.#line = null;
  }

  #see() {
    if (this.#unread && !document.hidden && this.#list.atEnd) this.#setUnread(0);
    this.#showJump();
  }

  #setUnread(/** @type {number} */ count) {
    if (count === this.#unread) return;
    this.#unread = count;
    this.#showJump();
    this.dispatchEvent(Object.assign(new Event('unread'), { count }));
  }

  #showJump() {
    const { jump } = this.#ui, n = this.#unread;
    jump.hidden = this.#list.atEnd || !(n || this.#list.farAway);
    setText(jump.children[0], this.#speaker.say(n ? 'newMessages' : 'jump', { n }));
  }
}

globalThis.customElements?.define('chat-room', ChatRoom);
