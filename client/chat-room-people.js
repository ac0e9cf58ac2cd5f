/** The list of the people who are here. A page loads this module when a hub tells who is there. */
import { Panel } from './chat-room-panel.js';
import { avatar, dress, hue, icon, legible, make, setText, speak } from './chat-room-tools.js';
import { learn } from './chat-room-words.js';

/** @import { ItemList } from './chat-room-list.js' */
/** @import { Item, PeopleEvent, Speaker, UI } from './chat-room-types.js' */

learn({
  people: 'Who is here',
  joined: '{who} joined',
  left: '{who} left',
  others: { one: '{n} other', other: '{n} others' },
  hereNow: 'Here now · {n}',
  anonymous: 'Anonymous',
  me: 'you',
  windows: { one: '{n} window', other: '{n} windows' },
  more: 'and more',
});

/** The most people in the list; nobody reads more names. */
const MAX_LISTED = 200;

const css = `
#who { padding-inline: 0.8rem; }
#people li { display: flex; align-items: center; gap: 0.6rem; padding-block: 0.3rem; }
#people .avatar { align-self: center; inline-size: 1.8rem; block-size: 1.8rem; font-size: 0.82rem; }
#people .name { min-inline-size: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-weight: 550; }
.windows { flex: 1 0 auto; font-size: 0.78rem; color: var(--muted); }
#others { padding-block: 0.3rem; font-size: 0.85rem; color: var(--muted); }

/* The list stands beside the messages where there is space, and over them elsewhere. */
@container (inline-size >= 46rem) {
  #room.listed { grid-template-columns: minmax(0, 1fr) 15rem; }
  .listed #header { grid-column: 1 / -1; }
  .listed #who { display: none; }
  .listed #people, .listed #people.open {
    display: block;
    position: static;
    grid-area: 2 / 2 / 4 / 3;
    inline-size: auto;
    max-block-size: none;
    border: 0;
    border-inline-start: 1px solid var(--line);
    border-radius: 0;
    box-shadow: none;
  }
}
`;

/** The panel, and who is in it. */
export default class People extends Panel {
  // The number of connections of each person, and whether there are more people.
  /** @type {Map<string, number>} */
  #people = new Map();
  #more = false;
  /** @type {HTMLElement} */
  #title;
  /** @type {HTMLElement} */
  #list;
  /** @type {HTMLElement} */
  #others;
  #visitor = '';
  /** @type {HTMLElement} */
  #button;
  #number = make('span', { id: 'present' });
  /** @type {HTMLElement} */
  #room;
  /** @type {() => Speaker} */
  #speaker;

