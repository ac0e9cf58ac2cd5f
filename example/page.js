import { Chat } from './chat.js';

/** In characters. In the worst case JSON makes six bytes of one: well below the server's 64 KiB a message. */
const MAX_TEXT = 4000;
const MAX_NAME = 32;
const MAX_ROOM = 40;
/** More messages than that only make the page slow. */
const MAX_SHOWN = 500;
/** After this many milliseconds a message that has not come back is given back to its author. */
const PATIENCE = 5000;
/** Messages of one author within this many milliseconds stand together. */
const TOGETHER = 120_000;

const $ = (id) => document.getElementById(id);
const copy = (template) => $(template).content.firstElementChild.cloneNode(true);
const text = $('text'), log = $('log'), messages = $('messages');

/** localStorage, where the browser allows it. */
const memory = {
  get(key) { try { return localStorage.getItem(key); } catch { return null; } },
  set(key, value) { try { localStorage.setItem(key, value); } catch { /* it is a comfort only */ } },
};

// ---- who ----

const pick = (words) => words[Math.floor(Math.random() * words.length)];
const guest = () => [
  pick(['Amber', 'Brave', 'Calm', 'Clever', 'Curious', 'Gentle', 'Happy', 'Lucky', 'Merry', 'Quiet', 'Sunny', 'Swift']),
  pick(['Badger', 'Finch', 'Fox', 'Hare', 'Heron', 'Koala', 'Lynx', 'Otter', 'Owl', 'Panda', 'Robin', 'Seal']),
].join(' ');

/** One line of at most max characters; a name or a room consists of that. */
const clean = (s, max) => [...s.normalize().replace(/[\p{Cc}\p{Cs}\s]+/gu, ' ').trim()].slice(0, max).join('').trim();

const name = $('name');
name.maxLength = MAX_NAME;
name.value = clean(memory.get('chat.name') ?? '', MAX_NAME) || guest();
name.addEventListener('change', () => {
  name.value = clean(name.value, MAX_NAME) || guest();
  memory.set('chat.name', name.value);
});
name.addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.isComposing) return;
  event.preventDefault(); // else Enter would go on to the box
  text.focus();
});
memory.set('chat.name', name.value);

// ---- where ----

/** A slash, or a name of dots, would lead out of /chat/. */
const cleanRoom = (s) => {
  const room = clean(s.replace(/[/\\]/g, '-'), MAX_ROOM);
  return /^\.*$/.test(room) ? 'lobby' : room;
};

/** The room that the page's URL names: ?room=garden or #garden. */
function roomOfURL() {
  const { hash, searchParams } = new URL(location);
  let room = searchParams.get('room') ?? hash.slice(1);
  if (!searchParams.has('room')) {
    try { room = decodeURIComponent(room); } catch { /* a % that means itself */ }
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

const recentRooms = () => (memory.get('chat.rooms') ?? '').split('\n').map((s) => s && cleanRoom(s)).filter(Boolean);

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
    $('rooms').close(); // a click beside it
  }
});

