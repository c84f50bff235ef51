"""Play a day of 1,000 peers into the page in Chromium: its first paint, its memory, its main thread.

    apt-get install chromium
    python benchmarks/page.py
    python benchmarks/page.py --states 1440 --every-s 0.1

The day is made up, and recorded as a peer records it: volunteers of unlike speed come, go and come back, two thirds of
them are there at any time, and each is heard of every ten seconds or so; both losses from the run's start; events. Its
states go through what serves a page: `page_of`, the server's feeds, server-sent events. A page of a peer gets a state a
second; here it gets five, each minutes later than the last, so that nearly every row is another one each time.

It prints three figures beside their bars, and exits with 1 if one is missed:

- the first paint, of a browser that has never seen the page, from the navigation on; also until all is shown;
- the memory of the tab: what its renderer has to itself (USS), the most of a look every two seconds;
- what an update takes of the page's main thread: all that this does from one update to the next (parsing, drawing,
  layout, clocks), in seconds of the processor and, as it happened on this machine, of the wall.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
from playwright.sync_api import sync_playwright

from swarmtrain.cli.page import MachineUse, page_of
from swarmtrain.cli.peers import PeerPhase, View
from swarmtrain.events import PeerJoinedEvent, PeerLeftEvent, PeerLostEvent
from swarmtrain.peer.control.history import PeerHistory
from swarmtrain.protocol.history import HistoryPoint, TextSample
from swarmtrain.v1 import control_pb2 as wire
from swarmtrain.web.server import PageServer

PAINT_S, MEMORY_BYTES, UPDATE_S = 1.0, 200e6, 0.05
DAY_S = 86_400.0
POINT_EVERY_S = 20.0
DEVICES = ("cpu, fp32", "NVIDIA GeForce RTX 3060, bf16", "NVIDIA GeForce RTX 4090, bf16", "Apple M2 (mps), fp32")
WORDS = ("a ", "line ", "of ", "text ", "that ", "is ", "nearly ", "a ", "sentence", ". ", "And ", "then ", "another")
KEY = "k" * 32
MARKED = """
const parse = JSON.parse;
JSON.parse = (text) => { performance.mark('update'); return parse(text); };
new MutationObserver((_, seen) => {
  if (!document.querySelector('#here tbody tr')) return;
  seen.disconnect();
  requestAnimationFrame(() => setTimeout(() => { window.shownMs = performance.now(); }));
}).observe(document, {subtree: true, childList: true});
"""
"""Runs before the page: each message leaves a mark, and the first row that is painted its time."""


# ---------------------------------------------------------------- the day


@dataclass
class Volunteer:
    """Volunteer of the day: its sessions are (begin, end), in seconds of the day."""

    peer: str
    name: str
    tokens_per_s: float
    device: str
    hidden: bool
    sessions: Sequence[tuple[float, float]]

    def is_here(self, at_s: float) -> bool:
        return any(begin <= at_s < end for begin, end in self.sessions)

    def trained_s(self, at_s: float) -> float:
        return sum(max(0.0, min(at_s, end) - begin) for begin, end in self.sessions)

    def heard_s(self, at_s: float) -> float:
        """Return when it was heard of last: every ten seconds while it is here."""
        if self.is_here(at_s):
            return at_s - (at_s + self.tokens_per_s) % 10.0
        return max((end for _, end in self.sessions if end <= at_s), default=0.0)


@dataclass
class Day:
    """Day of a run, of which any moment can be shown as its bootstrap's neighbour would have seen it."""

    num_peers: int
    chance: random.Random = field(default_factory=lambda: random.Random(7))

    def __post_init__(self) -> None:
        self.begin = time.time() - DAY_S
        self.volunteers = [self._volunteer(number) for number in range(self.num_peers)]
        self.tokens_per_s = sum(each.tokens_per_s * each.trained_s(DAY_S) for each in self.volunteers) / DAY_S
        self.total_tokens = int(self.tokens_per_s * DAY_S * 1.05)
        self.history = PeerHistory()
        self.history.begin("ab" * 32, self.total_tokens)
        self.recorded_s = 0.0

    def _volunteer(self, number: int) -> Volunteer:
        chance, sessions, at_s = self.chance, [], self.chance.random() * 7200
        while at_s < DAY_S:
            stays_s = chance.expovariate(1 / (4 * 3600))
            sessions.append((at_s, at_s + stays_s))
            at_s += stays_s + chance.expovariate(1 / (2 * 3600))
        digits = "".join(chance.choices("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz", k=44))
        speed = 3000 * math.exp(chance.gauss(0, 1))
        return Volunteer(
            f"12D3KooW{digits}",
            f"volunteer-{number:04}",
            speed,
            chance.choice(DEVICES),
            chance.random() < 0.4,
            sessions,
        )

    def loss(self, at_s: float, floor: float) -> float:
        return floor + 4.0 / (1 + at_s / 900) ** 0.5 + self.chance.gauss(0, 0.02)

    def record_until(self, at_s: float) -> None:
        """Record what a peer records until then."""
        while self.recorded_s + POINT_EVERY_S <= at_s:
            before_s, self.recorded_s = self.recorded_s, self.recorded_s + POINT_EVERY_S
            now_s, when = self.recorded_s, self.begin + self.recorded_s
            tokens, round = int(self.tokens_per_s * now_s), int(now_s / 60)
            self.history.add(HistoryPoint(run_tokens=tokens, time=when, round=round, loss=self.loss(now_s, 2.2)))
            if now_s % 600 < POINT_EVERY_S:
                point = HistoryPoint(run_tokens=tokens, time=when, round=round, held_out_loss=self.loss(now_s, 0.9) / 2)
                text = "".join(self.chance.choices(WORDS, k=120))
                sample = TextSample(prompt="Once upon", text=text, round=round, run_tokens=tokens, time=when)
                self.history.add_sample(point, sample)
            for each in self.volunteers:
                for begin, end in each.sessions:
                    if before_s < begin <= now_s:
                        self.history.take(PeerJoinedEvent(time=when, joined=each.peer, joined_name=each.name))
                    if before_s < end <= now_s and each.hidden:
                        self.history.take(
                            PeerLostEvent(time=when, lost=each.peer, lost_name=each.name, reason="silent for 30 s")
                        )
                    elif before_s < end <= now_s:
                        self.history.take(PeerLeftEvent(time=when, left=each.peer, left_name=each.name))

    def view(self, at_s: float) -> View:
        """Return what is known of the first volunteer then."""
        me, now = self.volunteers[0], self.begin + at_s
        status = wire.PeerStatus(
            peer=me.peer,
            name=me.name,
            role="volunteer",
            version="0.2.0",
            started_time=self.begin,
            time=now,
            state=wire.PEER_STATE_TRAINING,
            doing=f"training round {int(at_s / 60)}: {int(at_s) % 60} of 60 steps",
            run_name="a-day",
            run_sha256="ab" * 32,
            invite_line="swarmtrain join st1" + "x" * 300,
            round=int(at_s / 60),
            inner_steps_done=int(at_s) % 60,
            inner_steps=60,
            run_tokens=int(self.tokens_per_s * at_s),
            total_tokens=self.total_tokens,
            own_tokens=int(me.tokens_per_s * me.trained_s(at_s)),
            own_tokens_per_s=me.tokens_per_s,
            swarm_tokens_per_s=self.tokens_per_s,
            end_time=self.begin + 1.05 * DAY_S,
            sent_bytes=int(20_000 * at_s),
            received_bytes=int(60_000 * at_s),
            sent_bytes_per_s=2e4,
            received_bytes_per_s=6e4,
            times_below_allreduce=25.1,
            stall_share=0.034,
        )
        for each in self.volunteers:
            is_here = each.is_here(at_s) or each is me
            status.peers.add(
                peer=each.peer,
                name=each.name,
                tokens=int(each.tokens_per_s * each.trained_s(at_s)),
                present=is_here,
                round=int(at_s / 60) - int(each.hidden),
                tokens_per_s=each.tokens_per_s * (0.9 + 0.2 * self.chance.random()),
                heard_time=self.begin + each.heard_s(at_s),
                hidden=each.hidden,
                loss=self.loss(at_s, 2.2),
                device=each.device,
            )
        for number in range(512):
            then_s = at_s * (number + 1) / 512
            tokens, when = int(self.tokens_per_s * then_s), self.begin + then_s
            status.losses.add(round=int(then_s / 60), run_tokens=tokens, loss=self.loss(then_s, 2.25), time=when)
        status.limits.threads, status.limits.nice, status.limits.hours = 2, 10, "22-7"
        return View(status=status, phase=PeerPhase.RUNNING, now=now)


