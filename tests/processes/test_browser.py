"""The page of a swarm in a real browser, beside a real swarm: what a person sees there, and what a page may do."""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import FOREIGN, NO_CHROMIUM, NOWHERE, PROGRAM, Browser, browsing
from swarm import Child, Swarm, wait_until, write_run

from swarmtrain.cli.page import page_of
from swarmtrain.cli.peers import PeerPhase, View
from swarmtrain.events import PeerLostEvent
from swarmtrain.v1 import control_pb2
from swarmtrain.web.server import Order, PageServer

pytestmark = [
    pytest.mark.processes,
    pytest.mark.long,
    pytest.mark.skipif(not PROGRAM, reason=NO_CHROMIUM),
]

HOSTILE = f"<img src=//{NOWHERE} onerror=a()>"
"""Name of a volunteer that would ask a foreign host for a picture, were it markup."""
CALLS_ITSELF = f"""
import dataclasses
from swarmtrain.peer import volunteer

as_named = volunteer.run_volunteer
volunteer.run_volunteer = lambda invite, settings, *rest: as_named(
    invite, dataclasses.replace(settings, name={HOSTILE!r}), *rest
)
"""
UNITS = {"": 1, "k": 10**3, "M": 10**6}


# ---------------------------------------------------------------- what a person reads


def addresses(child: Child) -> tuple[str, str]:
    """Return the address of its page for its own user, and for others ("" if for this machine only), as it says."""

    def said(words: str) -> str:
        found = re.search(rf"{words}: (\S+)", child.log.read_text())
        return found[1] if found else ""

    own = wait_until(lambda: said("its page"), lambda: f"its page; {child.story()}")
    return own, said("the same for others, to read only")


def names(page: Any, section: str = "#here") -> list[str]:
    """Return the names in a table of peers, from top to bottom."""
    return list(page.locator(f"{section} tbody th bdi").all_inner_texts())


def work(page: Any) -> list[float]:
    """Return the tokens in the table of those who are here, from top to bottom."""
    told = [text.split() for text in page.locator("#here tbody td:nth-child(3)").all_inner_texts()]
    return [float(words[0]) * UNITS["".join(words[1:])] if words else 0.0 for words in told]


def curve(page: Any, which: str = "#chart-training") -> tuple[str, str]:
    """Return what a chart tells a screen reader, and its picture."""
    return (
        page.locator(f"{which} .plot").get_attribute("aria-label"),
        page.evaluate(f"document.querySelector('{which} canvas')?.toDataURL() ?? ''"),
    )


def end_of(curve: tuple[str, str]) -> float:
    """Return the run's tokens at the end of a curve."""
    ends = re.findall(r"at ([\d.]+) ?(k|M|) tokens", curve[0])
    return max((float(number) * UNITS[unit] for number, unit in ends), default=0.0)


def until(condition: Callable[[], Any], what: str, page: Any) -> None:
    """Wait for something on a page."""
    wait_until(condition, lambda: f"{what}: {page.locator('body').inner_text()[:3000]}")


def mark(page: Any) -> None:
    """Leave something in a page that a reload would take away."""
    page.evaluate("window.wasHere = true")


def assert_never_reloaded(page: Any) -> None:
    assert page.evaluate("window.wasHere") is True


# ---------------------------------------------------------------- the parts of the story


def wait_for_growth(page: Any) -> None:
    """Wait until a curve has more of the run, and another picture."""
    until(lambda: end_of(curve(page)), "a curve", page)
    before = curve(page)
    until(lambda: end_of(now := curve(page)) > end_of(before) and now[1] != before[1], "a longer curve", page)


def assert_grows_within_three_rounds(page: Any, child: Child) -> None:
    before = child.last_round
    wait_for_growth(page)
    assert child.last_round <= before + 3


def assert_sorted_by_work(page: Any, first: set[str], last: str) -> None:
    """The two who began are above the one who came later, and the bootstrap, which does no work, is below."""
    until(lambda: len(names(page)) == 4, "four names", page)
    seen = wait_until(
        lambda: (names(page), done) if (done := work(page)) == sorted(done, reverse=True) else None, "order"
    )
    assert set(seen[0][:2]) == first and seen[0][2:] == [last, "bootstrap"], seen


