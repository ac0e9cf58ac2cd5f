import { Chat } from './chat.js';

/** The longest message, in characters. JSON needs at most six bytes for one, so it stays well below the server's 64 KiB. */
const MAX_TEXT = 4000;
const MAX_NAME = 32;
const MAX_ROOM = 40;
/** The most messages on the page; more only make it slow. */
const MAX_SHOWN = 500;
/** Within this many milliseconds, messages of one author form one group. */
const TOGETHER = 120_000;
/** The most people in the list; nobody reads more names. */
const MAX_LISTED = 200;

const $ = (id) => document.getElementById(id);
const copy = (template) => $(template).content.firstElementChild.cloneNode(true);
const text = $('text'), log = $('log'), messages = $('messages');

/** Reads and writes a storage, if the browser allows it. */
const memoryIn = (storage) => ({
  get(key) { try { return window[storage].getItem(key) ?? ''; } catch { return ''; } },
  set(key, value) { try { window[storage].setItem(key, value); } catch { /* only a convenience */ } },
});
const memory = memoryIn('localStorage');
/** The storage of this tab, which outlasts a reload. */
const session = memoryIn('sessionStorage');

// ---- names ----

const pick = (words) => words[Math.floor(Math.random() * words.length)];
const guest = () => [
  pick(['Amber', 'Brave', 'Calm', 'Clever', 'Curious', 'Gentle', 'Happy', 'Lucky', 'Merry', 'Quiet', 'Sunny', 'Swift']),
  pick(['Badger', 'Finch', 'Fox', 'Hare', 'Heron', 'Koala', 'Lynx', 'Otter', 'Owl', 'Panda', 'Robin', 'Seal']),
].join(' ');

/** Makes a name or a room: one line of at most max characters, without characters that reverse the text beside it. */
const clean = (s, max) => [...s.normalize().replace(/\p{Bidi_C}/gu, '').replace(/[\p{Cc}\p{Cs}\s]+/gu, ' ').trim()]
  .slice(0, max).join('').trim();

