// Table of peers: sorted by their work, and only what changed is touched. It never has more than a page of lines, since a
// browser lays out and paints all lines of a table whenever one of them changes.
import { ago, cardsWhereNarrow, make, NO_TIME, setText } from "./dom.js";

const FIRST = 25;
const PAGE = 50;

/** Return a speed without its unit, which is at the head of its column. */
export function perSecond(speed) {
  return speed.replace(/ tokens\/s$/, "");
}

/** Columns: name, class, and the text of a row's cell at a time (Unix seconds). */
const COLUMNS = [
  ["Name", "name", null],
  ["Share", "number share", (row) => row.share],
  ["Tokens", "number tokens", (row) => row.work],
  ["Tokens/s", "number speed", (row) => perSecond(row.speed)],
  ["Doing", "doing", (row) => row.doing || row.stages || (row.round >= 0 ? `round ${row.round}` : row.bootstrap && row.here ? "bootstrap" : "")],
  ["Trains on", "device", (row) => row.device],
  ["Heard", "number heard", (row, now) => (row.me || !row.heard ? "" : ago(now - row.heard))],
  ["Reached", "reached", (row) => row.reached],
];

export class PeerTable {
  /** Put a table into `section`, with only the columns of those names. */
  constructor(section, caption, names) {
    this.columns = COLUMNS.filter(([name]) => names.includes(name));
    this.body = make("tbody", { role: "rowgroup" });
    this.lines = new Map();
    this.rows = [];
    this.begin = 0;
    this.most = FIRST;
    const button = (text, act) => {
      const made = make("button", { type: "button" }, text);
      made.addEventListener("click", () => {
        act();
        this.draw();
      });
      return made;
    };
    this.more = button("", () => (this.most = PAGE));
    this.fewer = button(`Show the first ${FIRST}`, () => ([this.begin, this.most] = [0, FIRST]));
    this.previous = button("Previous", () => (this.begin -= PAGE));
    this.next = button("Next", () => (this.begin += PAGE));
    this.place = make("span", { className: "quiet", role: "status" });
    this.pages = make("div", { className: "pages", hidden: true }, this.more, this.fewer, this.previous, this.place, this.next);
    this.empty = make("p", { className: "quiet" });
    const heads = this.columns.map(([name, kind]) => make("th", { scope: "col", role: "columnheader", className: kind }, name));
    this.table = make(
      "table",
      { className: "peers", role: "table" },
      make("caption", { className: "unseen" }, caption),
      make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...heads)),
      this.body,
    );
    section.append(make("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: caption }, this.table), this.empty, this.pages);
    cardsWhereNarrow(this.table);
  }

  /** Show these rows, as [id, row], sorted by their work. */
  show(rows, nothing = "") {
    this.rows = rows.sort(([a, one], [b, other]) => other.tokens - one.tokens || (a < b ? -1 : 1));
    setText(this.empty, rows.length ? "" : nothing);
    this.empty.hidden = rows.length > 0;
    this.table.hidden = !rows.length;
    this.draw();
  }

  /** Return what is shown: a page, and the peer's own line, wherever it is. */
  #shown() {
    const page = this.rows.slice(this.begin, this.begin + this.most);
    const mine = this.rows.findIndex(([, row]) => row.me);
    if (mine >= this.begin + this.most) page.push(this.rows[mine]);
    else if (mine >= 0 && mine < this.begin) page.unshift(this.rows[mine]);
    return page;
  }

  draw() {
    while (this.begin > 0 && this.begin >= this.rows.length) this.begin -= PAGE;
    const now = Date.now() / 1000;
    const shown = this.#shown();
    const most = Math.max(1, this.rows.length ? this.rows[0][1].tokens : 0);
    const wanted = new Set(shown.map(([id]) => id));
    for (const [id, line] of this.lines) {
      if (wanted.has(id)) continue;
      line.remove();
      this.lines.delete(id);
    }
    shown.forEach(([id, row], place) => {
      let line = this.lines.get(id);
      if (!line) {
        line = this.#line();
        this.lines.set(id, line);
      }
      this.#fill(line, row, now, row.tokens / most);
      if (this.body.children[place] !== line) this.body.insertBefore(line, this.body.children[place] ?? null);
    });
    this.#drawPages();
  }

  #drawPages() {
    const number = this.rows.length;
    const isPaged = this.most === PAGE;
    this.pages.hidden = number <= FIRST;
    this.more.hidden = isPaged;
    setText(this.more, number <= PAGE ? `Show all ${number}` : `Show ${PAGE} of ${number}`);
    this.fewer.hidden = !isPaged;
    for (const each of [this.previous, this.place, this.next]) each.hidden = !isPaged || number <= PAGE;
    this.previous.disabled = this.begin === 0;
    this.next.disabled = this.begin + PAGE >= number;
    setText(this.place, `${this.begin + 1} to ${Math.min(number, this.begin + PAGE)} of ${number}`);
  }

  /** Let the ages grow. */
  tick() {
    const now = Date.now() / 1000;
    const place = this.columns.findIndex(([name]) => name === "Heard");
    if (place < 0) return;
    for (const [id, row] of this.#shown()) {
      const line = this.lines.get(id);
      if (line) setText(line.children[place], this.columns[place][2](row, now) || (row.me ? "" : NO_TIME));
    }
  }

  #line() {
    // with roles: on a phone a line is laid out as a card, which would cost a table its meaning for some screen readers
    const line = make("tr", { role: "row" });
    for (const [, kind] of this.columns) {
      if (kind !== "name") line.append(make("td", { className: kind, role: "cell" }));
      else line.append(make("th", { scope: "row", role: "rowheader" }, make("bdi"), " ", make("span", { className: "quiet" }), " ", make("span", { className: "you" })));
    }
    return line;
  }

  #fill(line, row, now, part) {
    line.classList.toggle("me", row.me);
    const [name, short, you] = line.firstChild.children;
    setText(name, row.name);
    setText(short, row.short);
    setText(you, row.me ? "you" : "");
    const width = `${(100 * part).toFixed(1)}%`;
    if (line.firstChild.style.getPropertyValue("--part") !== width) line.firstChild.style.setProperty("--part", width);
    this.columns.forEach(([, , text], place) => {
      if (text) setText(line.children[place], text(row, now) || "");
    });
  }
}