def assert_fits(page: Any) -> None:
    """Neither the page nor a table of its peers scrolls sideways."""
    width = int(page.evaluate("innerWidth"))
    for name in ("html", "#here .scroll", "#before .scroll"):
        wide, room = page.locator(name).evaluate("(part) => [part.scrollWidth, part.clientWidth]")
        assert wide <= room, f"{width} pixels: {name} is {wide} wide and has {room}"


def assert_accessible(browser: Browser, url: str, key: str) -> None:
    """axe finds nothing on the page, with all that opens open: on a phone by day, and on a desk by night."""
    from axe_playwright_python.sync_playwright import Axe

    for width, scheme in ((390, "light"), (1440, "dark")):
        page = browser.open(url, width=width, key=key)
        page.emulate_media(color_scheme=scheme)
        page.locator("#here tbody tr").first.wait_for()
        page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
        found = Axe().run(page).response["violations"]
        told = [(each["id"], each["impact"], [node["html"][:120] for node in each["nodes"]]) for each in found]
        assert not told, f"{width} pixels, {scheme}: {told}"
        assert_fits(page)
        page.context.close()


def assert_paused_and_resumed(page: Any, child: Child) -> None:
    """Its own user stops it by a button, and lets it go on."""
    page.get_by_role("button", name="Pause").click()
    page.locator("#state", has_text="paused").wait_for()
    page.get_by_role("button", name="Resume").click()
    page.locator("#state", has_text=re.compile("training|merging")).wait_for()
    child.wait_more_rounds(1)


ASK = """async ([url, headers]) => {
  try {
    const reply = await fetch(url, {method: "POST", headers, body: "{}"});
    return [reply.status, await reply.text()];
  } catch (error) { return [0, String(error)]; }
}"""


def assert_read_only(page: Any, key: str) -> None:
    """Over the network nobody is shown the machine, and an order is refused, with the key too."""
    page.locator("#here tbody tr").first.wait_for()
    assert page.locator("#about").inner_text().endswith("read only")
    assert not page.locator("#machine").is_visible() and not page.get_by_role("button", name="Pause").count()
    for headers in ({}, {"Authorization": f"Bearer {key}"}):
        status, text = page.evaluate(ASK, ["order/pause", headers])
        assert status == 403 and "read only over the network" in text


def assert_foreign_names_and_pages_are_refused(browser: Browser, own: str, key: str) -> None:
    """A foreign name that leads here is refused, and a foreign page can neither read nor embed the page, nor order."""
    where = urlsplit(own)
    page = browser.open("about:blank")
    reply = page.goto(f"http://{FOREIGN}:{where.port}/")
    assert reply.status == 403 and "not served under that name" in page.inner_text("body")

    answers: list[int] = []
    page.on("response", lambda reply: answers.append(reply.status) if f"//{where.netloc}/" in reply.url else None)
    html = f"<iframe src='http://{where.netloc}/'></iframe>"
    page.route(f"http://{FOREIGN}/", lambda route: route.fulfill(body=html, content_type="text/html"))
    page.goto(f"http://{FOREIGN}/")
    (frame,) = page.frames[1:]
    assert not frame.locator("#run").count()
    answers.clear()  # the page itself, which the browser then did not show in a frame
    for path in ("order/pause", "state"):
        status, text = page.evaluate(ASK, [f"http://{where.netloc}/{path}", {"Authorization": f"Bearer {key}"}])
        assert status == 0, text
    said = page.evaluate("(url) => fetch(url, {mode: 'no-cors'}).then(() => 'read', String)", f"http://{where.netloc}/")
    assert said.startswith("TypeError")
    assert set(answers) <= {403}
    page.context.close()


# ---------------------------------------------------------------- the story


