/**
 * A chat to put into a page:
 *
 *     <script type="module" src="/chat-client/chat-room.js"></script>
 *     <chat-room src="/chat/lobby"></chat-room>
 *
 * It needs no style and no script of the page, and nothing that a strict Content-Security-Policy forbids.
 */
import { Chat } from './chat.js';
import { ItemList } from './chat-room-list.js';
import { dress } from './chat-room-style.js';
import { MAX_NAME, MAX_TEXT, bytes, clean, hue, legible, linked, tidy } from './chat-room-text.js';
import { Speaker, guest, languages, speakerOf } from './chat-room-words.js';

/** Within this many milliseconds, messages of one author form one group. */
const TOGETHER = 120_000;

/** The most people in the list; nobody reads more names. */
const MAX_LISTED = 200;

/** The bytes of a frame that are not of its text. */
const AROUND = 150;

/** How long to wait for the rest of a history, in milliseconds, before what there is of it is shown. */
const HISTORY_WAIT = 800;

/**
 * @typedef {object} Message
 * @property {'message'} kind
 * @property {number} order
 * @property {string} author as it is shown
 * @property {string} sender tells authors apart who are shown alike
 * @property {string} [client] and `user`: as the server has them
 * @property {string} [user]
 * @property {string} text as it is shown
 * @property {Date} time
 * @property {'theirs' | 'pending' | 'sent' | 'gone' | 'official'} status
 * @property {string} [said] the text of a message from here, as it was sent
 * @property {string} [code] why it was not sent
 * @property {boolean} [arrives] whether it has just come
 *
 * @typedef {object} Notice
 * @property {'notice'} kind
 * @property {number} order
 * @property {string} text
 * @property {string} [more]
 * @property {boolean} [missed]
 * @property {{ joined: Set<string>, left: Set<string> }} [changes] who came and went
 *
 * @typedef {object} Line stands before the first message that nobody has seen
 * @property {'line'} kind
 * @property {number} order
 *
 * @typedef {Message | Notice | Line} Item
 *
 * @typedef {Record<string, any>} Frame the fields of an event of a Chat
 */

/** @typedef {'localStorage' | 'sessionStorage'} Storage */

/**
 * Reads a storage, if the browser allows it.
 * @param {Storage} storage
 * @param {string} key
 */
function recall(storage, key) {
  try { return window[storage].getItem(`chat-room.${key}`) ?? ''; } catch { return ''; }
}

/**
 * Writes a storage, if the browser allows it: it is only a convenience.
 * @param {Storage} storage
 * @param {string} key
 * @param {string} value
 */
function remember(storage, key, value) {
  try { window[storage].setItem(`chat-room.${key}`, value); } catch { /* see above */ }
}

/**
 * Makes an element with attributes and children.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, string>} [attributes]
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/**
 * Makes an icon of lines, from paths and their classes.
 * @param {number} size
 * @param {...(string | [string, string])} paths
 */
function icon(size, ...paths) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  svg.setAttribute('viewBox', `0 0 ${size} ${size}`);
  svg.setAttribute('aria-hidden', 'true');
  for (const each of paths) {
    const [d, name] = typeof each === 'string' ? [each, ''] : each;
    const path = document.createElementNS(svg.namespaceURI, 'path');
    path.setAttribute('d', d);
    if (name) path.setAttribute('class', name);
    svg.append(path);
  }
  return svg;
}

/** @param {Date} time */
const minute = (time) => Math.floor(time.getTime() / 60_000);

/**
 * @typedef {import('./chat-types.js').Events & { unread: Event & { count: number } }} RoomEvents
 *
 * @typedef {<K extends keyof RoomEvents>(type: K, listener: (event: RoomEvents[K]) => void,
 *   options?: boolean | AddEventListenerOptions) => void} RoomListen
 *
 * @typedef {Omit<HTMLElement, 'addEventListener' | 'removeEventListener' | 'focus'> & {
 *   addEventListener: RoomListen & HTMLElement['addEventListener'],
 *   removeEventListener: RoomListen & HTMLElement['removeEventListener'],
 * }} RoomElement an element that knows its events
 */

// Where there is no document, on a server that renders pages, the module can at least be imported.
const Base = /** @type {new () => RoomElement} */ (globalThis.HTMLElement ?? class {});

/**
 * A chat. Attributes:
 *
 * - `src`: the URL of a hub.
 * - `name`: the name of the visitor, where the server takes the user from the query (`user {query.name}`). If it is empty,
 *   visitors choose for themselves.
 * - `readonly`: nothing can be written.
 * - `transparent`: only messages, for an overlay on a video.
 * - `login`: the page where a visitor signs in after the server has refused them with 401. Default: this page.
 * - `lang`: `en`, `de`, `fr` or `es`; otherwise the language of the page, or of the browser.
 *
 * Slots: `header` for what stands instead of the room's name, `start` and `actions` for what stands before and after it,
 * `empty` for what stands where nobody has said anything, `below` for what stands below the text box. The parts are `header`, `title`, `messages`, `bubble`, `own-bubble`, `text`, `send` and
 * `people`.
 *
 * Events: all those of `Chat`, with the same fields. `message` comes before the message is shown, and `preventDefault` keeps
 * it away. `unread` has `count`: how many messages came that the visitor has not seen.
 */
export class ChatRoom extends Base {
  static observedAttributes = ['src', 'name', 'readonly', 'transparent', 'login', 'lang'];

  /** The phrases of each language. A page may change them, and add languages, before it makes elements. */
  static languages = languages;

