/** Gives it to an element. */
export default class Overlay {
    constructor({ room }: {
        room: any;
    });
}
