/** The script of chat.html: makes a `<chat-room>` of the page's query. */
import './chat-room.js';

const query = new URLSearchParams(location.search);
const src = query.get('src') ?? '';
const transparent = query.has('transparent');

const sheet = new CSSStyleSheet();
sheet.replaceSync(`
  html, body { height: 100%; margin: 0; }
  main { height: 100dvh; }
  chat-room { block-size: 100%; border: 0; border-radius: 0; }
  h1 { margin: 0; font-size: 1.12rem; line-height: 1.3; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
  .transparent, .transparent body { background: none; }
`);
document.adoptedStyleSheets = [sheet];

const theme = query.get('theme');
if (theme === 'light' || theme === 'dark') document.documentElement.style.colorScheme = theme;
// A page whose scheme differs from that of the page around it has a background, even if it has none.
if (transparent) document.documentElement.style.colorScheme = 'normal';
document.documentElement.classList.toggle('transparent', transparent);

const room = document.createElement('chat-room');
for (const name of ['name', 'readonly', 'transparent', 'lang', 'dir']) {
  const value = query.get(name);
  if (value !== null) room.setAttribute(name, value);
}
document.documentElement.lang = query.get('lang') || navigator.language || 'en';

// A link to this page must not show a chat of another site as if it were one of this site.
const url = URL.canParse(src, location.href) ? new URL(src, location.href) : null;
if (src && url?.origin === location.origin) room.setAttribute('src', url.pathname + url.search);

let title = url?.pathname.split('/').filter(Boolean).at(-1) ?? 'chat';
try { title = decodeURIComponent(title); } catch { /* a literal % */ }
const heading = document.createElement('h1');
heading.slot = 'header';
heading.dir = 'auto';
heading.textContent = title;
room.append(heading);
room.addEventListener('unread', () => showTitle());

function showTitle() {
  const { unread } = /** @type {import('./chat-room.js').ChatRoom} */ (room);
  document.title = (unread ? `(${unread}) ` : '') + title;
}
showTitle();

const main = document.createElement('main');
main.append(room);
document.body.append(main);