@contextmanager
def served(
    order: Order = lambda name, given: "",
) -> Iterator[tuple[PageServer, Browser, str]]:
    """Yield a server of the page without a peer, a browser, and the page's address."""
    sock = socket.create_server(("127.0.0.1", 0))
    server = PageServer(sock, order, "k" * 32)
    server.start()
    try:
        with browsing() as browser:
            yield server, browser, f"http://127.0.0.1:{sock.getsockname()[1]}/"
    finally:
        server.stop()


def test_a_swarm_is_seen_in_a_browser(swarm: Swarm) -> None:
    run = write_run(swarm.folder, merge={"inner_steps": 30})
    bootstrap = swarm.bootstrap(run, "--web")
    invite = bootstrap.invite.invite
    anna = swarm.join("anna", invite, "--web", "0.0.0.0:0")
    bert = swarm.join("bert", invite)
    for child in (anna, bert):
        child.wait_round(1)
    eve = swarm.join("eve", invite, prelude=CALLS_ITSELF)
    eve.wait_round(2)
    with browsing() as browser:
        own, for_others = addresses(anna)
        page = browser.open(own)
        hosts = {urlsplit(own).netloc}
        mark(page)
        until(lambda: "code" not in page.url, "the code is exchanged", page)
        key = json.loads((anna.folder / "page.json").read_text())["key"]
        late = browser.open(own)
        late.get_by_text("`swarmtrain watch --web` gives a new one").wait_for()
        assert not late.locator("#machine").is_visible()
        late.context.close()
        page.locator("#machine").wait_for()
        page.reload()
        page.locator("#machine").wait_for()
        mark(page)
        assert_grows_within_three_rounds(page, anna)
        assert_sorted_by_work(page, {"anna", "bert"}, HOSTILE)

        # the bootstrap's page, while it is killed and comes back
        address, _ = addresses(bootstrap)
        at_bootstrap = browser.open(address)
        hosts.add(urlsplit(address).netloc)
        mark(at_bootstrap)
        until(lambda: end_of(curve(at_bootstrap, "#chart-held-out")), "a held-out loss", at_bootstrap)
        bootstrap.kill()
        at_bootstrap.locator("#connection", has_text="goes on when it is back").wait_for()
        assert len(names(at_bootstrap)) + len(names(at_bootstrap, "#before")) >= 3, "what was known stays"
        assert_grows_within_three_rounds(page, anna)

        # a volunteer that is killed
        assert page.locator("#here img, #before img").count() == 0
        eve.kill()
        until(lambda: names(page, "#before") == [HOSTILE] and HOSTILE not in names(page), "who is gone", page)
        anna.wait_event(PeerLostEvent, lambda event: event.lost == eve.id)

        again = swarm.bootstrap(run)
        until(lambda: not at_bootstrap.locator("#connection").is_visible(), "the bootstrap's page again", at_bootstrap)
        wait_for_growth(at_bootstrap)
        assert_never_reloaded(at_bootstrap)

        assert_paused_and_resumed(page, anna)
        assert_never_reloaded(page)
        assert_accessible(browser, own.partition("#")[0], key)
        assert browser.hosts == hosts and not browser.errors, (browser.hosts, browser.errors)

        assert_foreign_names_and_pages_are_refused(browser, own, key)
        host = urlsplit(for_others).hostname or ""
        try:
            is_reached = not ipaddress.ip_address(host).is_loopback
        except ValueError:
            is_reached = False
        if is_reached:
            assert_read_only(browser.open(for_others), key)
    swarm.interrupt_all([anna, bert, again])
    if not is_reached:
        pytest.skip("all but the page over the network: this machine has no address but its own")


