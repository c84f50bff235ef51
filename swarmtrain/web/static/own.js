// The peer's own machine, for its own user: what it does there, and what may be changed.
import { make, setFacts, setText } from "./dom.js";

const FIELDS = [
  ["threads", "Threads", "0: all cores"],
  ["memory", "Memory", "such as 4GB, or none"],
  ["hours", "Hours", "such as 22-7, or any"],
  ["nice", "Niceness", "0 to 19: only idle time"],
  ["up", "Sends at most", "Mbit/s; 0: no limit"],
  ["down", "Receives at most", "Mbit/s; 0: no limit"],
  ["gpu_share", "Graphics card", "percent of its time"],
  ["max_temperature", "Temperature", "°C, none or auto"],
];

export class OwnPeer {
  constructor(section) {
    this.section = section;
    this.key = "";
    this.shown = null;
    this.facts = make("dl", { className: "facts" });
    this.more = this.#foldedOnPhones(make("summary", {}, "What it does and uses"), this.facts);
    this.told = make("p", { className: "told", role: "status" });
    this.pause = this.#button("Pause", () => this.#order(this.shown.paused ? "resume" : "pause"));
    this.leave = this.#button("Leave…", () => this.#askToLeave());
    this.leave.classList.add("grave");
    this.really = make("p", { className: "really", hidden: true }, "It finishes its step, tells the others and ends. ");
    this.really.append(
      this.#button("Leave the swarm", () => this.#order("leave")),
      " ",
      this.#button("Stay", () => this.#stay()),
    );
    this.form = this.#makeForm();
    this.limits = make("details", {}, make("summary", {}, "Change the limits"), this.form);
    this.limits.addEventListener("toggle", () => this.limits.open && this.#fillForm());
    this.controls = make("div", { className: "controls" }, this.pause, this.leave);
    section.querySelector(".title").append(this.controls);
    section.append(this.really, this.told, this.more, this.limits);
  }

  show(machine) {
    this.section.hidden = !machine;
    this.shown = machine;
    if (!machine) return;
    setFacts(this.facts, machine.facts);
    this.controls.hidden = !machine.running;
    this.pause.hidden = !machine.volunteer;
    setText(this.pause, machine.paused ? "Resume" : "Pause");
    this.limits.hidden = !machine.running || !machine.limits;
    if (!machine.running) this.really.hidden = true;
  }

  /** Return `what` that opens where there is room beside the curves, and is always open there. */
  #foldedOnPhones(...what) {
    const details = make("details", { className: "more" }, ...what);
    const isWide = matchMedia("(min-width: 70rem)");
    const fold = () => (details.open = isWide.matches);
    isWide.addEventListener("change", fold);
    fold();
    return details;
  }

  #button(text, act) {
    const button = make("button", { type: "button" }, text);
    button.addEventListener("click", act);
    return button;
  }

  #askToLeave() {
    this.really.hidden = false;
    this.really.querySelector("button").focus();
  }

  #stay() {
    this.really.hidden = true;
    this.leave.focus();
  }

  async #order(name, what = {}) {
    setText(this.told, "…");
    this.really.hidden = true;
    try {
      const response = await fetch(`order/${name}`, {
        method: "POST",
        headers: { "Content-Type": "application/json", Authorization: `Bearer ${this.key}` },
        body: JSON.stringify(what),
      });
      const answer = await response.json();
      this.told.classList.toggle("refused", !response.ok);
      setText(this.told, answer.message ?? answer.error);
    } catch {
      this.told.classList.add("refused");
      setText(this.told, "The page's server does not answer; try again.");
    }
  }

  #makeForm() {
    const form = make("form", { className: "limits" });
    for (const [name, title, hint] of FIELDS) {
      const input = make("input", { name, type: "text", autocomplete: "off", id: `limit-${name}` });
      input.setAttribute("aria-describedby", `hint-${name}`);
      form.append(
        make("p", { id: `field-${name}` }, make("label", { htmlFor: input.id }, title), input, make("span", { className: "quiet", id: `hint-${name}` }, hint)),
      );
    }
    const idle = make("input", { type: "checkbox", name: "only_when_idle", id: "limit-only_when_idle" });
    form.append(
      make("p", { className: "check" }, idle, make("label", { htmlFor: idle.id }, "Only while the machine is idle")),
      make("p", {}, make("button", { type: "submit" }, "Change")),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#change();
    });
    return form;
  }

  #fillForm() {
    const limits = this.shown.limits;
    for (const [name] of FIELDS) {
      const value = limits[name];
      this.form.querySelector(`#field-${name}`).hidden = value === null;
      this.form.elements[name].value = value === null ? "" : String(value);
    }
    this.form.elements.only_when_idle.checked = limits.only_when_idle;
  }

  #change() {
    const limits = this.shown.limits;
    const changed = {};
    for (const [name] of FIELDS) {
      const value = this.form.elements[name].value.trim();
      if (limits[name] !== null && value !== String(limits[name])) changed[name] = value;
    }
    const idle = this.form.elements.only_when_idle.checked;
    if (idle !== limits.only_when_idle) changed.only_when_idle = String(idle);
    if (Object.keys(changed).length) this.#order("limits", changed);
    else setText(this.told, "Nothing was changed.");
  }
}
