/** Links in messages. A page loads this module when a message may have one. */
import { make } from './chat-room-tools.js';

const LINK = /(https?:\/\/[^\s<>"]+[^\s<>".,:;!?')\]]|\bwww\.[^\s<>"]+[^\s<>".,:;!?')\]]|(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[a-z]{2,24}\b)/i;

export default class Links {
  /** Makes links of the addresses of web pages and mailboxes in an element's text. */
  link(/** @type {Element} */ element) {
    const parts = (element.textContent ?? '').split(LINK);
    element.replaceChildren(...parts.map((part, i) => {
      if (i % 2 === 0) return part;
      const href = /^https?:/i.test(part) ? part : /^www\./i.test(part) ? `https://${part}` : `mailto:${part}`;
      if (!URL.canParse(href)) return part;
      return make('a', { href, target: '_blank', rel: 'noopener noreferrer nofollow' }, part);
    }));
  }
}