def test_a_volunteer_reads_who_is_here_and_pauses_on_a_phone() -> None:
    """Seen: the table scrolled sideways for what a peer does, and the button to pause was below four sections."""
    now, orders = time.time(), list[str]()
    status = control_pb2.PeerStatus(
        peer="id-anna",
        name="anna",
        role="volunteer",
        state=control_pb2.PEER_STATE_TRAINING,
        doing="training round 12: 14 of 25 steps",
        time=now,
        run_name="stdlib-gpt",
        round=12,
        run_tokens=1_200_000,
        total_tokens=3_000_000,
        vocabulary_size=256,
        end_time=now + 147,
    )
    status.losses.add(round=11, run_tokens=1_100_000, loss=2.25, time=now)
    status.limits.threads = 2
    for name, tokens in (("anna", 400_000), ("a-name-without-an-end-" * 3, 600_000), ("cleo", 200_000)):
        peer = status.peers.add(peer=f"id-{name}", name=name, tokens=tokens, present=True, round=12, tokens_per_s=4000)
        peer.device, peer.heard_time, peer.hidden = "Intel(R) Xeon(R) Platinum 8488C", now - 7, True
    view = View(status=status, phase=PeerPhase.RUNNING, now=now)

    def order(name: str, given: Mapping[str, Any]) -> str:
        orders.append(name)
        return "pausing: it finishes its step"

    with served(order) as (server, browser, address):
        server.publish(*page_of(view))
        for width in (320, 390, 800, 1024, 1440):
            server.admit(str(width))
            page = browser.open(f"{address}#code={width}", width=width)
            page.locator("#here tbody tr").first.wait_for()
            assert_fits(page)
            cells = page.locator("#here tbody tr").first.locator("td:visible").all_inner_texts()
            assert {"50%", "600 k", "4 k", "round 12", "through hosts"} <= set(cells), (width, cells)
            assert "as unsure as a blind guess among" in page.locator("#loss-help").inner_text()
            pause = page.get_by_role("button", name="Pause")
            below = pause.bounding_box()["y"] + pause.bounding_box()["height"]
            assert below < 844, f"{width} pixels: the button ends at {below}"
            pause.click()
            page.get_by_text("pausing: it finishes its step").wait_for()
            is_open = page.locator("#machine .more").evaluate("(each) => each.open")
            assert is_open is (width >= 1120) and not browser.errors
            page.context.close()
        assert orders == 5 * ["pause"]


TIMES = """async () => {
  const { times } = await import("./static/charts.js");
  const { clock, keepDates } = await import("./static/dom.js");
  const [year, day] = [new Date().getFullYear(), 86400];
  const at = (...parts) => new Date(...parts).getTime() / 1000;
  const newYear = at(year - 1, 0, 1);
  const told = () => [
    times([newYear - day, newYear, newYear + day], day),
    times([newYear - 7200, newYear, newYear + 7200], 7200),
    times([at(year, 5, 1, 10), at(year, 5, 1, 11)], 3600),
    [clock(newYear), clock(at(year, 5, 1, 10))],
  ];
  const before = told();
  keepDates();
  return [year, before, told()];
}"""


def test_an_axis_of_days_names_days_and_years() -> None:
    """Seen: the axis of a report had times of day, whatever day and year the reader opened it."""
    with served() as (_, browser, address):
        page = browser.open(address)
        year, (days, hours, today, clocks), in_a_file = page.evaluate(TIMES)
        assert days == [f"31 Dec\n{year - 2}", f"1 Jan\n{year - 1}", "2 Jan"]
        assert hours == [f"22:00\n31 Dec {year - 2}", f"00:00\n1 Jan {year - 1}", "02:00"]
        assert today == ["10:00\n1 Jun", "11:00"], "the present year goes without saying"
        assert clocks[0] == f"1 Jan {year - 1}, 00:00" and str(year) not in clocks[1]
        assert in_a_file[:2] == [days, hours]
        assert in_a_file[2] == [f"10:00\n1 Jun {year}", "11:00"] and in_a_file[3][1] == f"1 Jun {year}, 10:00"


