export default class Links {
    /** Makes links of the addresses of web pages and mailboxes in an element's text. */
    link(/** @type {Element} */ element: Element): void;
}