  #ui;
  /** @type {ItemList<Item>} */
  #list;
  #speaker = new Speaker('en');
  /** @type {import('./chat-room-words.js').Words} */
  #phrases = {};
  // Put the phrases of the language into the elements.
  /** @type {(() => void)[]} */
  #labels = [];
  // Ends what listens to the page.
  /** @type {?AbortController} */
  #attached = null;

  /** @type {?Chat} */
  #chat = null;
  /** @type {Frame} */
  #state = { state: 'closed' };
  #offline = false;
  // Whether this room has had a connection, and when the last one was lost.
  #met = false;
  /** @type {?Date} */
  #away = null;
  #renaming = false;
  // The room of the draft.
  #draftOf = '';
  // Counts down to the next attempt.
  #ticker = 0;

  // The visitor: the name that they have chosen, what the server calls them, and whether it does so on its own account.
  #chosen = '';
  #user = '';
  #decided = false;
  // The names that this element has had. It does not announce them.
  #names = new Set();
  // The ids of this tab's clients, also from before a reload, and those of the browser's other tabs.
  #mine = new Set(recall('sessionStorage', 'clients').split(' '));
  #others = new Set(recall('localStorage', 'clients').split(' '));

  // Each item has an order: its number in the hub, which continues when the hub starts anew. Messages that wait to be sent
  // stand at the end.
  #epoch = '';
  #start = 0;
  #newest = 0;
  // The number of the newest message in the history, and whether it is the history of the first connection.
  #head = 0;
  #first = true;
  #historyTimer = 0;
  // The messages of the list, by their order, and those without an answer, by their id.
  /** @type {Map<number, Message>} */
  #shown = new Map();
  /** @type {Map<string, Message>} */
  #pending = new Map();

  // The number of connections of each person, and whether there are more people.
  /** @type {Map<string, number>} */
  #people = new Map();
  #more = false;

  #unread = 0;
  /** @type {?Line} */
  #line = null;
  // Messages to read out with the next frame.
  /** @type {string[]} */
  #said = [];
  /** @type {?AudioContext} */
  #audio = null;