DRAWN = """async ([axis, places]) => {
  const { CurveChart } = await import("./static/charts.js");
  const figure = document.getElementById("chart-training");
  figure.replaceChildren();
  const chart = new CurveChart(figure, "Training loss", "nats per token");
  const curve = (name, x) => ({ name, colour: "--training", x, y: x.map((_, n) => 5 - n / 50) });
  chart.show([curve("one", places), curve("other", places.slice(0, 1))], axis);
  await new Promise((drawn) => setTimeout(drawn));
  const canvas = figure.querySelector("canvas");
  const paint = canvas.getContext("2d");
  const inked = (x, y, width, height) => {
    const data = paint.getImageData(Math.round(x), y, width, height).data;
    const [red, , blue] = [0, 1, 2].map((n) => data.filter((_, at) => at % 4 === n));
    return red.some((value, at) => data[4 * at + 3] > 128 && Math.abs(value - blue[at]) > 60);
  };
  const at = (place) => inked(chart.plot.valToPos(place, "x", true), 0, 1, canvas.height - 60);
  const last = paint.getImageData(canvas.width - 1, canvas.height - 60, 1, 60).data;
  return [at((places[1] + places[2]) / 2), at((places.at(-11) + places.at(-10)) / 2), last.some((value) => value > 0)];
}"""


@pytest.mark.parametrize(
    ("axis", "begin", "step"), [("tokens", 0, 50_000), ("time", 1_780_012_800, 86_400), ("time", 1_780_012_800, 600)]
)
def test_a_curve_has_no_line_over_a_gap_and_the_last_mark_is_whole(axis: str, begin: int, step: int) -> None:
    """Seen: a night without anybody was a slow descent, and `1.2 M` at the right end was `1.2 `."""
    places = [begin + step * number for number in (*range(15), *range(30, 40))]
    with served() as (_, browser, address):
        page = browser.open(address)
        for last in range(4):  # the end of the axis at some distance from its last mark
            told = page.evaluate(DRAWN, [axis, [*places[:-1], places[-1] + last * step / 2]])
            assert told == [True, False, False], "a line between neighbours, none over the gap, no ink at the edge"
        assert not browser.errors


def test_before_its_news_a_page_has_nothing_to_press() -> None:
    """Seen: four buttons of a table without lines, and the choice of the axis of no curve."""
    with served() as (server, browser, address):
        page = browser.open(address)
        page.locator("#chart-training .plot").wait_for()
        pressed = "#main :is(button, input, summary):not(:disabled)"
        assert not page.locator(pressed).locator("visible=true").count()
        told = View(status=control_pb2.PeerStatus(peer="id"), phase=PeerPhase.RUNNING, now=time.time())
        told.status.losses.add(round=1, run_tokens=100, loss=2.25)
        server.publish(*page_of(told))
        page.get_by_text("by time").click()
        assert page.locator("#axis input").last.is_checked()
        assert page.locator("#main summary >> visible=true").first.inner_text() == "Values"


def row(number: int, *, is_me: bool) -> dict[str, Any]:
    """Return a row of the table, as `page_of` makes it, with the less work the greater its number."""
    tokens = 1000 - number
    words = {"name": f"peer-{number}", "short": "", "work": str(tokens), "share": "", "speed": "", "device": ""}
    facts = {"me": is_me, "here": True, "bootstrap": False, "tokens": tokens, "heard": 0, "round": 3, "loss": 0.0}
    return {**words, **facts, "reached": "directly", "stages": ""}


def test_a_table_of_many_peers_is_shown_in_pages() -> None:
    with served() as (server, browser, address):
        state = ({}, {f"id-{number:03}": row(number, is_me=number == 60) for number in range(120)})
        server.publish(state, state)
        page = browser.open(address)
        pages, body = page.locator("#here .pages"), page.locator("#here tbody")
        body.locator("tr").first.wait_for()

        def shown() -> list[int]:
            return [int(name.removeprefix("peer-")) for name in names(page)]

        assert shown() == [*range(25), 60], "the most work first, and this peer, wherever it is"
        pages.get_by_text("Show 50 of 120").click()
        assert shown() == [*range(50), 60] and pages.get_by_role("button", name="Previous").is_disabled()
        pages.get_by_role("button", name="Next").press("Enter")
        assert shown() == [*range(50, 100)] and "51 to 100 of 120" in pages.inner_text()
        pages.get_by_role("button", name="Next").click()
        assert shown() == [60, *range(100, 120)] and pages.get_by_role("button", name="Next").is_disabled()
        pages.get_by_text("Show the first 25").click()
        assert shown() == [*range(25), 60]
        assert not browser.errors
