/** Rooms around a <chat-room>: one for each ?room= or #fragment of the page's URL. */
import '/chat-client/chat-room.js';

const MAX_ROOM = 40;

const $ = (id) => document.getElementById(id);
const chat = document.querySelector('chat-room');
let room = '';
/** Whether the visitor has chosen a room in the dialog. */
let went = false;

/** Reads and writes the browser's storage, if the browser allows it. */
const memory = {
  get(key) { try { return localStorage.getItem(key) ?? ''; } catch { return ''; } },
  set(key, value) { try { localStorage.setItem(key, value); } catch { /* only a convenience */ } },
};

// ---- rooms ----

/**
 * Returns a valid room: one line, without characters that reverse the text beside it. A slash, or a name of dots, would lead
 * out of /chat/.
 */
function cleanRoom(s) {
  const line = s.normalize().replace(/\p{Bidi_C}/gu, '').replace(/[/\\]/g, '-').replace(/[\p{Cc}\p{Cs}\s]+/gu, ' ').trim();
  const name = [...line].slice(0, MAX_ROOM).join('').trim();
  return /^\.*$/.test(name) ? 'lobby' : name;
}

/** Returns the room in the page's URL: ?room=garden or #garden. */
function roomOfURL() {
  const { hash, searchParams } = new URL(location);
  let name = searchParams.get('room') ?? hash.slice(1);
  if (!searchParams.has('room')) {
    try { name = decodeURIComponent(name); } catch { /* a literal % */ }
  }
  return cleanRoom(name);
}

function urlOf(name) {
  const url = new URL(location);
  url.hash = '';
  url.searchParams.set('room', name);
  return url;
}

/** Joins the room in the URL. */
function enter() {
  if (room === roomOfURL()) return;
  room = roomOfURL();
  remember(room);
  $('room').textContent = room;
  chat.src = `/chat/${encodeURIComponent(room)}`;
  title();
}

function goTo(name) {
  went = true;
  history.pushState(null, '', urlOf(name));
  enter();
}

const recentRooms = () => memory.get('chat.rooms').split('\n').map((s) => s && cleanRoom(s)).filter(Boolean);

function remember(name) {
  memory.set('chat.rooms', [name, ...recentRooms().filter((r) => r !== name)].slice(0, 6).join('\n'));
}

$('target').maxLength = MAX_ROOM;
$('switch').addEventListener('click', () => {
  $('target').value = '';
  const others = recentRooms().filter((r) => r !== room);
  $('recent').hidden = others.length === 0;
  $('recent').querySelector('ul').replaceChildren(...others.map((r) => {
    const item = $('recent-room').content.firstElementChild.cloneNode(true);
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
    goTo(link.textContent);
    $('rooms').close();
  } else if (event.target === $('rooms')) {
    $('rooms').close(); // a click outside the dialog
  }
});
// A dialog gives the focus back to the button that opened it. A visitor of a new room wants to write.
$('rooms').addEventListener('close', () => {
  if (went) chat.focus();
  went = false;
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
    $('copied').textContent = 'The link to this room is copied.';
    setTimeout(() => {
      label.textContent = before;
      $('copied').textContent = '';
    }, 2500);
  });
}

// ---- the page ----

function title() {
  document.title = `${chat.unread ? `(${chat.unread}) ` : ''}${room} · chat`;
}
chat.addEventListener('unread', title);

// Safari on phones covers the page with its keyboard instead of resizing it.
function fit() {
  const { height, offsetTop, scale } = visualViewport;
  if (scale > 1) return; // zoomed in
  document.documentElement.style.setProperty('--height', `${height}px`);
  document.documentElement.style.setProperty('--top', `${offsetTop}px`);
}
if (window.visualViewport && matchMedia('(pointer: coarse)').matches) {
  visualViewport.addEventListener('resize', fit);
  visualViewport.addEventListener('scroll', fit);
}

addEventListener('popstate', enter);
addEventListener('hashchange', enter);
enter();
// On phones this would open the keyboard before there is anything to read.
if (!matchMedia('(pointer: coarse)').matches) chat.focus();
