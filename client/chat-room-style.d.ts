/**
 * Gives the style to a shadow root.
 * @param {ShadowRoot} root
 */
export declare function dress(root: ShadowRoot): void;
