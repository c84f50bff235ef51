// Curves, drawn by uPlot (global, see vendor/): a caption that reads the value below the pointer, and a table for whoever
// does not see the picture.
import { clock, count, make, setText, yearNow } from "./dom.js";

const HEIGHT = 230;
const ROWS = 24;

/** Return the value of a CSS variable, so that a chart has the colours of the page, by day and by night. */
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function label(value, axis) {
  return axis === "time" ? clock(value) : `${count(value)} ${axis}`;
}

function number(value) {
  return value.toPrecision(4);
}

/** Return the places of at most `most` of `length` points, evenly, the last one included. */
function spread(length, most) {
  if (length <= most) return [...Array(length).keys()];
  return [...Array(most).keys()].map((place) => Math.round((place * (length - 1)) / (most - 1)));
}

/** Return the newest value of a curve at a place of all curves' points, of which it has not every one. */
function until(values, place) {
  while (place >= 0 && values[place] == null) place--;
  return place < 0 ? "" : number(values[place]);
}

const DAY = { month: "short", day: "numeric" };
const TIME = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
const format = (parts) => new Intl.DateTimeFormat(undefined, parts);
const [dayOf, dayAndYearOf] = [format(DAY), format({ year: "numeric", ...DAY })];
const [timeOf, timeAndSecondsOf] = [format(TIME), format({ ...TIME, second: "2-digit" })];

/**
 * Name the marks of an axis of times, `step` seconds apart: a time of day, and below it the day where one begins; or days,
 * and below them the year. A year is named where it begins, and at the first mark unless it is the present one; in a file
 * always there.
 */
export function times(marks, step) {
  let [day, year] = ["", yearNow()];
  return marks.map((mark) => {
    const then = new Date(1000 * mark);
    const [dayBefore, yearBefore] = [day, year];
    [day, year] = [dayOf.format(then), then.getFullYear()];
    const isNewYear = year !== yearBefore;
    if (step >= 86400) return isNewYear ? `${day}\n${year}` : day;
    const time = (step < 60 ? timeAndSecondsOf : timeOf).format(then);
    if (day === dayBefore && !isNewYear) return time;
    return `${time}\n${isNewYear ? dayAndYearOf.format(then) : day}`;
  });
}

/**
 * Return the gaps of a curve, as pairs of neighbours of `places`: further apart than a twentieth of the axis, which is
 * `span` long, and than eight times what neighbours usually are.
 */
export function gaps(places, span) {
  const steps = places.slice(1).map((place, number) => place - places[number]);
  const usual = [...steps].sort((a, b) => a - b)[steps.length >> 1];
  return steps.flatMap((step, number) => (step > 8 * usual && step > span / 20 ? [places.slice(number, number + 2)] : []));
}

