// What a page in one file writes when it is opened: moments in the reader's time, and the lengths of bars.
import { clock } from "./dom.js";

/** Return what the file has to show. */
export function data() {
  return JSON.parse(document.getElementById("data").textContent);
}

/** Finish the page. */
export function finish() {
  for (const moment of document.querySelectorAll("time[datetime]")) {
    moment.title = moment.textContent;
    moment.textContent = clock(Date.parse(moment.dateTime) / 1000);
  }
  for (const bar of document.querySelectorAll("[data-part]")) bar.style.setProperty("--part", bar.dataset.part);
}