for (const button of document.querySelectorAll('button.share')) {
  const label = button.querySelector('.label'), before = label.textContent;
  button.addEventListener('click', async () => {
    const url = urlOf(room).href;
    if (navigator.share && matchMedia('(pointer: coarse)').matches) {
      navigator.share({ title: document.title, url }).catch(() => { /* changed their mind */ });
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
/** Whether there has been a connection to this room. */
let met = false;
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

/** Joins the room that the URL names, and leaves the one before. */
function enter() {
  if (chat && room === roomOfURL()) return;
  chat?.close();
  room = roomOfURL();
  met = false;
  remember(room);
  $('room').textContent = room;
  $('log').setAttribute('aria-label', `Messages in ${room}`);
  unsent.forEach(({ timer }) => clearTimeout(timer));
  unsent.clear();
  own.clear();
  shown.clear();
  messages.replaceChildren();
  last = {};
  seen();
  say('');

  const joined = new Chat(`/chat/${encodeURIComponent(room)}`);
  chat = joined;
  joined.addEventListener('message', ({ data }) => {
    if (joined === chat) receive(data);
  });
  joined.addEventListener('state', ({ detail }) => {
    if (joined === chat) showState(detail);
  });
  showState({ state: chat.state });
}

/** @param {import('./chat.js').StateDetail} detail */
function showState({ state, retryIn, code, reason }) {
  clearInterval(ticker);
  $('countdown').textContent = '';
  const label = { open: 'Connected', closed: 'Disconnected' }[state] ?? (met ? 'Reconnecting' : 'Connecting');
  const pill = document.querySelector('.state');
  pill.dataset.state = state;
  pill.title = code ? `Close code ${code} ${reason}` : '';
  if ($('state').textContent !== label) $('state').textContent = label;
  document.body.classList.toggle('connected', state === 'open');
  switch (state) {
    case 'open':
      if (met) notice(`Reconnected at ${clock()}. What was said in between may be missing here.`);
      met = true;
      $('trouble').hidden = true;
      say('');
      break;
    case 'waiting': {
      giveBack();
      const due = Date.now() + retryIn;
      const tick = () => ($('countdown').textContent = ` in ${Math.max(1, Math.ceil((due - Date.now()) / 1000))} s`);
      tick();
      ticker = setInterval(tick, 500);
      trouble(met ? 'The connection is lost. What you write stays here.'
        : 'There is no connection yet. What you write stays here.', 'Try now');
      break;
    }
    case 'closed':
      giveBack();
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

// ---- sending ----

/**
 * What has been sent and has not come back, by its id. The server relays to the sender, too, so that all see
 * one order; what does not come back may have reached nobody.
 */
const unsent = new Map();
/** The ids of messages of ours that have not come back, those that were given back among them. */
const own = new Set();

function send() {
  const message = text.value.trim();
  if (!message) return;
  if (message.length > MAX_TEXT) {
    say(`A message has at most ${MAX_TEXT} characters. Send it in parts.`);
    return;
  }
  // Secure contexts have randomUUID; this works in all.
  const id = crypto.getRandomValues(new Uint32Array(4)).join('-');
  if (!chat.send(JSON.stringify({ id, name: clean(name.value, MAX_NAME) || guest(), text: message }))) {
    say('Not sent: there is no connection. Your message stays here.');
    return;
  }
  own.add(id);
  unsent.set(id, { message, timer: setTimeout(giveBack, PATIENCE, id) });
  text.value = '';
  say('');
  count();
  seen();
}

/** Puts what has not come back into the box again, rather than to lose it: one message, or all of them. */
function giveBack(id) {
  const back = id ? [id] : [...unsent.keys()];
  if (back.length === 0) return;
  const lines = back.map((b) => {
    const { message, timer } = unsent.get(b);
    clearTimeout(timer);
    unsent.delete(b);
    return message;
  });
  text.value = [...lines, text.value].filter(Boolean).join('\n');
  say('What you sent last may not have arrived. It is back in the box.');
  count();
}

function say(hint) {
  $('hint').textContent = hint;
}

function count() {
  const n = text.value.length;
  $('count').hidden = n < MAX_TEXT * 0.9;
  $('count').textContent = `${n} of ${MAX_TEXT}`;
}

text.maxLength = MAX_TEXT;
text.addEventListener('input', count);
text.addEventListener('keydown', (event) => {
  // Enter also ends the composition of a Japanese or Chinese word; Safari tells so by the key code only.
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

/** The ids of what is shown: a hub with history sends some of it again after a reconnect. */
const shown = new Set();
/** The author and the time of the last message, and whether it was ours. */
let last = {};
let atEnd = true;
let unread = 0;

/** Shows one message. Anybody may send anything: it is checked, cut to size, and never more than text. */
function receive(data) {
  if (typeof data !== 'string') return;
  let message;
  try { message = JSON.parse(data); } catch { /* not from this page */ }
  if (typeof message?.text !== 'string') message = { text: data };
  const id = typeof message.id === 'string' ? message.id.slice(0, 64) : '';
  if (id && shown.has(id)) return;
  clearTimeout(unsent.get(id)?.timer);
  unsent.delete(id);
  const body = cut(message.text.replace(/\n{3,}/g, '\n\n').trim());
  if (!body) return;
  // Nobody else knows an id of ours before its message comes back: nobody can put words into our mouth.
  show(id, body, typeof message.name === 'string' && clean(message.name, MAX_NAME) || 'Somebody', own.delete(id));
}

const cut = (s) => (s.length > MAX_TEXT ? `${s.slice(0, MAX_TEXT)}…` : s);

function show(id, body, author, mine) {
  const item = copy('message');
  const now = Date.now();
  item.classList.toggle('mine', mine);
  item.classList.toggle('follows', last.author === author && last.mine === mine && now - last.time < TOGETHER);
  last = { author, mine, time: now };
  item.dataset.id = id;
  item.style.setProperty('--hue', hue(author));
  item.querySelector('.avatar').textContent = [...author][0].toUpperCase();
  item.querySelector('.name').textContent = mine ? 'You' : author;
  item.querySelector('.text').append(...linked(body));
  item.querySelector('time').textContent = clock(now);
  item.querySelector('time').dateTime = new Date(now).toISOString();
  if (id) shown.add(id);
  append(item, mine);
}

function notice(what) {
  const item = copy('notice');
  item.firstElementChild.textContent = what;
  last = {};
  append(item, false);
}

function append(item, mine) {
  const follow = atEnd || mine;
  messages.append(item);
  while (messages.childElementCount > MAX_SHOWN) {
    const first = messages.firstElementChild;
    shown.delete(first.dataset.id);
    first.remove();
  }
  if (follow) toEnd();
  $('jump').hidden = follow;
  if (document.hidden && !mine) unread++;
  title();
}

const clock = (time = Date.now()) => new Date(time).toLocaleTimeString([], { hour: 'numeric', minute: '2-digit' });

/** A colour for a name: the same in every window. */
function hue(author) {
  let h = 0;
  for (const c of author) h = (h * 31 + c.codePointAt(0)) % 360;
  return h;
}

/** The text, with the web addresses in it as links. */
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

// Safari on phones lays its keyboard over the page instead of resizing it.
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

addEventListener('popstate', enter);
addEventListener('hashchange', enter);
enter();
// On phones that would bring up the keyboard before there is anything to read.
if (!matchMedia('(pointer: coarse)').matches) text.focus();
