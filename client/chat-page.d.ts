/** The script of chat.html: makes a `<chat-room>` of the page's query. */
import './chat-room.js';