# ---------------------------------------------------------------- playing it


class Player:
    """Page of the day on a free port, at the state of `at_s`."""

    def __init__(self, day: Day, every_s: float) -> None:
        self.day, self.every_s = day, every_s
        sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}/"
        self.server = PageServer(sock, lambda name, given: "", KEY, every_s=every_s / 2)
        self.made_s: list[float] = []
        self.played_s = 0.0

    def show(self, at_s: float) -> None:
        """Show the day as it was then."""
        self.day.record_until(at_s)
        view, history = self.day.view(at_s), self.day.history.message()
        before_s = time.thread_time()
        state = page_of(view, MachineUse(processor_share=1.9, memory_bytes=800_000_000), history)
        self.made_s.append(time.thread_time() - before_s)
        self.server.publish(*state)

    def playing(self, begin_s: float, end_s: float, states: int) -> Iterator[None]:
        """Yield again and again while `states` moments are shown, one every `every_s`, in another thread."""
        thread = threading.Thread(target=self._play, args=(begin_s, end_s, states))
        thread.start()
        while thread.is_alive():
            yield
        thread.join()

    def _play(self, begin_s: float, end_s: float, states: int) -> None:
        began_s = next_s = time.monotonic()
        for number in range(states):
            self.show(begin_s + (end_s - begin_s) * (number + 1) / states)
            next_s += self.every_s
            time.sleep(max(0.0, next_s - time.monotonic()))
            next_s = max(next_s, time.monotonic() - self.every_s)
        self.played_s += time.monotonic() - began_s