export class CurveChart {
  /** Draw into `figure`; `unit` is that of the values, `nothing` says why there are none. */
  constructor(figure, title, unit, nothing = "nothing yet") {
    this.title = title;
    this.unit = unit;
    this.nothing = nothing;
    this.curves = [];
    this.axis = "tokens";
    this.plot = null;
    this.reading = make("span", { className: "reading" });
    this.legend = make("span", { className: "legend" });
    this.picture = make("div", { className: "plot", tabIndex: 0 });
    this.picture.setAttribute("role", "img");
    this.picture.setAttribute("aria-label", `${title}: ${nothing}`);
    this.table = make("tbody");
    this.head = make("tr");
    this.details = make(
      "details",
      { hidden: true },
      make("summary", {}, "Values"),
      make(
        "div",
        { className: "scroll", tabIndex: 0, role: "region", ariaLabel: `${title}: values` },
        make("table", {}, make("thead", {}, this.head), this.table),
      ),
    );
    this.details.addEventListener("toggle", () => this.#fillTable());
    const caption = make("figcaption", {}, make("strong", {}, title), make("span", { className: "quiet" }, ` ${unit}`));
    figure.append(caption, this.legend, this.reading, this.picture, this.details);
    this.picture.addEventListener("keydown", (event) => this.#key(event));
    this.picture.addEventListener("blur", () => this.#read(null));
    new ResizeObserver(() => this.#fit()).observe(this.picture);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#rebuild());
  }

  /** Show curves, each `{name, colour, x, y, dots}`, by `axis`: "tokens", "time" or another word for the numbers. */
  show(curves, axis) {
    const shape = (given) => given.map((curve) => `${curve.name} ${curve.colour}`).join("\n");
    const isOther = axis !== this.axis || shape(curves) !== shape(this.curves);
    this.curves = curves;
    this.axis = axis;
    if (isOther || !this.plot) this.#rebuild();
    else this.plot.setData(this.#data());
    this.#describe();
    this.#fillTable();
  }

  #data() {
    if (!this.curves.length) return [[]];
    return uPlot.join(this.curves.map((curve) => [curve.x, curve.y]));
  }

  /** Return the ends of a curve's gaps in pixels, a little of the line left, so that a point between two is seen. */
  #gaps(plot, name) {
    const points = plot.data[0];
    const { x } = this.curves.find((curve) => curve.name === name);
    const found = gaps(x, points[points.length - 1] - points[0]);
    return found.map(([begin, end]) => [plot.valToPos(begin, "x", true) + 2, plot.valToPos(end, "x", true) - 2]);
  }

  #describe() {
    const told = this.curves.filter((curve) => curve.y.length).map((curve) => {
      const last = curve.y.length - 1;
      return `${curve.name}: from ${number(curve.y[0])} to ${number(curve.y[last])} at ${label(curve.x[last], this.axis)}`;
    });
    this.details.hidden = !told.length;
    const text = told.length ? `${this.title}, ${this.unit}. ${told.join(". ")}` : `${this.title}: ${this.nothing}`;
    if (this.picture.getAttribute("aria-label") !== text) this.picture.setAttribute("aria-label", text);
    this.#read(this.plot ? this.plot.cursor.idx : null);
  }

  #read(place) {
    const data = this.plot ? this.plot.data : [[]];
    if (place === null || place === undefined || place >= data[0].length) {
      const newest = this.curves.filter((curve) => curve.y.length).map((curve) => {
        const last = curve.y.length - 1;
        // what is measured now and then may be old
        return curve.dots ? `${number(curve.y[last])} at ${label(curve.x[last], this.axis)}` : number(curve.y[last]);
      });
      setText(this.reading, newest.length <= 2 ? newest.join(" · ") : "");
      return;
    }
    const values = this.curves.flatMap((curve, index) => {
      const value = data[index + 1][place];
      return value === null || value === undefined ? [] : [this.curves.length > 1 ? `${curve.name} ${number(value)}` : number(value)];
    });
    setText(this.reading, `${values.join(", ")} at ${label(data[0][place], this.axis)}`);
  }

  #key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!this.plot || !(event.key in steps)) return;
    const points = this.plot.data[0];
    if (!points.length) return;
    event.preventDefault();
    const now = this.plot.cursor.idx ?? points.length - 1;
    const place = Math.min(points.length - 1, Math.max(0, now + steps[event.key]));
    this.plot.setCursor({ left: this.plot.valToPos(points[place], "x"), top: 0 });
    this.#read(place);
  }

  #fillTable() {
    if (!this.details.open) return;
    const names = [this.axis === "time" ? "time" : this.axis, ...this.curves.map((curve) => curve.name)];
    this.head.replaceChildren(...names.map((name) => make("th", { scope: "col" }, name)));
    const data = this.#data();
    const rows = spread(data[0].length, ROWS).map((place) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, this.axis === "time" ? clock(data[0][place]) : count(data[0][place])),
        ...data.slice(1).map((values) => make("td", {}, until(values, place))),
      ),
    );
    this.table.replaceChildren(...rows);
  }

  #fit() {
    const width = this.picture.clientWidth;
    if (this.plot && width && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  #rebuild() {
    if (this.plot) this.plot.destroy();
    this.plot = null;
    this.legend.replaceChildren(
      ...this.curves.filter((curve) => curve.label || this.curves.length > 1).map((curve) => {
        const swatch = make("i");
        swatch.style.background = colour(curve.colour);
        return make("span", {}, swatch, curve.name);
      }),
    );
    if (!this.curves.some((curve) => curve.x.length)) {
      this.picture.replaceChildren(make("p", { className: "quiet" }, this.nothing));
      return;
    }
    this.picture.replaceChildren();
    const line = colour("--grid");
    const ink = colour("--quiet");
    const isTime = this.axis === "time";
    const across = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "12px system-ui" };
    const options = {
      width: this.picture.clientWidth || 300,
      height: HEIGHT,
      legend: { show: false },
      padding: [10, isTime ? 40 : 24, 0, 0], // the half of a mark at the right end
      cursor: { y: false, points: { size: 7 }, drag: { x: true, y: false } },
      scales: { x: { time: isTime } },
      axes: [
        isTime ? { ...across, space: 70, values: (_, marks, place, space, step) => times(marks, step) } : { ...across, values: (_, values) => values.map((value) => count(value)) },
        { ...across, size: 52, values: (_, values) => values.map((value) => String(Number(value.toPrecision(4)))) },
      ],
      series: [
        {},
        ...this.curves.map((curve) => ({
          label: curve.name,
          stroke: colour(curve.colour),
          width: curve.thin ? 1 : 2,
          dash: curve.dash,
          // joined curves lack each other's points, which is no gap of theirs
          gaps: (plot) => this.#gaps(plot, curve.name),
          points: {
            show: (plot, _, first, last) => last === first || (Boolean(curve.dots) && (last - first) * 12 <= plot.width),
            size: 6,
            fill: colour(curve.colour),
          },
        })),
      ],
      hooks: { setCursor: [(plot) => this.#read(plot.cursor.idx)] },
    };
    this.plot = new uPlot(options, this.#data(), this.picture);
  }
}
