// Elements and words. Text from other peers only ever becomes text: nothing here parses markup.

export const NO_TIME = "–";

/** Return an element with properties and children; strings become text. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Set an element's text, if it is another one: an unchanged page costs no layout. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Replace the name and fact pairs of a `dl`. */
export function setFacts(list, facts) {
  const shown = facts.filter(([, fact]) => fact);
  while (list.children.length > 2 * shown.length) list.lastChild.remove();
  while (list.children.length < 2 * shown.length) list.append(make("dt"), make("dd"));
  shown.forEach(([name, fact], number) => {
    setText(list.children[2 * number], name);
    setText(list.children[2 * number + 1], fact);
  });
}

const CARDS_REM = 54;

/** Lay the lines of a table of peers out as cards while what is around it has no room for its columns. */
export function cardsWhereNarrow(table) {
  const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
  // not a container query: that would cost each update of the table a tenth more
  new ResizeObserver(([around]) => {
    table.classList.toggle("cards", around.contentRect.width < CARDS_REM * rem);
  }).observe(table.parentElement);
}

/** Format a number of tokens, such as 1.2 M. */
export function count(number) {
  for (const unit of ["", " k", " M", " G", " T"]) {
    if (Math.abs(number) < 999.5) return `${Number(number.toPrecision(3))}${unit}`;
    number /= 1000;
  }
  return `${number.toFixed(0)} P`;
}

/** Say coarsely how long ago something was. */
export function ago(seconds) {
  if (seconds < 2) return "now";
  for (const [unit, length, below] of [["s", 1, 60], ["min", 60, 3600], ["h", 3600, 172800]]) {
    if (seconds < below) return `${Math.floor(seconds / length)} ${unit} ago`;
  }
  return `${Math.floor(seconds / 86400)} d ago`;
}

const TIME = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
const timeOfDay = new Intl.DateTimeFormat(undefined, TIME);
const dayAndTime = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric", ...TIME });
const moment = new Intl.DateTimeFormat(undefined, { year: "numeric", month: "short", day: "numeric", ...TIME });
let isKept = false;

/** Write all times with their day and year from now on: a file is read on another day than it was made. */
export function keepDates() {
  isKept = true;
}

/** Return the year that need not be named: this one, and none in a file. */
export function yearNow() {
  return isKept ? 0 : new Date().getFullYear();
}

/** Format a time of day, with the date if it is not today's, and with the year if it is another one. */
export function clock(time) {
  const then = new Date(1000 * time);
  if (then.getFullYear() !== yearNow()) return moment.format(then);
  const sameDay = then.toDateString() === new Date().toDateString();
  return (sameDay ? timeOfDay : dayAndTime).format(then);
}