def first_paints(engine: Any, url: str, times: int) -> list[tuple[float, float]]:
    """Open the page in new profiles; return seconds until the first paint, and until the first row was painted."""
    found = []
    for _ in range(times):
        with opened(engine, url) as page:
            shown_s = until_shown_s(page)
            paints = page.evaluate("performance.getEntriesByType('paint').map((each) => [each.name, each.startTime])")
            found.append((dict(paints)["first-contentful-paint"] / 1000, shown_s))
    return found


@contextlib.contextmanager
def opened(engine: Any, url: str) -> Iterator[Any]:
    """Provide the page in a profile of its own."""
    context = engine.new_context(viewport={"width": 1440, "height": 900})
    try:
        context.add_init_script(MARKED)
        context.add_init_script(f"sessionStorage.setItem('key', '{KEY}')")
        page = context.new_page()
        page.goto(url)
        yield page
    finally:
        context.close()


def until_shown_s(page: Any) -> float:
    """Wait until rows are painted; return how many seconds after the navigation that was."""
    while (shown_ms := page.evaluate("window.shownMs")) is None:
        page.wait_for_timeout(20)
    return float(shown_ms) / 1000


def tab_bytes(engine: Any) -> tuple[float, float]:
    """Return what the renderers have to themselves, and what they have in memory with what they share."""
    session = engine.new_browser_cdp_session()
    try:
        processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    finally:
        session.detach()
    memory = [psutil.Process(each["id"]).memory_full_info() for each in processes if each["type"] == "renderer"]
    return sum(each.uss for each in memory), max(each.rss for each in memory)


@dataclass
class Update:
    """What the page's main thread did from one update to the next."""

    processor_s: float = 0.0
    wall_s: float = 0.0


def updates_of(trace: bytes) -> list[Update]:
    """Return what each update took, from a trace."""
    events = json.loads(trace)["traceEvents"]
    marks = sorted((each["ts"], each["pid"], each["tid"]) for each in events if each["name"] == "update")
    (thread,) = {mark[1:] for mark in marks}
    updates = [Update() for _ in marks]
    tasks = [
        each
        for each in events
        if each["name"] == "RunTask" and each["ph"] == "X" and (each["pid"], each["tid"]) == thread
    ]
    place = 0
    for task in sorted(tasks, key=lambda each: each["ts"]):
        while place + 1 < len(marks) and marks[place + 1][0] < task["ts"] + task["dur"]:
            place += 1  # the task in which it came
        updates[place].processor_s += task.get("tdur", 0) / 1e6
        updates[place].wall_s += task["dur"] / 1e6
    assert sum(each.processor_s for each in updates) > 0, "the trace has no times of the processor"
    return updates


def traced(engine: Any, page: Any, player: Player, *, begin_s: float, end_s: float, states: int) -> list[Update]:
    """Play a part of the day into an open page, and return what its updates took."""
    engine.start_tracing(page=page, categories=["blink.user_timing", "disabled-by-default-devtools.timeline"])
    for _ in player.playing(begin_s, end_s, states):
        page.wait_for_timeout(500)
    return updates_of(engine.stop_tracing())