const codePoint = (c) => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, '0')}`;

/**
 * Returns another person's name as one line. Characters that are invisible or cover others could make two names look the
 * same, so the line has their numbers instead: everything but letters, marks, numbers, punctuation, symbols and emoji;
 * spaces at the ends or in a row; marks without a letter, or more than four on one.
 */
function legible(user) {
  const s = user.normalize().replace(
    /(\p{RGI_Emoji})|[[^\p{L}\p{M}\p{N}\p{P}\p{S} ]\p{Default_Ignorable_Code_Point}\u2800]|^[ \p{M}]|(?<= )[ \p{M}]| $|(?<=\p{M}{4})\p{M}/gv,
    (c, emoji) => emoji ?? codePoint(c),
  );
  const characters = [...s];
  return characters.length > MAX_NAME ? `${characters.slice(0, MAX_NAME - 1).join('')}…` : s;
}

const name = $('name');
name.maxLength = MAX_NAME;
name.value = clean(memory.get('chat.name'), MAX_NAME) || guest();
name.addEventListener('change', () => {
  name.value = clean(name.value, MAX_NAME) || guest();
  memory.set('chat.name', name.value);
  rename();
});
name.addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.isComposing) return;
  event.preventDefault(); // or Enter would also act on the message box
  text.focus();
});
memory.set('chat.name', name.value);
/** The names that this tab has had. The page does not announce them. */
const names = new Set();

// ---- rooms ----

/** Returns a valid room. A slash, or a name of dots, would lead out of /chat/. */
const cleanRoom = (s) => {
  const room = clean(s.replace(/[/\\]/g, '-'), MAX_ROOM);
  return /^\.*$/.test(room) ? 'lobby' : room;
};

/** Returns the room in the page's URL: ?room=garden or #garden. */
function roomOfURL() {
  const { hash, searchParams } = new URL(location);
  let room = searchParams.get('room') ?? hash.slice(1);
  if (!searchParams.has('room')) {
    try { room = decodeURIComponent(room); } catch { /* a literal % */ }
  }
  return cleanRoom(room);
}

function urlOf(room) {
  const url = new URL(location);
  url.hash = '';
  url.searchParams.set('room', room);
  return url;
}

function goTo(room) {
  history.pushState(null, '', urlOf(room));
  enter();
  text.focus();
}

const recentRooms = () => memory.get('chat.rooms').split('\n').map((s) => s && cleanRoom(s)).filter(Boolean);

function remember(room) {
  memory.set('chat.rooms', [room, ...recentRooms().filter((r) => r !== room)].slice(0, 6).join('\n'));
}

$('target').maxLength = MAX_ROOM;
$('switch').addEventListener('click', () => {
  $('target').value = '';
  const others = recentRooms().filter((r) => r !== room);
  $('recent').hidden = others.length === 0;
  $('recent').querySelector('ul').replaceChildren(...others.map((r) => {
    const item = copy('recent-room');
    item.firstElementChild.textContent = r;
    item.firstElementChild.href = urlOf(r);
    return item;
  }));
  $('rooms').showModal();
  $('target').focus();
});
$('go').addEventListener('submit', () => {
  if ($('target').value.trim()) goTo(cleanRoom($('target').value));
});
$('rooms').addEventListener('click', (event) => {
  const link = event.target.closest('a');
  if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey) {
    event.preventDefault();
    $('rooms').close();
    goTo(link.textContent);
  } else if (event.target === $('rooms')) {
    $('rooms').close(); // a click outside the dialog
  }
});

for (const button of document.querySelectorAll('button.share')) {
  const label = button.querySelector('.label'), before = label.textContent;
  button.addEventListener('click', async () => {
    const url = urlOf(room).href;
    if (navigator.share && matchMedia('(pointer: coarse)').matches) {
      navigator.share({ title: document.title, url }).catch(() => { /* the visitor canceled */ });
      return;
    }
    try {
      await navigator.clipboard.writeText(url);
    } catch {
      // Pages without HTTPS have no clipboard.
      prompt('The link to this room:', url);
      return;
    }
    label.textContent = 'Link copied';
    say('The link to this room is copied.');
    setTimeout(() => (label.textContent = before), 2500);
  });
}

// ---- the connection ----

/** @type {Chat} */
let chat;
let room = '';
/** Whether this room has had a connection, and when the last one was lost. */
let met = false, away = null;
let renaming = false;
let ticker = 0;

const REASONS = {
  1000: 'The server has said goodbye.',
  1002: 'The server did not understand this browser.',
  1007: 'The server has refused a message: it was not text.',
  1008: 'The server does not want this connection.',
  '1008 read_only': 'This room is for reading only. Connect again to read on.',
  '1008 rate_limited': 'That was too much in too short a time. Take a breath, then connect again.',
  '1008 kicked': 'You were asked to leave this room.',
  1009: 'The server has refused a message: it was too big.',
};

/** Joins the room in the URL and leaves the previous one. */
function enter() {
  if (chat && room === roomOfURL()) return;
  if (chat) {
    keepDraft(true);
    const left = chat;
    chat = null;
    left.close();
  }
  room = roomOfURL();
  met = false;
  away = null;
  remember(room);
  $('room').textContent = room;
  $('log').setAttribute('aria-label', `Messages in ${room}`);
  pending.clear();
  shown.clear();
  messages.replaceChildren();
  [epoch, start, newest] = ['', 0, 0];
  people.clear();
  showPeople();
  $('who').hidden = true;
  seen();
  say('');
  text.value = session.get(`chat.draft.${room}`);
  count();

  const joined = new Chat(`/chat/${encodeURIComponent(room)}?${new URLSearchParams({ name: name.value })}`);
  chat = joined;
  const handlers = { state: showState, open: opened, message: receive, sent, failed, missed, join, leave, presence };
  for (const [type, handle] of Object.entries(handlers)) {
    joined.addEventListener(type, (event) => {
      if (joined === chat) handle(event);
    });
  }
  showState({ state: chat.state });
}

/** Reconnects under the name that the visitor has chosen. A server with authentication overrides it: see opened. */
function rename() {
  if (chat.url.searchParams.get('name') === name.value) return;
  chat.url.searchParams.set('name', name.value);
  if (chat.state === 'closed') return;
  const waiting = [...pending.values()];
  renaming = true;
  chat.close();
  chat.connect();
  renaming = false;
  for (const item of waiting) {
    if (item.code === 'closed') sendAgain(item);
  }
}

/** @param {{ state: import('./chat.js').State, retryIn?: number, code?: number, reason?: string }} event */
function showState({ state, retryIn, code, reason }) {
  if (renaming && state === 'closed') return;
  clearInterval(ticker);
  $('countdown').textContent = '';
  const label = { open: 'Connected', closed: 'Disconnected' }[state] ?? (met ? 'Reconnecting' : 'Connecting');
  const pill = document.querySelector('.state');
  pill.dataset.state = state;
  pill.title = code ? `Close code ${code} ${reason}` : '';
  if ($('state').textContent !== label) $('state').textContent = label;
  document.body.classList.toggle('closed', state === 'closed');
  document.body.classList.toggle('offline', state !== 'open');
  switch (state) {
    case 'open':
      $('trouble').hidden = true;
      say('');
      break;
    case 'waiting': {
      if (met) away ??= new Date();
      const due = Date.now() + retryIn;
      const tick = () => ($('countdown').textContent = ` in ${Math.max(1, Math.ceil((due - Date.now()) / 1000))} s`);
      tick();
      ticker = setInterval(tick, 500);
      trouble(`${met ? 'The connection is lost.' : 'There is no connection yet.'} What you write is sent when it is back.`,
        'Try now');
      break;
    }
    case 'closed':
      trouble(`${REASONS[`${code} ${reason}`] ?? REASONS[code]} (${`${code} ${reason}`.trim()})`, 'Connect again');
      break;
  }
}

function trouble(why, action) {
  $('why').textContent = why;
  $('connect').textContent = action;
  $('trouble').hidden = false;
}

$('connect').addEventListener('click', () => {
  chat.connect();
  text.focus();
});

/** @param {object} hello the server's first frame: see docs/protocol.md */
function opened(hello) {
  if (hello.epoch !== epoch) [epoch, start] = [hello.epoch, newest];
  // With authentication the server decides the name.
  $('me').hidden = !hello.user;
  names.add(hello.user);
  name.readOnly = Boolean(hello.user) && hello.user !== chat.url.searchParams.get('name');
  if (name.readOnly) name.value = hello.user;
  mine.add(hello.client);
  session.set('chat.clients', [...mine].slice(-50).join(' '));
  head = hello.head;
  log.ariaBusy = String(hello.replay > 0); // a screen reader need not read out the history
  if (hello.resumed !== false) away = null; // otherwise missed() still needs it
  met = true;
  ask();
}

function missed({ count: lost, restarted }) {
  const what = lost ? `${lost} ${lost === 1 ? 'message' : 'messages'} missed` : 'This room has started anew';
  const when = away ? `while you were away from ${clock(away)} to ${clock(new Date())}` : 'more came than could be shown';
  notice(what, restarted && lost ? `${when}, and perhaps more: the room has started anew`
    : restarted ? `something may be missing since ${clock(away ?? new Date())}` : when).classList.add('missed');
  away = null;
  ask();
}

// ---- who is here ----

/** The number of connections of each person, by name. */
const people = new Map();
/** Whether more people are here than the list has. */
let more = false;

/** Asks who is here. If the server has join_leave, it announces later changes by itself. */
async function ask() {
  const asked = chat;
  const answer = await asked.who({ limit: MAX_LISTED });
  if (asked !== chat || !answer) return;
  people.clear();
  for (const { user, clients } of answer.users) people.set(user, clients);
  more = answer.next !== undefined;
  $('who').hidden = false;
  showPeople();
}

function join({ user, clients }) {
  change([user], [], clients);
}

function leave({ user, clients }) {
  change([], [user], clients);
}

function presence({ clients, joined = [], left = [] }) {
  change(joined, left, clients);
}

function change(joined, left, clients) {
  for (const user of joined) people.set(user, people.get(user) ?? 1);
  for (const user of left) people.delete(user);
  // Somebody opened or closed a further window. In a small room that is worth asking again.
  const listed = [...people.values()].reduce((sum, windows) => sum + windows, 0);
  if (clients <= MAX_LISTED && (clients !== listed || joined.length + left.length === 0)) ask();
  showPeople();
  const others = (users) => users.filter((user) => user && !names.has(user));
  const item = messages.lastElementChild?.changes ? messages.lastElementChild : null;
  const changes = item?.changes ?? { joined: new Set(), left: new Set() };
  // Somebody who comes and goes at once is not announced.
  for (const user of others(joined)) if (!changes.left.delete(user)) changes.joined.add(user);
  for (const user of others(left)) if (!changes.joined.delete(user)) changes.left.add(user);
  const news = [[changes.joined, 'joined'], [changes.left, 'left']].filter(([users]) => users.size)
    .map(([users, what]) => `${list([...users].map((user) => legible(user) || 'Somebody'))} ${what}`).join(', ');
  if (item && news) item.firstElementChild.textContent = news;
  else if (item) item.remove();
  else if (news) notice(news).changes = changes;
}

/** Joins names into a phrase: all of up to three, or two and a number. */
function list(users) {
  const named = users.length > 3 ? [...users.slice(0, 2), `${users.length - 2} others`] : users;
  return named.join(', ').replace(/, ([^,]*)$/, ' and $1');
}

function showPeople() {
  const users = [...people.keys()].sort((a, b) => a.localeCompare(b)).slice(0, MAX_LISTED);
  $('present').textContent = `${people.size}${more ? '+' : ''}`;
  $('people').querySelector('ul').replaceChildren(...users.map((user) => {
    const item = copy('person');
    const me = user === name.value, shownAs = legible(user) || 'Anonymous';
    dress(item, shownAs);
    item.querySelector('.name').textContent = shownAs;
    item.querySelector('.windows').textContent = [me && 'you', people.get(user) > 1 && `${people.get(user)} windows`]
      .filter(Boolean).join(' · ');
    return item;
  }));
  $('people-title').textContent = `Here now · ${$('present').textContent}`;
  $('others').hidden = !more && people.size <= MAX_LISTED;
}

$('who').addEventListener('click', () => togglePeople());
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape') togglePeople(false);
});
document.addEventListener('pointerdown', (event) => {
  if (!event.target.closest('#people, #who')) togglePeople(false);
});

function togglePeople(open) {
  $('who').ariaExpanded = String(document.body.classList.toggle('people', open));
}

// ---- sending ----

/** The elements that show unanswered messages, by id. */
const pending = new Map();

function send() {
  const said = text.value.trim();
  if (!said) return;
  if (said.length > MAX_TEXT) {
    say(`A message has at most ${MAX_TEXT} characters. Send it in parts.`);
    return;
  }
  if (!post(said)) return;
  text.value = '';
  say('');
  count();
  keepDraft();
  seen();
}

/** Sends a message and shows it as pending. */
function post(said) {
  const id = chat.send(said);
  if (id === null) {
    say(chat.state === 'closed' ? 'Not sent: there is no connection. Your message stays here.'
      : 'Not sent: too many messages wait for the connection. This one stays here.');
    return false;
  }
  const item = bubble(said, name.value, true, new Date());
  item.said = said;
  item.order = Infinity;
  item.classList.add('pending');
  pending.set(id, item);
  place(item, true);
  return true;
}

/** Handles the answer of a server that published a message. */
function sent({ id, seq, time, epoch: other = epoch }) {
  const item = pending.get(id);
  // The hub may have published it before it began anew.
  if (item) confirm(item, other === epoch ? start + seq : newest, time);
}

function confirm(item, order, time) {
  for (const [id, other] of pending) if (other === item) pending.delete(id);
  item.classList.remove('pending', 'gone');
  item.order = order;
  newest = Math.max(newest, order);
  stamp(item, time);
  shown.set(order, item);
  place(item, false);
}

const FAILURES = {
  rate_limited: 'Not sent: too much in too short a time.',
  unavailable: 'Not sent: the server cannot take messages now.',
  unknown: 'This may not have arrived.',
};

function failed({ id, code }) {
  const item = pending.get(id);
  if (!item) return;
  pending.delete(id);
  item.code = code;
  item.order = newest;
  item.classList.replace('pending', 'gone');
  item.querySelector('.failed span').textContent = FAILURES[code] ?? 'Not sent.';
  if (atEnd) toEnd(); // the item has grown
}

function sendAgain(item) {
  if (post(item.said)) remove(item);
}

messages.addEventListener('click', (event) => {
  if (event.target.closest('.failed button')) {
    sendAgain(event.target.closest('.message'));
    text.focus();
  }
});

function say(hint) {
  $('hint').textContent = hint;
}

function count() {
  const n = text.value.length;
  $('count').hidden = n < MAX_TEXT * 0.9;
  $('count').textContent = `${n} of ${MAX_TEXT}`;
}

/** Stores the draft for this room in this tab. If the visitor leaves, it includes messages that still wait. */
function keepDraft(leaving) {
  const waiting = leaving ? [...pending.values()].map(({ said }) => said) : [];
  session.set(`chat.draft.${room}`, [...waiting, text.value].filter(Boolean).join('\n'));
}

text.maxLength = MAX_TEXT;
text.addEventListener('input', () => {
  count();
  keepDraft();
});
text.addEventListener('keydown', (event) => {
  // Enter also ends the composition of a Japanese or Chinese word. Safari shows that only in the key code.
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  send();
});
$('compose').addEventListener('submit', (event) => {
  event.preventDefault();
  send();
  text.focus();
});

// ---- receiving ----

/**
 * Each item on the page has an order: its number in the hub, which continues when the hub starts anew. Messages that wait
 * to be sent stand at the end.
 */
let epoch = '', start = 0, newest = 0;
/** The number of the newest message in the replayed history. */
let head = 0;
/** The messages on the page, by their order. */
const shown = new Map();
/** The client ids of this tab, including those from before a reload. */
const mine = new Set(session.get('chat.clients').split(' '));
let atEnd = true;
let unread = 0;

/** Shows one message. Anybody may send anything, so the page cuts it to size and shows it as text. */
function receive({ data, seq, time, client, user, own, replayed }) {
  if (typeof data !== 'string') return;
  const order = start + seq;
  if (seq >= head) log.ariaBusy = 'false';
  if (shown.has(order)) return; // our own: `sent` came first, or the name has changed
  const ours = own || mine.has(client);
  // Our own messages return in the order in which we sent them. Those that may not have arrived return from the history.
  const waiting = own && [...pending.values(), ...messages.querySelectorAll('.gone')]
    .find((item) => item.said === data.trim() && (item.code ?? 'unknown') === 'unknown');
  if (waiting) return confirm(waiting, order, time);
  const body = cut(data.replace(/\n{3,}/g, '\n\n').replace(/(\p{M}{4})\p{M}+/gu, '$1').trim());
  if (!body) return;
  const item = bubble(body, legible(user) || (client ? 'Somebody' : 'Announcement'), ours, time);
  item.order = order;
  newest = Math.max(newest, order);
  shown.set(order, item);
  place(item, false);
  if (document.hidden && !ours && !replayed) unread++;
  title();
}

const cut = (s) => (s.length > MAX_TEXT ? `${s.slice(0, MAX_TEXT)}…` : s);

/** Makes the element that shows a message. */
function bubble(body, author, ours, time) {
  const item = copy('message');
  item.author = author;
  item.classList.toggle('mine', ours);
  dress(item, author);
  item.querySelector('.name').textContent = ours ? 'You' : author;
  item.querySelector('.text').append(...linked(body));
  stamp(item, time);
  return item;
}

function dress(item, author) {
  item.style.setProperty('--hue', hue(author));
  item.querySelector('.avatar').textContent = [...author][0].toUpperCase();
}

function stamp(item, time) {
  item.time = time;
  item.querySelector('time').textContent = clock(time);
  item.querySelector('time').dateTime = time.toISOString();
}

function notice(what, more) {
  const item = copy('notice');
  item.firstElementChild.textContent = what;
  if (more) item.firstElementChild.append(Object.assign(document.createElement('small'), { textContent: more }));
  item.order = newest;
  place(item, false);
  return item;
}

/** Puts an element at its order. Scrolls to it if the visitor had read everything or wrote it. */
function place(item, follow) {
  follow ||= atEnd;
  const from = item.nextElementSibling;
  let before = messages.lastElementChild;
  while (before && (before === item || before.order > item.order)) before = before.previousElementSibling;
  if (!item.isConnected || before !== item.previousElementSibling) {
    if (before) before.after(item);
    else messages.prepend(item);
  }
  for (const moved of [item, item.nextElementSibling, from]) if (moved) group(moved);
  while (messages.childElementCount > MAX_SHOWN) remove(messages.firstElementChild);
  if (follow) toEnd();
  else if (item.author && !item.classList.contains('mine')) $('jump').hidden = false;
}

function remove(item) {
  const after = item.nextElementSibling;
  if (shown.get(item.order) === item) shown.delete(item.order);
  item.remove();
  if (after) group(after);
}

/** Groups a message with the one before it, if both belong together. */
function group(item) {
  const before = item.previousElementSibling;
  item.classList.toggle('follows', Boolean(before?.author) && before.author === item.author
    && before.classList.contains('mine') === item.classList.contains('mine') && item.time - before.time < TOGETHER);
}

/** Formats a time, with the day if it is not today. */
const clock = (time) => time.toLocaleString([], {
  hour: 'numeric',
  minute: '2-digit',
  ...(time.toDateString() === new Date().toDateString() ? {} : { weekday: 'short' }),
});

/** Returns a hue for a name, the same in every window. */
function hue(author) {
  let h = 0;
  for (const c of author) h = (h * 31 + c.codePointAt(0)) % 360;
  return h;
}

/** Splits a text into strings and links to the web addresses in it. */
function linked(body) {
  return body.split(/(https?:\/\/[^\s<>"]+[^\s<>".,:;!?')\]])/).map((part, i) => {
    if (i % 2 === 0 || !URL.canParse(part)) return part;
    const link = document.createElement('a');
    link.href = part;
    link.target = '_blank';
    link.rel = 'noopener noreferrer nofollow';
    link.textContent = part;
    return link;
  });
}

// ---- the view ----

function toEnd() {
  log.scrollTop = log.scrollHeight;
  atEnd = true;
}

log.addEventListener('scroll', () => {
  atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  if (atEnd) $('jump').hidden = true;
}, { passive: true });
new ResizeObserver(() => atEnd && toEnd()).observe(log);
$('jump').addEventListener('click', () => {
  toEnd();
  $('jump').hidden = true;
  text.focus();
});

function title() {
  document.title = `${unread ? `(${unread}) ` : ''}${room} · chat`;
}

function seen() {
  unread = 0;
  title();
}

document.addEventListener('visibilitychange', () => {
  if (!document.hidden) seen();
});

// Safari on phones covers the page with its keyboard instead of resizing it.
function fit() {
  const { height, offsetTop, scale } = visualViewport;
  if (scale > 1) return; // zoomed in
  document.documentElement.style.setProperty('--height', `${height}px`);
  document.documentElement.style.setProperty('--top', `${offsetTop}px`);
}
if (window.visualViewport) {
  visualViewport.addEventListener('resize', fit);
  visualViewport.addEventListener('scroll', fit);
}

addEventListener('pagehide', () => keepDraft(true));
addEventListener('popstate', enter);
addEventListener('hashchange', enter);
enter();
// On phones this would open the keyboard before there is anything to read.
if (!matchMedia('(pointer: coarse)').matches) text.focus();
