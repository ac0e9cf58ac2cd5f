/**
 * The look of `<chat-room>`, in the page's `color-scheme`. A page may set the properties that begin with `--chat-`. It is a
 * constructed style sheet, because a strict Content-Security-Policy forbids others.
 */
export default `
:host {
  --background: var(--chat-background, light-dark(#fbfaf6, #151b19));
  --text: var(--chat-text, light-dark(#1b2420, #e8eeea));
  --muted: var(--chat-muted, light-dark(#57655e, #9fb0a8));
  --line: var(--chat-line, light-dark(#dde3dd, #29332f));
  --field: var(--chat-field, light-dark(#fff, #1c2421));
  --field-line: color-mix(in srgb, var(--text) 50%, var(--field));
  --bubble: var(--chat-bubble, light-dark(#eef1ec, #222b28));
  --bubble-text: var(--chat-bubble-text, var(--text));
  --mine: var(--chat-mine, light-dark(#0e6957, #17604f));
  --mine-text: var(--chat-mine-text, light-dark(#fff, #f4fffb));
  --mine-muted: color-mix(in srgb, var(--mine-text) 80%, transparent);
  --accent: var(--chat-accent, light-dark(#0e6957, #62d3b3));
  --accent-text: var(--chat-accent-text, light-dark(#fff, #06201a));
  --ok: #1a9c63;
  --busy: #c98206;
  --bad: light-dark(#cf3f36, #ff7a70);
  --warn: light-dark(#fff3d6, #33290f);
  --warn-text: light-dark(#523c05, #f7e3b2);
  --warn-line: color-mix(in srgb, var(--warn-text) 30%, var(--warn));
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
  font: var(--chat-font, 1rem/1.45 system-ui, sans-serif);
  text-align: start;
  scrollbar-color: var(--line) transparent;
}
:host([transparent]) { border: 0; background: none; }
:host([hidden]), [hidden] { display: none !important; }

* { box-sizing: border-box; }

/* For screen readers only. */
.hidden, .mine .from, .follows .from { position: absolute; inline-size: 1px; block-size: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }

h2, p, ol, ul { margin: 0; padding: 0; list-style: none; }
svg { display: block; fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linecap: round; stroke-linejoin: round; }
button, input, textarea { font: inherit; color: inherit; }
button { cursor: pointer; border: 0; background: none; }
a { color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }

#room {
  position: relative;
  block-size: 100%;
  display: grid;
  grid: auto minmax(0, 1fr) auto / minmax(0, 1fr);
}

/* the header */

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
#who svg, #bell svg { inline-size: 1.2rem; }

/* the messages */

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
  max-inline-size: min(34rem, 85%);
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
  overflow: hidden; /* marks that are piled up */
  overflow-wrap: anywhere;
  font-size: 0.85rem;
  font-weight: 650;
  color: light-dark(oklch(0.46 0.12 var(--hue)), oklch(0.82 0.1 var(--hue)));
}
.text { display: inline; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; }
.mine a { color: inherit; }
.when { float: inline-end; margin: 0.35rem 0 -0.15rem; margin-inline-start: 0.7rem; font-size: 0.72rem; font-variant-numeric: tabular-nums; color: var(--muted); }
.when:empty { display: none; }
.mine .when { color: var(--mine-muted); }

/* A quick answer must not flicker. */
.pending .text { opacity: 0.8; transition: opacity 0.2s 0.3s; }
.gone .bubble, .missed p, #trouble { background: var(--warn); border: 1px solid var(--warn-line); color: var(--warn-text); }
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
  border-radius: 0.9rem;
  font-weight: 600;
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

/* the composer */

#footer { padding: 0.6rem 1rem; padding-block-end: calc(0.6rem + env(safe-area-inset-bottom)); border-block-start: 1px solid var(--line); }

#trouble {
  display: flex;
  flex-wrap: wrap;
  align-items: center;
  gap: 0.4rem 0.75rem;
  padding: 0.55rem;
  padding-inline-start: 0.9rem;
  border-radius: 0.9rem;
  font-size: 0.9rem;
}
#why { flex: 1 1 12rem; overflow-wrap: anywhere; }
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
::slotted([slot="below"]) { margin-inline-start: auto; }

/* kinds */

.readonly #footer:not(:has(#trouble:not([hidden]))) { display: none; }
.readonly :is(#hint, #compose, #below, [data-text=emptyText]), :has(#trouble:not([hidden])) #empty { display: none; }

/* where it is shown */

@container (inline-size < 22.4rem) {
  #countdown { display: none; }
}
@container (inline-size < 40rem) {
  #help { display: none; }
}
/* Touch screens have no Enter key to explain. */
@media (pointer: coarse) {
  #help { display: none; }
}
@media (prefers-reduced-motion: no-preference) {
  .arrives { animation: arrive 0.18s ease-out; }
  [data-state="connecting"] .dot, [data-state="waiting"] .dot { animation: pulse 1.2s ease-in-out infinite; }
  @keyframes arrive { from { opacity: 0; translate: 0 0.4rem; } }
  @keyframes pulse { 50% { opacity: 0.35; } }
}
`;