  /**
   * @param {UI} ui
   * @param {() => Speaker} speaker
   */
  constructor(ui, speaker) {
    const button = make('button', { type: 'button', id: 'who', 'aria-expanded': 'false', 'data-title': 'people', hidden: '' },
      icon(20, 'M10.5 6.5a3 3 0 1 1-6 0 3 3 0 0 1 6 0M2 16.5c0-3 2.4-5 5.5-5s5.5 2 5.5 5M13 3.8a3 3 0 0 1 0 5.4m2 2.8c1.9.7 3 2.3 3 4.5'),
      make('span', { class: 'hidden', 'data-text': 'people' }));
    ui.bell.after(button);
    const title = make('p', { class: 'heading' }), list = make('ul', { role: 'list' });
    const others = make('p', { id: 'others', hidden: '', 'data-text': 'more' });
    super(button, ui.news, speaker(), 'people', { part: 'people' }, title, list, others);
    dress(ui.room, css);
    button.append(this.#number);
    speak(ui.header, speaker());
    button.addEventListener('click', () => this.toggle());
    [this.#button, this.#room, this.#title, this.#list, this.#others, this.#speaker] = [button, ui.room, title, list, others, speaker];
  }

  /**
   * Takes a new list, and shows it.
   * @param {import('./chat-types.js').Page} page
   * @param {string} visitor what the server calls the visitor
   */
  set({ users, next }, visitor) {
    this.#people = new Map(users.map(({ user, clients }) => [user, clients]));
    this.#more = next !== undefined;
    this.#visitor = visitor;
    this.#button.hidden = false;
    this.#room.classList.add('listed');
    this.show();
  }

  /** Hides the list, for a room that has not told who is there. */
  hide() {
    this.set({ clients: 0, users: [] }, '');
    this.#button.hidden = true;
    this.#room.classList.remove('listed');
  }

  /**
   * Notes who came and went, and tells it among the messages.
   * @param {PeopleEvent} event
   * @param {ItemList<Item>} messages
   * @param {number} order of the notice
   * @param {Set<string>} own names of the visitor
   * @returns {boolean} whether the list of a small room is wrong now: somebody has opened or closed a further window
   */
  change(event, messages, order, own) {
    const { joined, left } = changes(event);
    this.#announce(joined, left, messages, order, own);
    for (const user of joined) this.#people.set(user, this.#people.get(user) || 1);
    for (const user of left) this.#people.delete(user);
    this.show();
    const listed = [...this.#people.values()].reduce((sum, windows) => sum + windows, 0);
    return event.clients <= MAX_LISTED && (event.clients !== listed || joined.length + left.length === 0);
  }

  /**
   * Adds who came and went to the list of messages: as one notice, which grows until the next message.
   * @param {string[]} joined
   * @param {string[]} left
   * @param {ItemList<Item>} list
   * @param {number} order
   * @param {Set<string>} own
   */
  #announce(joined, left, list, order, own) {
    const { last } = list, sum = last?.changes ?? { joined: new Set(), left: new Set() };
    const others = (/** @type {string[]} */ users) => users.filter((user) => user && !own.has(user));
    // Somebody who comes and goes at once is not mentioned.
    for (const user of others(joined)) if (!sum.left.delete(user)) sum.joined.add(user);
    for (const user of others(left)) if (!sum.joined.delete(user)) sum.left.add(user);
    const text = /** @type {const} */ (['joined', 'left']).filter((what) => sum[what].size).map((what) => this.#sentence(what, sum[what])).join(', ');
    if (last?.changes && text) list.update(Object.assign(last, { text }));
    else if (last?.changes) list.remove(last);
    else if (text) list.add({ kind: 'notice', order, text, changes: sum });
  }

  /** Says that people have joined or left: names all of up to three, or two and a number. */
  #sentence(/** @type {string} */ what, /** @type {Set<string>} */ users) {
    const speaker = this.#speaker(), names = [...users].map(legible);
    const some = names.length > 3 ? [...names.slice(0, 2), speaker.say('others', { n: names.length - 2 })] : names;
    return speaker.say(what, { who: new Intl.ListFormat(speaker.language).format(some) });
  }

  /** Shows the list. */
  show() {
    const speaker = this.#speaker(), people = this.#people, number = `${people.size}${this.#more ? '+' : ''}`;
    const users = [...people.keys()].sort((a, b) => a.localeCompare(b)).slice(0, MAX_LISTED);
    this.#list.replaceChildren(...users.map((user) => {
      const name = legible(user) || speaker.say('anonymous'), n = people.get(user) ?? 1;
      const about = [user && user === this.#visitor && speaker.say('me'), n > 1 && speaker.say('windows', { n })].filter(Boolean).join(' · ');
      const item = make('li', {}, avatar(name), make('bdi', { class: 'name' }, name), make('span', { class: 'windows' }, about));
      item.style.setProperty('--hue', String(hue(name)));
      return item;
    }));
    setText(this.#title, speaker.say('hereNow', { n: number }));
    setText(this.#number, number);
    this.#others.hidden = !this.#more && people.size <= MAX_LISTED;
  }
}

/**
 * Returns who came and who went, by any of the three events about that.
 * @param {PeopleEvent} event
 * @returns {{ joined: string[], left: string[] }}
 */
function changes({ type, user = '', joined = type === 'join' ? [user] : [], left = type === 'leave' ? [user] : [] }) {
  return { joined, left };
}
