/**
 * The look of `<chat-room>`. The colors follow the page's `color-scheme`. A page may set the properties that begin with
 * `--chat-`, and style the parts. It is a constructed style sheet, because a strict Content-Security-Policy forbids others.
 */
const css = `
:host {
  --background: var(--chat-background, light-dark(#fbfaf6, #151b19));
  --text: var(--chat-text, light-dark(#1b2420, #e8eeea));
  --muted: var(--chat-muted, light-dark(#57655e, #9fb0a8));
  --line: var(--chat-line, light-dark(#dde3dd, #29332f));
  --field: var(--chat-field, light-dark(#fff, #1c2421));
  --field-line: light-dark(#87948d, #66756d);
  --bubble: var(--chat-bubble, light-dark(#eef1ec, #222b28));
  --bubble-text: var(--chat-bubble-text, var(--text));
  --mine: var(--chat-mine, light-dark(#0e6957, #17604f));
  --mine-text: var(--chat-mine-text, light-dark(#fff, #f4fffb));
  --mine-muted: var(--chat-mine-text, light-dark(#cbe8de, #b4ddcf));
  --accent: var(--chat-accent, light-dark(#0e6957, #62d3b3));
  --accent-text: var(--chat-accent-text, light-dark(#fff, #06201a));
  --ok: light-dark(#1a9c63, #3ecf8e);
  --busy: light-dark(#c98206, #f0b23c);
  --bad: light-dark(#cf3f36, #ff7a70);
  --warn: light-dark(#fff3d6, #33290f);
  --warn-line: light-dark(#ecd08a, #5c4a1a);
  --warn-text: light-dark(#523c05, #f7e3b2);
  --shadow: light-dark(rgb(20 40 30 / 14%), rgb(0 0 0 / 50%));
  --radius: var(--chat-radius, 1.15rem);

  display: block;
  container-type: inline-size;
  block-size: 32rem;
  min-block-size: 12rem;
  overflow: hidden;
  border: 1px solid var(--line);
  border-radius: 0.9rem;
  background: var(--background);
  color: var(--text);
  font: var(--chat-font, 1rem/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif);
  text-align: start;
}
:host([hidden]), [hidden] { display: none !important; }

* { box-sizing: border-box; }

/* For screen readers only. */
.hidden {
  position: absolute;
  width: 1px;
  height: 1px;
  overflow: hidden;
  clip-path: inset(50%);
  white-space: nowrap;
}

h2, p, ol, ul { margin: 0; padding: 0; }
ol, ul { list-style: none; }
svg { display: block; fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linecap: round; stroke-linejoin: round; }
button, input, textarea { font: inherit; color: inherit; }
button { cursor: pointer; border: 0; background: none; touch-action: manipulation; }
a { color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }

#room {
  position: relative;
  block-size: 100%;
  display: grid;
  grid: auto minmax(0, 1fr) auto / minmax(0, 1fr);
}

/* ---- the header ---- */

#header {
  display: flex;
  align-items: center;
  gap: 0.55rem;
  padding: 0.7rem 1rem;
  padding-block-start: calc(0.7rem + env(safe-area-inset-top));
  border-block-end: 1px solid var(--line);
}
#where { flex: 1; min-inline-size: 0; }
#title { font-size: 1.12rem; font-weight: 650; line-height: 1.3; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }

.state { overflow: hidden; display: flex; align-items: center; font-size: 0.85rem; color: var(--muted); white-space: pre; }
.dot { flex: none; inline-size: 0.55rem; block-size: 0.55rem; margin-inline-end: 0.4rem; border-radius: 50%; background: var(--busy); }
[data-state="open"] .dot { background: var(--ok); }
[data-state="closed"] .dot, [data-state="offline"] .dot { background: var(--bad); border-radius: 0.1rem; }
#countdown { font-variant-numeric: tabular-nums; }

#who, #bell {
  flex: none;
  display: flex;
  align-items: center;
  justify-content: center;
  gap: 0.4rem;
  min-block-size: 2.5rem;
  min-inline-size: 2.5rem;
  padding: 0;
  border: 1px solid var(--line);
  border-radius: 2rem;
  background: var(--field);
  font-size: 0.9rem;
  font-weight: 550;
  font-variant-numeric: tabular-nums;
}
#who { padding-inline: 0.8rem; }
#who svg, #bell svg { inline-size: 1.2rem; }
#who[aria-expanded="true"], #bell[aria-expanded="true"] { border-color: var(--accent); color: var(--accent); }
#bell:not(.on) .waves { display: none; }
@media (hover: hover) {
  #who:hover, #bell:hover { background: var(--bubble); }
}

/* ---- panels: who is here, notifications ---- */

.panel { padding: 1rem; overflow-y: auto; overscroll-behavior: contain; scrollbar-width: thin; scrollbar-color: var(--line) transparent; }
.panel .heading { margin-block-end: 0.6rem; font-size: 0.85rem; font-weight: 600; color: var(--muted); }
.panel:not(.open) { display: none; }
.panel.open {
  position: absolute;
  z-index: 2;
  inset-block-start: calc(4.1rem + env(safe-area-inset-top));
  inset-inline-end: 0.75rem;
  inline-size: min(17rem, calc(100% - 1.5rem));
  max-block-size: calc(100% - 5rem);
  border: 1px solid var(--line);
  border-radius: 1.1rem;
  background: var(--background);
  box-shadow: 0 18px 50px var(--shadow);
}
#people li { display: flex; align-items: center; gap: 0.6rem; padding-block: 0.3rem; }
#people .avatar { align-self: center; inline-size: 1.8rem; block-size: 1.8rem; font-size: 0.82rem; }
#people .name { min-inline-size: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-weight: 550; }
.windows { flex: 1 0 auto; font-size: 0.78rem; color: var(--muted); }
#others { padding-block: 0.3rem; font-size: 0.85rem; color: var(--muted); }
#alerts label { display: flex; align-items: center; gap: 0.6rem; min-block-size: 2.2rem; }
#alerts input { inline-size: 1.15rem; block-size: 1.15rem; margin: 0; accent-color: var(--accent); }
#alerts p { margin-block-start: 0.4rem; font-size: 0.82rem; color: var(--muted); }

/* Who is here stands beside the messages where there is space, and over them elsewhere. */
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

/* ---- the messages ---- */

#main { min-block-size: 0; position: relative; display: flex; flex-direction: column; }
#log {
  flex: 1;
  min-block-size: 0;
  overflow-y: auto;
  overflow-anchor: none; /* the list does that itself, in every browser */
  overscroll-behavior: contain;
  display: flex;
  flex-direction: column;
  outline-offset: -3px;
  scrollbar-width: thin;
  scrollbar-color: var(--line) transparent;
}
#messages { margin-block-start: auto; padding: 1rem; }

.message { display: flex; align-items: flex-end; gap: 0.55rem; margin-block-start: 0.85rem; }
.message:first-child { margin-block-start: 0; }
.message.follows { margin-block-start: 0.2rem; }
.mine { justify-content: flex-end; }

.avatar {
  flex: none;
  align-self: flex-start;
  inline-size: 2.1rem;
  block-size: 2.1rem;
  display: grid;
  place-items: center;
  overflow: hidden;
  border-radius: 50%;
  background: light-dark(oklch(0.88 0.075 var(--hue)), oklch(0.38 0.07 var(--hue)));
  color: light-dark(oklch(0.36 0.1 var(--hue)), oklch(0.92 0.06 var(--hue)));
  font-weight: 650;
  font-size: 0.95rem;
}
.follows .avatar { visibility: hidden; block-size: 0; }
.mine .avatar { display: none; }

.bubble {
  max-inline-size: min(34rem, 82%);
  min-inline-size: 0;
  padding: 0.45rem 0.8rem 0.5rem;
  border: 1px solid transparent; /* visible in forced colors */
  border-radius: var(--radius);
  border-start-start-radius: 0.35rem;
  background: var(--bubble);
  color: var(--bubble-text);
}
.follows .bubble { border-start-start-radius: var(--radius); }
.mine .bubble {
  background: var(--mine);
  color: var(--mine-text);
  border-start-start-radius: var(--radius);
  border-end-end-radius: 0.35rem;
}

.from {
  overflow: hidden;
  overflow-wrap: anywhere;
  font-size: 0.85rem;
  font-weight: 650;
  color: light-dark(oklch(0.46 0.12 var(--hue)), oklch(0.82 0.1 var(--hue)));
}
.mine .from, .follows .from {
  position: absolute;
  inline-size: 1px;
  block-size: 1px;
  overflow: hidden;
  clip-path: inset(50%);
}
.text { display: inline; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; }
.mine a { color: inherit; }
.when { float: inline-end; margin: 0.35rem 0 -0.15rem; margin-inline-start: 0.7rem; font-size: 0.72rem; font-variant-numeric: tabular-nums; color: var(--muted); }
.when:empty { display: none; }
.mine .when { color: var(--mine-muted); }

/* Messages without an answer. A quick answer must not flicker. */
.pending .text { opacity: 0.8; transition: opacity 0.2s 0.3s; }
.gone .bubble { background: var(--warn); border-color: var(--warn-line); color: var(--warn-text); }
.gone .when { color: inherit; }
.failed { clear: both; margin-block-start: 0.45rem; padding-block-start: 0.35rem; border-block-start: 1px solid var(--warn-line); font-size: 0.85rem; }
.failed button { padding: 0.2rem; font-weight: 650; text-decoration: underline; text-underline-offset: 0.15em; }

/* What the site says has a shape that no visitor's message has, whatever their name is. */
.official { justify-content: center; }
.official .bubble {
  max-inline-size: min(40rem, 100%);
  border: 1px solid var(--accent);
  border-inline-start-width: 0.35rem;
  border-radius: 0.5rem;
  background: none;
  color: var(--text);
}
.official .from { display: flex; gap: 0.35rem; align-items: center; color: var(--accent); }
.official .from svg { inline-size: 1rem; }

.notice { margin: 1rem auto; text-align: center; font-size: 0.82rem; color: var(--muted); overflow-wrap: anywhere; }
.notice p { overflow: hidden; }
.notice small { display: block; font-size: 0.75rem; font-weight: 400; }
.missed p {
  inline-size: fit-content;
  max-inline-size: 100%;
  margin-inline: auto;
  padding: 0.35rem 1rem;
  border: 1px dashed var(--warn-line);
  border-radius: 0.9rem;
  background: var(--warn);
  color: var(--warn-text);
  font-weight: 600;
  text-wrap: balance;
}
.unread { display: flex; align-items: center; gap: 0.6rem; margin-block: 0.9rem; font-size: 0.78rem; font-weight: 650; color: var(--accent); }
.unread::before, .unread::after { content: ""; flex: 1; border-block-start: 1px solid currentColor; opacity: 0.5; }

#empty {
  position: absolute;
  inset: 0;
  display: flex;
  flex-direction: column;
  align-items: center;
  justify-content: center;
  gap: 0.5rem;
  padding: 1.5rem;
  text-align: center;
  text-wrap: balance;
  color: var(--muted);
}
#empty .heading { font-size: 1.15rem; font-weight: 650; color: var(--text); }

#jump {
  position: absolute;
  inset-block-end: 0.75rem;
  inset-inline: 0;
  inline-size: fit-content;
  margin-inline: auto;
  display: flex;
  align-items: center;
  gap: 0.3rem;
  min-block-size: 2.4rem;
  padding: 0 1rem;
  border-radius: 2rem;
  background: var(--accent);
  color: var(--accent-text);
  font-size: 0.9rem;
  font-weight: 600;
  box-shadow: 0 4px 16px rgb(0 0 0 / 25%);
}
#jump svg { inline-size: 1rem; stroke-width: 2; }

/* ---- the composer ---- */

#footer { padding: 0.6rem 1rem; padding-block-end: calc(0.6rem + env(safe-area-inset-bottom)); border-block-start: 1px solid var(--line); }

#trouble {
  display: flex;
  flex-wrap: wrap;
  align-items: center;
  gap: 0.4rem 0.75rem;
  padding: 0.55rem;
  padding-inline-start: 0.9rem;
  border: 1px solid var(--warn-line);
  border-radius: 0.9rem;
  background: var(--warn);
  color: var(--warn-text);
  font-size: 0.9rem;
}
#why { flex: 1 1 12rem; text-wrap: balance; overflow-wrap: anywhere; }
#trouble :is(button, a) {
  display: flex;
  align-items: center;
  min-block-size: 2.25rem;
  padding: 0 0.85rem;
  border: 1px solid currentColor;
  border-radius: 2rem;
  color: inherit;
  font-weight: 600;
  text-decoration: none;
  white-space: nowrap;
}

#hint { font-size: 0.85rem; color: var(--muted); overflow-wrap: anywhere; }
#hint:not(:empty) { margin: 0 0.2rem 0.45rem; }

#trouble:not([hidden]) ~ #compose, #trouble:not([hidden]) ~ #hint:not(:empty) { margin-block-start: 0.6rem; }
#compose { display: flex; align-items: flex-end; gap: 0.5rem; }
#text {
  flex: 1;
  min-inline-size: 0;
  min-block-size: 2.75rem;
  max-block-size: min(12rem, 35dvh);
  padding: 0.6rem 1rem;
  border: 1px solid var(--field-line);
  border-radius: 1.4rem;
  background: var(--field);
  resize: none;
  field-sizing: content;
  scrollbar-width: thin;
  scrollbar-color: var(--field-line) transparent;
}
#text::placeholder { color: var(--muted); opacity: 1; }
#text:focus-visible { outline-offset: -1px; outline-width: 2px; }
#text[aria-invalid="true"] { border-color: var(--bad); }

#send {
  flex: none;
  display: grid;
  place-items: center;
  inline-size: 2.75rem;
  block-size: 2.75rem;
  padding: 0;
  border-radius: 50%;
  background: var(--bubble);
  color: var(--muted);
}
#send svg { inline-size: 1.4rem; stroke-width: 2.2; }
#room:not(.closed) #text:not(:placeholder-shown) + #send { background: var(--accent); color: var(--accent-text); }

#below {
  display: flex;
  align-items: center;
  justify-content: space-between;
  gap: 1rem;
  margin: 0.35rem 0.2rem 0;
  font-size: 0.85rem;
  color: var(--muted);
}
#me { display: flex; align-items: baseline; gap: 0.2rem; min-inline-size: 0; }
#name {
  field-sizing: content;
  min-inline-size: 4rem;
  max-inline-size: 14rem;
  padding: 0.15rem 0.3rem;
  border: 1px solid transparent;
  border-block-end: 1px dashed var(--muted);
  background: none;
  color: var(--text);
  font-weight: 600;
}
#name:focus { border-radius: 0.4rem; background: var(--field); }
#name:read-only { border-block-end-color: transparent; }
#count { font-variant-numeric: tabular-nums; color: var(--text); }
#help:has(+ #count:not([hidden])) { display: none; }
::slotted([slot="below"]) { margin-inline-start: auto; }

/* ---- kinds ---- */

.readonly #footer:not(:has(#trouble:not([hidden]))) { display: none; }
.readonly :is(#hint, #compose, #below) { display: none; }

/* For overlays on a video: nothing but messages, legible on everything. */
:host([transparent]) { border: 0; background: none; }
.transparent :is(#bell, #who, .state, #jump, #empty, .panel, .when, .notice:not(.missed), .unread, #footer) { display: none; }
.transparent #header { position: absolute; clip-path: inset(50%); block-size: 1px; overflow: hidden; } /* a page has a heading */
.transparent #log { overflow: hidden; }
.transparent .bubble, .transparent .mine .bubble { background: rgb(12 18 16 / 72%); color: #fff; text-shadow: 0 1px 2px #000; }
.transparent .from { color: oklch(0.85 0.1 var(--hue)); }
.transparent .official .from, .transparent a { color: #8fe6cd; }

/* ---- where it is shown ---- */

@container (inline-size < 22.4rem) {
  #countdown { display: none; }
}
@container (inline-size < 30rem) {
  .bubble { max-inline-size: 86%; }
}
@container (inline-size < 40rem) {
  #help { display: none; }
}
/* Touch screens have no Enter key to explain, and zoom into fields whose letters are smaller. */
@media (pointer: coarse) {
  #help { display: none; }
  #name { font-size: 1rem; }
}
@media (prefers-reduced-motion: no-preference) {
  .arrives { animation: arrive 0.18s ease-out; }
  [data-state="connecting"] .dot, [data-state="waiting"] .dot { animation: pulse 1.2s ease-in-out infinite; }
  button, #text { transition: background-color 0.15s, color 0.15s; }
  @keyframes arrive { from { opacity: 0; translate: 0 0.4rem; } }
  @keyframes pulse { 50% { opacity: 0.35; } }
}
`;

/**
 * Gives the style to a shadow root.
 * @param {ShadowRoot} root
 */
export function dress(root) {
  sheet ??= new CSSStyleSheet();
  if (!sheet.cssRules.length) sheet.replaceSync(css);
  root.adoptedStyleSheets = [sheet];
}

/** @type {CSSStyleSheet | undefined} */
let sheet;