def most_bytes(engine: Any, page: Any, player: Player, *, begin_s: float, end_s: float, states: int) -> list[float]:
    """Play a part of the day into an open page; return its memory at first, the most, and that with what it shares."""
    looks = [tab_bytes(engine)]
    for _ in player.playing(begin_s, end_s, states):
        page.wait_for_timeout(2000)
        looks.append(tab_bytes(engine))
    return [looks[0][0], max(own for own, _ in looks), max(both for _, both in looks)]


# ---------------------------------------------------------------- figures


def told(name: str, updates: Sequence[Update]) -> float:
    """Print what updates took; return the longest of the processor."""
    for kind in ("processor_s", "wall_s"):
        times = sorted(1000 * getattr(each, kind) for each in updates)
        middle, most = statistics.median(times), times[-1]
        almost = times[math.ceil(0.99 * len(times)) - 1]
        words = f"median {middle:.1f} ms, 99 % {almost:.1f} ms, longest {most:.1f} ms"
        print(f"  {name}, {kind.removesuffix('_s')}: {words}")
    return max(each.processor_s for each in updates)


def open_all(page: Any) -> int:
    """Show as much as the page shows at once; return the number of its peers' lines."""
    while (more := page.get_by_role("button", name="Show 50 of")).count():
        more.first.click()
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    page.get_by_text("by time").click()
    return int(page.locator(".peers tbody tr").count())


def main() -> None:
    """Play the day, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--states", type=int, default=300, help="moments of each part of the day that are shown")
    parser.add_argument("--every-s", type=float, default=0.2)
    parser.add_argument("--paints", type=int, default=9, help="how often the page is opened anew")
    given = parser.parse_args()
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        sys.exit("there is no Chromium here: apt-get install chromium")
    player = Player(Day(given.peers), given.every_s)
    player.server.start()
    with sync_playwright() as playwright:
        engine = playwright.chromium.launch(executable_path=program)
        print(f"{given.peers} peers, {given.states} states of a day, one every {given.every_s:g} s; ", end="")
        print(f"Chromium {engine.version}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        part_s = DAY_S / 100
        player.show(part_s)
        with opened(engine, player.url) as page:
            until_shown_s(page)
            first, most, shared = most_bytes(
                engine, page, player, begin_s=part_s, end_s=50 * part_s, states=given.states
            )
            usual = traced(engine, page, player, begin_s=50 * part_s, end_s=90 * part_s, states=given.states)
            num_lines = open_all(page)
            full = traced(engine, page, player, begin_s=90 * part_s, end_s=95 * part_s, states=given.states // 4)
            _, most_full, shared_full = most_bytes(
                engine, page, player, begin_s=95 * part_s, end_s=100 * part_s, states=given.states // 4
            )
        paints = first_paints(engine, player.url, given.paints)
        engine.close()
    player.server.stop()

    firsts, alls = zip(*paints, strict=True)
    words = f"median {statistics.median(firsts):.3f} s, longest {max(firsts):.3f} s of {len(paints)}"
    print(f"first paint: {words}; until rows are shown: median {statistics.median(alls):.3f} s, ", end="")
    print(f"longest {max(alls):.3f} s")
    print(f"memory of the tab: at first {first / 1e6:.0f} MB, at most {most / 1e6:.0f} MB, ", end="")
    print(f"with all that opens open {most_full / 1e6:.0f} MB; with what it shares ", end="")
    print(f"{max(shared, shared_full) / 1e6:.0f} MB")
    print(f"an update, of {len(usual)} and of {len(full)}:")
    longest_s = max(told("as it opens", usual), told(f"{num_lines} lines, tables of values open", full))
    made_ms, every_s = 1000 * statistics.median(player.made_s), player.played_s / (len(player.made_s) - 1)
    print(f"the server: {made_ms:.1f} ms of the processor to make a state; one every {every_s:.2f} s was shown")
    bars = [
        ("first paint", max(firsts), PAINT_S, "s"),
        ("memory", max(most, most_full) / 1e6, MEMORY_BYTES / 1e6, "MB"),
        ("longest update", 1000 * longest_s, 1000 * UPDATE_S, "ms of the processor"),
    ]
    for name, value, bar, unit in bars:
        print(f"{name}: {value:.3g}, bar {bar:g} {unit}: {'holds' if value < bar else 'MISSED'}")
    sys.exit(any(value >= bar for _, value, bar, _ in bars))


if __name__ == "__main__":
    main()
