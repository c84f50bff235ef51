// The page of a swarm: takes what the peer says, and puts each part of it into its place.
import { ago, clock, make, setFacts, setText } from "./dom.js";
import { LearningCharts } from "./learning.js";
import { OwnPeer } from "./own.js";
import { follow } from "./stream.js";
import { PeerTable, perSecond } from "./table.js";

const get = (id) => document.getElementById(id);

/** Exchange the one-time code in the address for the key of the peer's own user, which this tab keeps. */
async function takeKey() {
  const code = new URLSearchParams(location.hash.slice(1)).get("code");
  if (code) {
    const response = await fetch("key", { method: "POST", body: code });
    const answer = await response.json();
    history.replaceState(null, "", location.pathname);
    if (response.ok) sessionStorage.setItem("key", answer.key);
    get("refused").hidden = response.ok || sessionStorage.getItem("key") !== null;
    setText(get("refused"), answer.error ?? "");
  }
  return sessionStorage.getItem("key") ?? "";
}

const state = { panels: {}, rows: new Map(), connection: "", why: "", newsTime: 0 };
const charts = new LearningCharts();
const HERE = ["Name", "Share", "Tokens", "Tokens/s", "Doing", "Trains on", "Heard", "Reached"];
const here = new PeerTable(get("here"), "Peers that are here now, the most work first", HERE);
const before = new PeerTable(get("before"), "Peers that took part before", ["Name", "Share", "Tokens", "Heard"]);
const own = new OwnPeer(get("machine"));

// ---------------------------------------------------------------- the parts

