// What a page in one file writes when it is opened: moments in the reader's time, and the lengths of bars.
import { cardsWhereNarrow, keepDates } from "./dom.js";

// With its year and zone, since a file is read at another time, and by others.
const moments = new Intl.DateTimeFormat(undefined, {
  year: "numeric",
  month: "short",
  day: "numeric",
  hour: "2-digit",
  minute: "2-digit",
  hourCycle: "h23",
  timeZoneName: "short",
});

/** Return what the file has to show. */
export function data() {
  return JSON.parse(document.getElementById("data").textContent);
}

/** Finish the page. */
export function finish() {
  keepDates();
  document.querySelectorAll(".peers").forEach(cardsWhereNarrow);
  for (const moment of document.querySelectorAll("time[datetime]")) {
    moment.title = moment.textContent;
    moment.textContent = moments.format(new Date(moment.dateTime));
  }
  for (const bar of document.querySelectorAll("[data-part]")) bar.style.setProperty("--part", bar.dataset.part);
}
