export default class More {
    #private;
    constructor(_ui: any, speaker: any);
    /** Returns the phrases for the end of a connection, or a refusal: the first that there is says most. */
    why({ code, status }: {
        code: any;
        status: any;
    }, exact: any): any[];
    /** Says when messages were missed. `away` is when the connection was lost, if it was. */
    when({ count, restarted }: {
        count: any;
        restarted: any;
    }, away: any): any;
}