const draw = {
  head(head) {
    setText(get("run"), head.run || head.peer);
    setText(get("state"), head.state);
    get("state").dataset.tone = head.tone;
    setText(get("sentence"), head.sentence);
    setText(get("seen-by"), `as ${head.peer} sees it`);
    const run = head.run_sha256 ? `run ${head.run_sha256}, ` : "";
    setText(get("about"), `${run}swarmtrain ${head.version}${head.is_owner ? "" : ", read only"}`);
    get("keep").hidden = !head.keep;
    setText(get("keep").querySelector("code"), head.keep);
    document.title = `${head.run || head.peer}: ${head.state}`;
    announceState(`${head.peer} is ${head.state}`);
    drawConnection();
  },
  progress(progress) {
    const percent = 100 * progress.done;
    const bar = get("progress-bar");
    bar.firstElementChild.style.width = `${percent}%`;
    bar.setAttribute("aria-valuenow", percent.toFixed(1));
    bar.setAttribute("aria-valuetext", progress.words);
  },
  answers(answers) {
    const list = get("answers");
    while (list.children.length < answers.length) {
      list.append(make("div", {}, make("dt"), make("dd"), make("dd", { className: "quiet" })));
    }
    answers.forEach((each, number) => {
      const [name, answer, more] = list.children[number].children;
      setText(name, each.name);
      setText(answer, each.answer);
      setText(more, each.more);
    });
  },
  learning(learning) {
    charts.show(learning);
    setText(get("loss-help"), learning.help);
    setText(get("sources"), learning.sources ? `held-out by source: ${learning.sources}` : "");
  },
  pipeline(stages) {
    const section = get("pipeline");
    section.hidden = !stages;
    if (!stages) return;
    section.querySelector(".scroll")?.remove();
    const heads = [["Stage"], ["Held by"], ["Tokens/s", "number"], ["Could do", "number"], ["Waiting", "number"]];
    const lines = stages.map((stage) =>
      make(
        "tr",
        { className: stage.mine ? "me" : "" },
        make("th", { scope: "row" }, String(stage.number)),
        make("td", { className: "wraps" }, stage.holders),
        make("td", { className: "number" }, perSecond(stage.speed)),
        make("td", { className: "number" }, perSecond(stage.most)),
        make("td", { className: "number" }, String(stage.queue)),
      ),
    );
    const head = make("thead", {}, make("tr", {}, ...heads.map(([name, kind]) => make("th", { scope: "col", className: kind ?? "" }, name))));
    const table = make("table", { className: "stages" }, head, make("tbody", {}, ...lines));
    section.append(make("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: "Stages" }, table));
  },
  machine(machine) {
    own.show(machine);
  },
  traffic(traffic) {
    setFacts(get("traffic").querySelector("dl"), [
      ["Sent", `${traffic.sent} (${traffic.sent_per_s})`],
      ["Received", `${traffic.received} (${traffic.received_per_s})`],
      ["Exchange", traffic.exchange],
      ["Merged", traffic.merged],
      ["Reach", traffic.reach],
    ]);
  },
  notices(notices) {
    drawList(get("notices"), notices);
  },
  events(events) {
    drawList(get("events"), events);
  },
  sample(sample) {
    get("sample").hidden = !sample;
    if (!sample) return;
    const when = `At ${clock(sample.time)}${sample.age}, after round ${sample.round} and ${sample.tokens} tokens`;
    setText(get("sample-about"), `${when}, the model continued a line of held-out text, on which it does not train.`);
    setText(get("sample-prompt"), sample.prompt);
    setText(get("sample-written"), sample.text);
  },
  invite(invite) {
    get("invite").hidden = !invite;
    if (!invite) return;
    setText(get("invite-line"), invite.line);
    get("invite-code").hidden = !invite.code;
    get("invite-code").querySelector("svg")?.remove();
    if (invite.code) get("invite-code").append(drawCode(invite.code));
  },
};

function drawList(section, events) {
  section.hidden = !events.length;
  const lines = events.map(([time, text, count]) =>
    make("li", {}, make("time", {}, clock(time)), ` ${text}${count > 1 ? ` (${count} times)` : ""}`),
  );
  section.querySelector("ol").replaceChildren(...lines);
}

/** Draw a QR code: dark on light by night too, since readers expect that. */
function drawCode(code) {
  const space = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(space, "svg");
  picture.setAttribute("viewBox", `-4 -4 ${code.width + 8} ${code.width + 8}`);
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", "QR code of the invite");
  const dark = document.createElementNS(space, "path");
  dark.setAttribute("d", code.path);
  picture.append(dark);
  return picture;
}

function drawPeers() {
  const rows = [...state.rows];
  const isOver = Boolean(state.panels.head?.over);
  get("here").hidden = isOver;
  setText(get("before-title"), isOver ? "Took part" : "Took part before");
  here.show(rows.filter(([, row]) => row.here), "Nobody is here now.");
  const gone = rows.filter(([, row]) => !row.here && (row.tokens || !row.bootstrap));
  get("before").hidden = !gone.length;
  before.show(gone);
}

function drawConnection() {
  const notice = get("connection");
  const head = state.panels.head;
  const last = state.newsTime ? `; this is how it was ${ago(Date.now() / 1000 - state.newsTime)}` : "";
  const words = {
    open: "",
    lost: `The page's server does not answer: it ends with its peer. The page goes on when it is back${last}.`,
    refused: `${state.why || "The page's server refuses to answer"}${last}.`,
  };
  const text = words[state.connection] ?? "";
  notice.hidden = !text;
  setText(notice, text);
  document.body.classList.toggle("stale", Boolean(text) || Boolean(head && head.over));
}

// ---------------------------------------------------------------- what a screen reader is told

let announced = "";
function announceState(text) {
  if (announced && announced !== text) setText(get("announcer"), text);
  announced = text;
}

// ---------------------------------------------------------------- news

function take(message) {
  if (message.all) state.rows.clear();
  for (const [id, row] of Object.entries(message.rows)) state.rows.set(id, row);
  for (const id of message.gone) state.rows.delete(id);
  Object.assign(state.panels, message.panels);
  state.newsTime = Date.now() / 1000;
  for (const name of Object.keys(message.panels)) draw[name]?.(message.panels[name]);
  if (message.all || Object.keys(message.rows).length || message.gone.length) drawPeers();
}

get("invite-copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(get("invite-line").textContent);
    setText(get("invite-copied"), "copied");
  } catch {
    getSelection().selectAllChildren(get("invite-line"));
    setText(get("invite-copied"), "selected: copy it with the keyboard");
  }
});
setInterval(() => {
  here.tick();
  before.tick();
  drawConnection();
}, 1000);
takeKey()
  .catch(() => sessionStorage.getItem("key") ?? "")
  .then((key) => {
    own.key = key;
    follow("state", key, take, (connection, why) => {
      state.connection = connection;
      state.why = why;
      drawConnection();
    });
  });