  constructor() {
    super();
    const root = this.attachShadow({ mode: 'open' });
    dress(root);
    this.#ui = this.#build();
    root.append(this.#ui.room);
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

  /** The state of the connection. */
  get state() { return this.#chat?.state ?? 'closed'; }

  /** What the server calls the visitor; empty if it does not know them. */
  get user() { return this.#user; }

  /** How many messages the visitor has not seen. */
  get unread() { return this.#unread; }

  get src() { return this.getAttribute('src') ?? ''; }
  set src(url) { this.setAttribute('src', url); }

  get name() { return this.getAttribute('name'); }
  set name(name) { this.#reflect('name', name); }

  get readOnly() { return this.hasAttribute('readonly'); }
  set readOnly(on) { this.#reflect('readonly', on ? '' : null); }

  get transparent() { return this.hasAttribute('transparent'); }
  set transparent(on) { this.#reflect('transparent', on ? '' : null); }

  /** Phrases that stand instead of the element's own, by their names in chat-room-words.js. */
  get phrases() { return this.#phrases; }
  set phrases(phrases) {
    this.#phrases = phrases;
    this.#speak();
  }

  /**
   * Sends a message and shows it.
   * @param {string} text
   * @returns {?string} the id in `sent` or `failed`; null if it cannot be sent now
   */
  send(text) {
    const said = text.trim();
    if (!said || !this.#chat) return null;
    const id = this.#chat.send(said);
    if (id === null) return null;
    /** @type {Message} */
    const item = {
      kind: 'message', order: Infinity, author: this.#user || this.#chosen, sender: 'me', text: tidy(said), said,
      time: new Date(), status: 'pending', arrives: true,
    };
    this.#pending.set(id, item);
    this.#eraseLine();
    this.#list.add(item);
    this.#list.toEnd();
    this.#showEmpty();
    return id;
  }

  /** Connects now instead of later, or again after `close`. */
  connect() {
    if (this.#chat) this.#chat.connect();
    else this.#enter();
  }

  /** Closes the connection until `connect` is called. */
  close() {
    this.#chat?.close();
  }

  /**
   * Asks who is here: a page of the list.
   * @param {{ after?: string, limit?: number }} [page]
   */
  async who(page) {
    return (await this.#chat?.who(page)) ?? null;
  }

  /**
   * Puts the focus into the text box.
   * @param {FocusOptions} [options]
   */
  focus(options) {
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
    document.addEventListener('pointerdown', (event) => {
      const path = event.composedPath(), { who, people, bell, alerts } = this.#ui;
      if (![who, people, bell, alerts].some((node) => path.includes(node))) this.#open(null);
    }, { signal });
    this.#present();
    this.#speak();
    this.#enter();
  }

  disconnectedCallback() {
    queueMicrotask(() => {
      if (this.isConnected) return;
      this.#attached?.abort();
      this.#attached = null;
      this.#leave();
    });
  }

  /**
   * @param {string} name
   * @param {?string} before
   * @param {?string} now
   */
  attributeChangedCallback(name, before, now) {
    if (!this.#attached || before === now) return;
    if (name === 'src') this.#enter();
    else if (name === 'lang') this.#speak();
    else {
      this.#present();
      if (name === 'name') this.#rename();
    }
  }

  /**
   * @param {string} name
   * @param {?string} value
   */
  #reflect(name, value) {
    if (value === null) this.removeAttribute(name);
    else this.setAttribute(name, value);
  }

  /** Makes everything below the shadow root. */
  #build() {
    /**
     * Has an element say a phrase, as its text or as an attribute.
     * @template {Element} E
     * @param {E} element
     * @param {string} key
     * @param {string} [attribute]
     */
    const says = (element, key, attribute) => {
      this.#labels.push(() => {
        if (attribute) element.setAttribute(attribute, this.#speaker.say(key));
        else element.textContent = this.#speaker.say(key);
      });
      return element;
    };
    const title = make('h2', { id: 'title', part: 'title', dir: 'auto' });
    const state = make('span', { id: 'state', role: 'status' });
    // The countdown is outside the status, or a screen reader would read it out every second.
    const countdown = make('span', { id: 'countdown', 'aria-hidden': 'true' });
    const pill = make('p', { class: 'state', 'data-state': 'connecting' }, make('span', { class: 'dot' }), state, countdown);
    const present = make('span', { id: 'present' });
    const who = make('button', { type: 'button', id: 'who', 'aria-expanded': 'false', 'aria-controls': 'people', hidden: '' },
      icon(20, 'M10.5 6.5a3 3 0 1 1-6 0 3 3 0 0 1 6 0M2 16.5c0-3 2.4-5 5.5-5s5.5 2 5.5 5M13 3.8a3 3 0 0 1 0 5.4m2 2.8c1.9.7 3 2.3 3 4.5'),
      says(make('span', { class: 'hidden' }), 'people'), present);
    const bell = make('button', { type: 'button', id: 'bell', 'aria-expanded': 'false', 'aria-controls': 'alerts' },
      icon(20, 'M5 13.5V9a5 5 0 0 1 10 0v4.5l1.2 1.5H3.8zM8.5 17.3a1.8 1.8 0 0 0 3 0', ['M2 8c.2-2 1-3.600 2.400-4.800M18 8c-.2-2-1-3.600-2.400-4.800', 'waves']),
      says(make('span', { class: 'hidden' }), 'alerts'));
    says(who, 'people', 'title');
    says(bell, 'alerts', 'title');

    const messages = make('ol', { id: 'messages', role: 'list' });
    const log = make('div', { id: 'log', part: 'messages', role: 'group', tabindex: '0' }, messages);
    says(log, 'messages', 'aria-label');
    const empty = make('div', { id: 'empty' }, make('slot', { name: 'empty' },
      says(make('p', { class: 'heading' }), 'emptyTitle'), says(make('p'), 'emptyText')));
    const jumpText = make('span');
    const jump = make('button', { type: 'button', id: 'jump', hidden: '' }, jumpText, icon(16, 'm4 6 4 4 4-4'));

    const why = make('p', { id: 'why' });
    const login = says(make('a', { id: 'login', hidden: '' }), 'signIn');
    const again = make('button', { type: 'button', id: 'connect' });
    const trouble = make('div', { id: 'trouble', hidden: '' }, why, login, again);
    const hint = make('p', { id: 'hint', role: 'status' });
    const text = make('textarea', { id: 'text', part: 'text', rows: '1', enterkeyhint: 'send', 'aria-describedby': 'help hint' });
    says(text, 'write', 'placeholder');
    const send = make('button', { type: 'submit', id: 'send', part: 'send' }, icon(24, 'M12 19V5m-6.5 6.5L12 5l6.5 6.5'),
      says(make('span', { class: 'hidden' }), 'send'));
    says(send, 'send', 'title');
    const compose = make('form', { id: 'compose', autocomplete: 'off' },
      says(make('label', { class: 'hidden', for: 'text' }), 'message'), text, send);
    const name = make('input', { id: 'name', autocomplete: 'nickname', autocapitalize: 'words', spellcheck: 'false', enterkeyhint: 'done' });
    const me = make('label', { id: 'me', hidden: '' }, says(make('span'), 'youAre'), ' ', name);
    const count = make('span', { id: 'count', hidden: '' });

    const listTitle = make('p', { id: 'people-title', class: 'heading' });
    const listed = make('ul', { role: 'list' });
    const others = says(make('p', { id: 'others', hidden: '' }), 'more');
    const people = make('div', { id: 'people', class: 'panel', part: 'people', role: 'group', 'aria-labelledby': 'people-title', tabindex: '-1' },
      listTitle, listed, others);
    const notify = make('input', { type: 'checkbox', id: 'notify' }), sound = make('input', { type: 'checkbox', id: 'sound' });
    const alertsHint = says(make('p'), 'alertsHint');
    const alerts = make('div', { id: 'alerts', class: 'panel', role: 'group', 'aria-labelledby': 'alerts-title', tabindex: '-1' },
      says(make('p', { id: 'alerts-title', class: 'heading' }), 'alerts'),
      make('label', {}, notify, says(make('span'), 'notify')), make('label', {}, sound, says(make('span'), 'sound')), alertsHint);

    // Messages come and go in the list as the reader scrolls, so a screen reader reads out what is new from here.
    const news = make('div', { id: 'news', class: 'hidden', role: 'log', 'aria-live': 'polite', 'aria-relevant': 'additions' });
    const room = make('section', { id: 'room' },
      make('div', { id: 'header', part: 'header' },
        make('slot', { name: 'start' }), make('div', { id: 'where' }, make('slot', { name: 'header' }, title), pill), bell, who, make('slot', { name: 'actions' })),
      alerts,
      make('div', { id: 'main' }, empty, log, jump),
      make('div', { id: 'footer' }, trouble, hint, compose,
        make('div', { id: 'below' }, me, says(make('span', { id: 'help' }), 'help'), count, make('slot', { name: 'below' }))),
      people, news);
    return {
      room, title, state, countdown, pill, who, present, bell, log, messages, empty, jump, jumpText, trouble, why, login, again,
      hint, text, compose, me, name, count, people, listTitle, listed, others, alerts, notify, sound, alertsHint, news,
    };
  }

  /** Listens to what is below the shadow root. */
  #listen() {
    const { room, log, messages, jump, again, text, compose, name, who, people, bell, alerts, notify, sound } = this.#ui;
    log.addEventListener('scroll', () => this.#see(), { passive: true });
    log.addEventListener('keydown', (event) => {
      if (event.target !== log || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
      if (event.key === 'Home') this.#list.toStart();
      else if (event.key === 'End') this.#list.toEnd();
      else return;
      event.preventDefault();
    });
    messages.addEventListener('click', (event) => {
      const button = /** @type {Element} */ (event.target).closest('.failed button');
      const item = button && this.#drawn.get(/** @type {Element} */ (button.closest('.message')));
      if (!item) return;
      this.#sendAgain(item);
      text.focus();
    });
    jump.addEventListener('click', () => {
      this.scrollToEnd();
      this.focus();
    });
    again.addEventListener('click', () => {
      this.connect();
      this.focus();
    });
    text.addEventListener('input', () => {
      this.#count();
      this.#keepDraft(false);
    });
    text.addEventListener('keydown', (event) => {
      // Enter also ends the composition of a Japanese or Chinese word. Safari shows that only in the key code.
      if (event.key !== 'Enter' || event.shiftKey || event.isComposing || event.keyCode === 229) return;
      event.preventDefault();
      this.#submit();
    });
    compose.addEventListener('submit', (event) => {
      event.preventDefault();
      this.#submit();
      text.focus();
    });
    name.maxLength = MAX_NAME;
    name.addEventListener('change', () => {
      this.#chosen = name.value = clean(name.value) || guest(this.#language);
      remember('localStorage', 'name', this.#chosen);
      this.#rename();
    });
    name.addEventListener('keydown', (event) => {
      if (event.key !== 'Enter' || event.isComposing) return;
      event.preventDefault(); // or Enter would also act on the text box
      text.focus();
    });
    who.addEventListener('click', () => this.#open(people.classList.contains('open') ? null : people));
    bell.addEventListener('click', () => this.#open(alerts.classList.contains('open') ? null : alerts));
    room.addEventListener('keydown', (event) => {
      if (event.key !== 'Escape') return;
      const button = people.classList.contains('open') ? who : alerts.classList.contains('open') ? bell : null;
      this.#open(null);
      button?.focus();
    });
    notify.checked = recall('localStorage', 'notify') === 'on' && globalThis.Notification?.permission === 'granted';
    sound.checked = recall('localStorage', 'sound') === 'on';
    notify.addEventListener('change', () => this.#askToNotify());
    sound.addEventListener('change', () => {
      remember('localStorage', 'sound', sound.checked ? 'on' : '');
      if (sound.checked) this.#beep(); // lets the visitor hear it
      this.#showBell();
    });
    this.#showBell();
  }

  /** Opens a panel, and closes the others. */
  #open(/** @type {?HTMLElement} */ panel) {
    const { who, people, bell, alerts } = this.#ui;
    for (const [button, each] of /** @type {const} */ ([[who, people], [bell, alerts]])) {
      each.classList.toggle('open', each === panel);
      button.setAttribute('aria-expanded', String(each === panel));
    }
    panel?.focus({ preventScroll: true });
  }

  /** Shows what the attributes say. */
  #present() {
    const { room, me, name } = this.#ui;
    room.classList.toggle('readonly', this.readOnly || this.transparent);
    room.classList.toggle('transparent', this.transparent);
    const given = this.name;
    this.#chosen = given ? clean(given) : this.#chosen || clean(recall('localStorage', 'name')) || guest(this.#language);
    name.value = this.#user || this.#chosen;
    me.hidden = given === null || given !== '';
    if (given === '') remember('localStorage', 'name', this.#chosen);
  }

  get #language() {
    return this.closest('[lang]')?.getAttribute('lang') || navigator.language;
  }

  /** Speaks the language of the element, the page or the browser. */
  async #speak() {
    const tag = this.#language, speaker = await speakerOf(tag, this.#phrases);
    if (tag !== this.#language) return; // it speaks yet another one
    this.#speaker = speaker;
    this.#ui.room.lang = this.#speaker.language;
    for (const label of this.#labels) label();
    this.#showTitle();
    this.#showPeople();
    this.#showJump();
    this.#showState(this.#state);
    this.#count();
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

  /** Returns the URL of the hub, with the visitor's name in its query. The rest of the query stays as it is. */
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
    this.#people.clear();
    this.#ui.who.hidden = true;
    this.#ui.room.classList.remove('listed');
    this.#present();
    this.#showPeople();
    this.#showTitle();
    this.#showEmpty();
    this.#say('');
    this.#draftOf = this.src;
    this.#ui.text.value = recall('sessionStorage', `draft.${this.#draftOf}`);
    this.#count();

    /** @type {Chat} */
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
    /** @type {Record<string, (frame: Frame) => void>} */
    const handlers = {
      state: (frame) => this.#showState(frame),
      open: (frame) => this.#opened(frame),
      sent: (frame) => this.#sent(frame),
      failed: (frame) => this.#failed(frame),
      missed: (frame) => this.#missed(frame),
      join: ({ user, clients }) => this.#change([user], [], clients),
      leave: ({ user, clients }) => this.#change([], [user], clients),
      presence: ({ joined = [], left = [], clients }) => this.#change(joined, left, clients),
    };
    for (const type of ['state', 'open', 'close', 'message', 'sent', 'failed', 'missed', 'join', 'leave', 'presence', 'error', 'refused']) {
      chat.addEventListener(type, (event) => {
        if (chat !== this.#chat) return;
        if (type === 'message') {
          if (this.#repeat(event)) this.#receive(event);
          return;
        }
        handlers[type]?.(event);
        this.#repeat(event);
      });
    }
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

  /**
   * Dispatches an event of the Chat from this element. Returns false if the page has prevented it.
   * @param {Event} event
   */
  #repeat(event) {
    const { isTrusted: _, ...fields } = Object.getOwnPropertyDescriptors(event);
    return this.dispatchEvent(Object.defineProperties(new Event(event.type, { cancelable: event.type === 'message' }), fields));
  }

  /** Connects again under the visitor's name. A server with authentication has its own: see #opened. */
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

  /** @param {Frame} frame `state`, and what goes with it */
  #showState(frame) {
    const { state, retryIn, code, reason = '', status } = frame;
    if (this.#renaming && state === 'closed') return;
    // A system may say that it is offline although a connection has opened. Then only what it says next counts.
    if (!frame.offline || (state === 'open' && this.#state.state !== 'open')) this.#offline = false;
    else if (!this.#state.offline) this.#offline = true;
    const offline = this.#offline;
    this.#state = frame;
    const { room, pill, countdown, state: shown, trouble } = this.#ui, speaker = this.#speaker;
    clearInterval(this.#ticker);
    countdown.textContent = '';
    const label = offline && state !== 'closed' ? 'offline' : state === 'open' ? 'connected' : state === 'closed' ? 'disconnected'
      : this.#met ? 'reconnecting' : 'connecting';
    pill.dataset.state = offline && state === 'open' ? 'offline' : state;
    pill.title = code ? `${code} ${reason}`.trim() : '';
    if (shown.textContent !== speaker.say(label)) shown.textContent = speaker.say(label);
    const wasOffline = room.classList.contains('offline');
    room.classList.toggle('closed', state === 'closed');
    room.classList.toggle('offline', state !== 'open');
    if (wasOffline !== (state !== 'open')) for (const item of this.#pending.values()) this.#list.update(item);
    if (state !== 'open') this.#endHistory();
    if (state === 'waiting' && this.#met) this.#away ??= new Date();
    if (state === 'waiting' && retryIn !== undefined && !offline) this.#countDown(retryIn);
    if (state === 'open') {
      trouble.hidden = true;
      if (!this.#tooLong(this.#ui.text.value)) this.#say('');
    }
    if (state === 'open' && offline) this.#trouble('noNetwork', 'tryNow');
    else if (status) this.#trouble(speaker.knows(`refused ${status}`) ? `refused ${status}` : 'refused', state === 'closed' ? 'connectAgain' : 'tryNow', `${status} ${reason}`, status === 401);
    else if (state === 'waiting') {
      const reading = this.readOnly || this.transparent;
      this.#trouble(reading ? 'notYetReading' : offline ? 'noNetwork' : this.#met ? 'lost' : 'notYet', 'tryNow');
    } else if (state === 'closed' && !this.#chat) this.#trouble('noAddress', 'connectAgain');
    else if (state === 'closed' && code) {
      const exact = `${code} ${reason}`.trim();
      this.#trouble(speaker.knows(exact) ? exact : speaker.knows(String(code)) ? String(code) : '1008', 'connectAgain', exact);
    }
  }

  /** @param {number} retryIn in milliseconds */
  #countDown(retryIn) {
    const due = Date.now() + retryIn;
    const tick = () => {
      this.#ui.countdown.textContent = this.#speaker.say('inSeconds', { n: Math.max(1, Math.ceil((due - Date.now()) / 1000)) });
    };
    tick();
    this.#ticker = setInterval(tick, 500);
  }

  /**
   * Says why there is no connection, and what can be done.
   * @param {string} what
   * @param {string} action
   * @param {string} [detail]
   * @param {boolean} [signIn] whether the visitor can sign in
   */
  #trouble(what, action, detail = '', signIn = false) {
    const { trouble, why, login, again } = this.#ui;
    const text = this.#speaker.say(what) + (detail && ` (${detail.trim()})`);
    if (trouble.hidden || why.textContent !== text) this.#announce(text);
    why.textContent = text;
    again.textContent = this.#speaker.say(action);
    login.hidden = !signIn;
    if (signIn) {
      const url = new URL(this.getAttribute('login') ?? location.href, document.baseURI);
      login.href = /^https?:$/.test(url.protocol) ? url.href : location.href;
      if (login.target !== '_top') login.target = '_top'; // not inside of a frame
    }
    trouble.hidden = false;
  }

  /** @param {Frame} hello the server's first frame */
  #opened(hello) {
    const { me, name } = this.#ui;
    if (hello.epoch !== this.#epoch) [this.#epoch, this.#start] = [hello.epoch ?? '', this.#newest];
    this.#user = hello.user ?? '';
    this.#names.add(this.#user);
    const url = new URL(this.#chat?.url ?? location.href);
    this.#decided = this.#user !== '' && ![...url.searchParams.values()].includes(this.#user);
    // With authentication the server decides the name.
    me.hidden = !this.#user || this.name === null || (this.name !== '' && !this.#decided);
    name.readOnly = this.#decided;
    name.value = this.#user || this.#chosen;
    if (hello.client) {
      this.#mine.add(hello.client);
      remember('sessionStorage', 'clients', [...this.#mine].slice(-50).join(' '));
      this.#others = new Set(recall('localStorage', 'clients').split(' ')).add(hello.client);
      remember('localStorage', 'clients', [...this.#others].slice(-200).join(' '));
    }
    this.#first = !this.#met;
    this.#head = hello.head ?? 0;
    if (hello.replay > 0) {
      this.#list.hold();
      this.#historyTimer = setTimeout(() => this.#endHistory(), HISTORY_WAIT);
    }
    if (hello.resumed !== false) this.#away = null; // otherwise #missed still needs it
    this.#met = true;
    this.#ask();
  }

  #endHistory() {
    clearTimeout(this.#historyTimer);
    this.#list.release();
  }

  /** @param {Frame} frame */
  #missed({ count: n, restarted }) {
    if (!n && !restarted) return this.#ask(); // only news of who is here is lost
    const speaker = this.#speaker, now = speaker.clock(new Date()), from = this.#away && speaker.clock(this.#away);
    const when = from ? speaker.say('whileAway', { from, to: now }) : speaker.say('tooFast');
    const text = n ? speaker.say('missed', { n }) : speaker.say('anew');
    const more = !restarted ? when : n ? speaker.say('perhapsMore', { when }) : speaker.say('since', { from: from ?? now });
    this.#list.add({ kind: 'notice', order: this.#newest, text, more, missed: true });
    this.#announce(`${text}: ${more}`);
    this.#away = null;
    this.#showEmpty();
    this.#ask();
  }

  // ---- who is here ----

  /** Asks who is here. If the server has join_leave, it announces later changes by itself. */
  async #ask() {
    const asked = this.#chat;
    const answer = await asked?.who({ limit: MAX_LISTED });
    if (asked !== this.#chat || !answer) return;
    const { users, next } = /** @type {Frame} */ (answer);
    this.#people = new Map(users.map((/** @type {Frame} */ { user, clients }) => [user, clients]));
    this.#more = next !== undefined;
    this.#ui.who.hidden = false;
    this.#ui.room.classList.add('listed');
    this.#showPeople();
  }

  /**
   * Notes who came and went.
   * @param {string[]} joined
   * @param {string[]} left
   * @param {number} clients how many connections there are now
   */
  #change(joined, left, clients) {
    const people = this.#people;
    for (const user of joined) people.set(user, people.get(user) || 1);
    for (const user of left) people.delete(user);
    // Somebody opened or closed a further window. In a small room that is worth asking again.
    const listed = [...people.values()].reduce((sum, windows) => sum + windows, 0);
    if (clients <= MAX_LISTED && (clients !== listed || joined.length + left.length === 0)) this.#ask();
    this.#showPeople();
    this.#announceChanges(joined, left);
  }

  /**
   * Shows who came and went as one notice, which grows until the next message.
   * @param {string[]} joined
   * @param {string[]} left
   */
  #announceChanges(joined, left) {
    const others = (/** @type {string[]} */ users) => users.filter((user) => user && !this.#names.has(user));
    const last = this.#list.last;
    const notice = last?.kind === 'notice' && last.changes ? last : null;
    const changes = notice?.changes ?? { joined: new Set(), left: new Set() };
    // Somebody who comes and goes at once is not announced.
    for (const user of others(joined)) if (!changes.left.delete(user)) changes.joined.add(user);
    for (const user of others(left)) if (!changes.joined.delete(user)) changes.left.add(user);
    const text = /** @type {const} */ (['joined', 'left']).filter((what) => changes[what].size).map((what) => {
      const who = this.#speaker.list([...changes[what]].map((user) => this.#nameOf(user)));
      return this.#speaker.say(what, { who });
    }).join(', ');
    if (notice && text) this.#list.update(Object.assign(notice, { text }));
    else if (notice) this.#list.remove(notice);
    else if (text) this.#list.add({ kind: 'notice', order: this.#newest, text, changes });
    this.#showEmpty();
  }

  #showPeople() {
    const { present, listed, listTitle, others } = this.#ui, people = this.#people;
    const users = [...people.keys()].sort((a, b) => a.localeCompare(b)).slice(0, MAX_LISTED);
    present.textContent = `${people.size}${this.#more ? '+' : ''}`;
    listed.replaceChildren(...users.map((user) => {
      const name = legible(user) || this.#speaker.say('anonymous'), n = people.get(user) ?? 1;
      const me = user !== '' && user === this.#user;
      const about = [me && this.#speaker.say('me'), n > 1 && this.#speaker.say('windows', { n })].filter(Boolean).join(' · ');
      const item = make('li', {}, this.#avatar(name), make('bdi', { class: 'name' }, name), make('span', { class: 'windows' }, about));
      item.style.setProperty('--hue', String(hue(name)));
      return item;
    }));
    listTitle.textContent = this.#speaker.say('hereNow', { n: present.textContent });
    others.hidden = !this.#more && people.size <= MAX_LISTED;
  }

  /** @param {string} user */
  #nameOf(user) {
    return legible(user) || this.#speaker.say('somebody');
  }

  /** @param {string} name */
  #avatar(name) {
    return make('span', { class: 'avatar', 'aria-hidden': 'true' }, [...name][0].toUpperCase());
  }

  // ---- sending ----

  /** Sends what is in the text box. What cannot be sent stays there. */
  #submit() {
    const { text } = this.#ui;
    if (!text.value.trim() || this.#tooLong(text.value)) return;
    if (this.send(text.value) === null) {
      this.#say(this.#speaker.say(this.state === 'closed' ? 'notSentClosed' : 'notSentFull'));
      return;
    }
    text.value = '';
    this.#say('');
    this.#count();
    this.#keepDraft(false);
    this.#see();
  }

  /**
   * Returns how much a text is too long: in characters, or in bytes where the server takes less.
   * @param {string} text
   */
  #tooLong(text) {
    const said = text.trim(), most = this.#chat?.maxMessageSize ?? Infinity;
    // A message is a string in JSON, with an id and more around it. That takes six bytes at most for each unit.
    const over = 6 * said.length + AROUND > most ? bytes(JSON.stringify(said)) + AROUND - most : 0;
    return Math.max(0, said.length - MAX_TEXT, over);
  }

  /** @param {Frame} frame */
  #sent({ id, seq, time, epoch = this.#epoch }) {
    const item = this.#pending.get(id);
    // The hub may have published it before it began anew.
    if (item) this.#confirm(item, epoch === this.#epoch ? this.#start + seq : this.#newest, time);
  }

  /**
   * @param {Message} item
   * @param {number} order
   * @param {Date} time
   */
  #confirm(item, order, time) {
    for (const [id, other] of this.#pending) if (other === item) this.#pending.delete(id);
    this.#newest = Math.max(this.#newest, order);
    this.#shown.set(order, item);
    this.#list.update(Object.assign(item, { status: 'sent', code: undefined, order, time }));
  }

  /** @param {Frame} frame */
  #failed({ id, code }) {
    const item = this.#pending.get(id);
    if (!item) return;
    this.#pending.delete(id);
    this.#list.update(Object.assign(item, { status: 'gone', code, order: this.#newest }));
    if (!this.#renaming) this.#announce(`${this.#failure(code)} ${item.text}`);
  }

  /** @param {string} [code] */
  #failure(code) {
    return this.#speaker.say(this.#speaker.knows(`failed ${code}`) ? `failed ${code}` : 'failed');
  }

  /** @param {Message} item */
  #sendAgain(item) {
    if (this.send(item.said ?? item.text) !== null) this.#list.remove(item);
  }

  /** @param {string} hint */
  #say(hint) {
    if (this.#ui.hint.textContent !== hint) this.#ui.hint.textContent = hint;
  }

  /** Shows how long the text is if it is almost too long, or too long. */
  #count() {
    const { text, count } = this.#ui, length = text.value.trim().length, over = this.#tooLong(text.value);
    count.hidden = length < MAX_TEXT * 0.9;
    count.textContent = this.#speaker.say('count', { n: length, max: MAX_TEXT });
    const was = text.ariaInvalid === 'true';
    text.ariaInvalid = String(over > 0);
    if (over > 0) this.#say(this.#speaker.say('tooLong', { n: over }));
    else if (was) this.#say('');
  }

  /**
   * Stores the draft for this room in this tab. If the visitor leaves, it includes messages that still wait.
   * @param {boolean} leaving
   */
  #keepDraft(leaving) {
    const waiting = leaving ? [...this.#pending.values()].map(({ said }) => said) : [];
    remember('sessionStorage', `draft.${this.#draftOf}`, [...waiting, this.#ui.text.value].filter(Boolean).join('\n'));
  }

  // ---- receiving ----

  /**
   * Takes one message. Anybody may send anything, so it is cut to size and shown as text.
   * @param {Frame} frame
   */
  #receive({ data, seq, time, client, user, own, replayed }) {
    if (typeof data !== 'string') return;
    const order = this.#start + seq;
    if (seq >= this.#head) this.#endHistory();
    if (this.#shown.has(order)) return; // our own: `sent` came first, or the name has changed
    const ours = own || this.#isOurs(client, user);
    // Our own messages return in the order in which we sent them. Those that may not have arrived return from the history.
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
      kind: 'message', order, author, sender: ours ? 'me' : user || client || '', client, user, text, time, arrives: !replayed,
      status: ours ? 'sent' : client ? 'theirs' : 'official',
    };
    if (news) this.#note(item);
    this.#newest = Math.max(this.#newest, order);
    this.#shown.set(order, item);
    this.#list.add(item);
    this.#showEmpty();
    if (news) this.#announce(`${author}: ${text}`);
  }

  /**
   * Learns of the browser's other clients. Messages of theirs may have come before.
   * @param {string} clients
   */
  #recognize(clients) {
    for (const client of clients.split(' ')) this.#others.add(client);
    for (const item of this.#list) {
      if (item.kind !== 'message' || item.status !== 'theirs' || !this.#isOurs(item.client, item.user)) continue;
      this.#list.update(Object.assign(item, { status: 'sent', sender: 'me' }));
    }
  }

  /**
   * Whether a message is the visitor's own: from this tab, from another window as the same user, or of the user that only a
   * login can be.
   * @param {string} [client]
   * @param {string} [user]
   */
  #isOurs(client, user = '') {
    if (!client) return false; // the site itself
    return this.#mine.has(client) || (this.#others.has(client) && this.#names.has(user)) || (this.#decided && user === this.#user);
  }

  /**
   * Finds a message from here that has this text and no answer.
   * @param {string} said
   */
  #unanswered(said) {
    for (const item of this.#pending.values()) if (item.said === said) return item;
    for (const item of this.#list) {
      if (item.kind === 'message' && item.status === 'gone' && item.code === 'unknown' && item.said === said) return item;
    }
    return null;
  }

  // The items of the elements in the document.
  /** @type {WeakMap<Element, Message>} */
  #drawn = new WeakMap();

  /**
   * What an item shows of the one before it.
   * @param {Item} item
   * @param {Item | undefined} previous
   */
  #mark(item, previous) {
    if (item.kind !== 'message' || previous?.kind !== 'message') return 'timed';
    const follows = previous.sender === item.sender && (previous.status === 'official') === (item.status === 'official')
      && item.time.getTime() - previous.time.getTime() < TOGETHER;
    const timed = !follows || minute(previous.time) !== minute(item.time);
    return `${follows ? 'follows ' : ''}${timed ? 'timed' : ''}`;
  }

  /**
   * Makes the element of an item.
   * @param {Item} item
   * @param {string} mark
   */
  #draw(item, mark) {
    if (item.kind === 'line') return make('li', { class: 'unread' }, this.#speaker.say('unread'));
    if (item.kind === 'notice') {
      const body = make('p', { dir: 'auto' }, item.text);
      if (item.more) body.append(make('small', {}, item.more));
      return make('li', { class: item.missed ? 'notice missed' : 'notice' }, body);
    }
    return this.#bubble(item, mark.includes('follows'), mark.includes('timed'));
  }

  /**
   * Makes the element of a message.
   * @param {Message} item
   * @param {boolean} follows whether it is of the same author as the one before
   * @param {boolean} timed whether it shows its time
   */
  #bubble(item, follows, timed) {
    const { author, status, time } = item, speaker = this.#speaker, ours = /pending|sent|gone/.test(status);
    const name = make('bdi', { class: 'name' }, ours ? speaker.say('you') : author);
    const from = make('p', { class: 'from' }, name);
    if (status === 'official') from.prepend(icon(16, 'M2 6.500v3h2.500L11 13V3L4.500 6.500zM13 6v4'));
    const when = make('p', { class: 'when' });
    if (timed) when.append(make('time', { datetime: time.toISOString() }, speaker.clock(time)));
    if (status === 'sent') when.append(make('span', { role: 'img', 'aria-label': speaker.say('sent') }, timed ? ' ✓' : '✓'));
    if (status === 'pending') when.append(`${timed ? ' · ' : ''}${speaker.say(this.#state.state === 'open' ? 'sending' : 'waiting')}`);
    const text = make('p', { class: 'text', dir: 'auto' }, ...linked(item.text));
    const bubble = make('div', { class: 'bubble', part: ours ? 'bubble own-bubble' : 'bubble', title: speaker.exactly(time) }, from, text, when);
    if (status === 'gone') {
      bubble.append(make('p', { class: 'failed' }, make('span', {}, this.#failure(item.code)), ' ',
        make('button', { type: 'button' }, speaker.say('sendAgain'))));
    }
    const classes = ['message', ours && 'mine', status, follows && 'follows', item.arrives && 'arrives'].filter(Boolean).join(' ');
    const element = make('li', { class: classes }, bubble);
    if (!ours && status !== 'official') element.prepend(this.#avatar(author));
    // Strangers without a name have the color of their connection.
    element.style.setProperty('--hue', String(hue(author === speaker.say('somebody') ? item.sender : author)));
    item.arrives = false;
    this.#drawn.set(element, item);
    return element;
  }

  #showEmpty() {
    const { empty } = this.#ui, full = this.#list.size > 0;
    if (empty.hidden !== full) empty.hidden = full;
  }

  /**
   * Has a screen reader read something out, once.
   * @param {string} text
   */
  #announce(text) {
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

  /**
   * Counts a message that the visitor may not see, and draws attention to it.
   * @param {Message} item
   */
  #note(item) {
    if (document.hidden || !document.hasFocus()) this.#alert(item);
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

  /** Notes what the visitor sees. */
  #see() {
    if (this.#unread && !document.hidden && this.#list.atEnd) this.#setUnread(0);
    this.#showJump();
  }

  /** @param {number} count */
  #setUnread(count) {
    if (count === this.#unread) return;
    this.#unread = count;
    this.#showJump();
    this.dispatchEvent(Object.assign(new Event('unread'), { count }));
  }

  #showJump() {
    const { jump, jumpText } = this.#ui, n = this.#unread;
    jump.hidden = this.#list.atEnd || !(n || this.#list.farAway);
    const text = this.#speaker.say(n ? 'newMessages' : 'jump', { n });
    if (jumpText.textContent !== text) jumpText.textContent = text;
  }

  /** @param {Message} item */
  #alert({ author, text }) {
    if (this.#ui.sound.checked) this.#beep();
    if (!this.#ui.notify.checked) return;
    try {
      const notification = new Notification(author, { body: text.slice(0, 200), tag: `chat-room ${this.src}` });
      notification.onclick = () => {
        window.focus();
        notification.close();
      };
    } catch { /* phones have notifications only from a service worker */ }
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

  async #askToNotify() {
    const { notify, alertsHint } = this.#ui;
    const allowed = notify.checked && (await globalThis.Notification?.requestPermission?.()) === 'granted';
    alertsHint.textContent = this.#speaker.say(notify.checked && !allowed ? 'denied' : 'alertsHint');
    notify.checked = allowed;
    remember('localStorage', 'notify', allowed ? 'on' : '');
    this.#showBell();
  }

  #showBell() {
    this.#ui.bell.classList.toggle('on', this.#ui.notify.checked || this.#ui.sound.checked);
  }
}

globalThis.customElements?.define('chat-room', ChatRoom);
