"""Screens about a peer, of 80x24 and 120x40."""

from __future__ import annotations

import io
import random
import re
import time
from pathlib import Path
from typing import Any

import pyte
import pytest
from fake_peer import make_status
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from swarmtrain.cli.facts import limits_in_words, sentence
from swarmtrain.cli.lines import wrap
from swarmtrain.cli.peers import PeerPhase, View
from swarmtrain.cli.screen import draw_status, draw_watch, list_peers, plain_line
from swarmtrain.v1 import control_pb2 as wire
from swarmtrain.words import shares_in_words

FOLDER = Path("/home/anna/swarm")
SIZES = [(80, 24), (120, 40)]
NOON = 1_795_953_600.0
"""Noon in UTC of some day, in Unix seconds."""


def view(phase: PeerPhase = PeerPhase.RUNNING, note: str = "", **changes: Any) -> View:
    status = make_status(**changes)
    return View(status=status, phase=phase, folder=FOLDER, now=status.time + 1, note=note)


def on_screen(lines: list[Text], width: int, height: int) -> list[str]:
    """Return the lines as a terminal shows them; fails if one does not fit."""
    assert len(lines) <= height
    out = io.StringIO()
    console = Console(
        file=out, width=width, height=height, force_terminal=True, color_system="standard", highlight=False
    )
    for line in lines:
        assert line.cell_len <= width, line.plain
        assert "\n" not in line.plain
        console.print(line, soft_wrap=True, end="\r\n" if line is not lines[-1] else "")
    screen = pyte.Screen(width, height)
    pyte.Stream(screen).feed(out.getvalue())
    shown = [line.rstrip() for line in screen.display]
    assert shown[: len(lines)] == [line.plain.rstrip() for line in lines], "the terminal wrapped or scrolled"
    return shown


@pytest.mark.parametrize(("width", "shown"), [(140, True), (80, False)])
def test_losses_by_source_are_shown_where_they_fit(width: int, shown: bool) -> None:
    seen = view()
    for name, loss in (("code", 2.5), ("prose", 1.25), ("broken", float("nan"))):
        seen.status.source_losses.add(name=name, held_out_loss=loss)
    in_words = "nats/byte: code 2.500, prose 1.250 nats/byte"
    assert (in_words in "\n".join(on_screen(draw_watch(seen, width, 40), width, 40))) == shown
    assert "code 2.500, prose 1.250" in " ".join(line.plain.strip() for line in draw_status(seen, width, 5))


def test_an_old_held_out_loss_has_its_age_and_of_a_peer_that_ended_the_age_it_had_then() -> None:
    now, ended = view(), view(PeerPhase.ENDED)
    for seen in (now, ended):
        seen.status.held_out_time = seen.status.time - 725
    for drawn in (draw_watch(now, 100, 30), draw_status(now, 100, 5), [plain_line(now)]):
        assert "held-out 2.100 nats/byte, 12 min ago" in "\n".join(map(str, drawn))
    for drawn in (draw_watch(ended, 100, 30), draw_status(ended, 100, 5)):
        assert "held-out 2.100 nats/byte, 12 min before the end" in "\n".join(map(str, drawn))


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_watch_shows_all_that_a_person_wants_to_know(width: int, height: int) -> None:
    shown = on_screen(draw_watch(view(), width, height), width, height)
    text = "\n".join(shown)
    assert shown[0].startswith("anna (Anna01), volunteer in run stdlib-gpt")
    assert shown[0].endswith(" training")
    assert len(shown[0]) == width
    assert shown[1] == "training round 12: 14 of 25 steps"
    assert "loss  2.250 nats/token, held-out 2.100 nats/byte" in text
    assert "    5.00│" in text
    assert sum("│" in line for line in shown) >= 5
    assert re.search(r"█+░+  40% of 3 M tokens, about 2 min 26 s left$", text, re.MULTILINE)
    assert "own 4.1 k tokens/s, swarm 12.3 k tokens/s" in text
    assert "contribution  400 k tokens, 33% of all" in text
    assert "sent 12 MB (1.2 MB/s), received 11 MB (0 B/s)" in text
    assert "of round 11, 13 s ago, 10.2 MB" in text
    assert "25.1 times below an all-reduce, 3% of the time stalled" in text
    assert "2 of 3 volunteers here, and a bootstrap" in text
    assert re.search(r"anna \(you\)  Anna01  400 k tokens  33%  here  round 12  4 k tokens/s", text)
    assert "the disk is full: training goes on without checkpoints" in text
    foot = "q closes this screen; the peer keeps running; a page: swarmtrain watch --web"
    assert text.rstrip().endswith(foot)
    assert ("2 threads" in text) == (height >= 30)


@pytest.mark.parametrize(
    ("width", "foot"),
    [
        (100, "q closes this screen; the peer keeps running; a page: swarmtrain watch anna --web"),
        (80, "q closes this screen, not the peer; a page: swarmtrain watch anna --web"),
        (50, "q: close; a page: swarmtrain watch anna --web"),
        (44, "q closes this screen; a page: add --web"),
        (20, "q closes this screen"),
    ],
)
def test_the_last_line_leads_to_the_page_of_this_peer(width: int, foot: str) -> None:
    lines = on_screen(draw_watch(view(), width, 24, "swarmtrain watch anna"), width, 24)
    assert "\n".join(lines).rstrip().endswith(foot)


@pytest.mark.parametrize(
    ("width", "shown"), [(130, "lower is better, a blind guess: 5.545/token"), (90, "lower is better"), (60, "")]
)
def test_how_to_read_a_loss_is_said_where_it_fits(width: int, shown: str) -> None:
    seen = view(vocabulary_size=256)
    (line,) = (line for line in on_screen(draw_watch(seen, width, 30), width, 30) if line.startswith("loss "))
    assert line.partition("lower")[1:] == shown.partition("lower")[1:]

    def status() -> str:
        return " ".join(" ".join(line.plain for line in draw_status(seen, 120, 9)).split())

    assert "nats/byte; lower is better, a blind guess: 5.545/token" in status()
    seen.status.vocabulary_size = 0
    assert "nats/byte; lower is better" in status() and "guess" not in status()
    seen.status.vocabulary_size = 4096
    for point in seen.status.losses:  # as of a bootstrap whose volunteers have left
        point.loss = 0.0
    assert "nats/byte; lower is better" in status() and "guess" not in status()


def test_watch_grows_with_the_terminal() -> None:
    small, big = (sum("│" in line.plain for line in draw_watch(view(), *size)) for size in SIZES)
    assert big > small + 8


def test_while_it_is_waited_for_the_screen_can_be_left() -> None:
    text = "\n".join(on_screen(draw_watch(view(PeerPhase.DIED, note="waiting"), 80, 24), 80, 24))
    assert text.rstrip().endswith("q closes this screen")


@pytest.mark.parametrize("width", [1, 2, 10, 20, 40, 79, 80, 250])
@pytest.mark.parametrize("height", [1, 2, 5, 9, 12, 23, 24, 60])
@pytest.mark.parametrize("phase", PeerPhase)
def test_watch_fits_any_terminal(width: int, height: int, phase: PeerPhase) -> None:
    lines = draw_watch(view(phase, note="waiting for it to come back, 3 s at most"), width, height)
    assert len(lines) <= height
    assert all(line.cell_len <= width for line in lines)


def test_what_matters_most_is_kept_on_a_small_terminal() -> None:
    text = "\n".join(on_screen(draw_watch(view(), 60, 7), 60, 7))
    assert "training round 12" in text
    assert "40% of 3 M tokens" in text
    assert "swarm 12.3 k tokens/s" in text


def test_many_peers_are_counted() -> None:
    status = make_status()
    for number in range(500):
        status.peers.add(peer=f"12D3KooW{number:06}", name=f"peer-{number}", tokens=number, present=number % 2 == 0)
    seen = View(status=status, phase=PeerPhase.RUNNING, folder=FOLDER, now=status.time)
    shown = on_screen(draw_watch(seen, 80, 24), 80, 24)
    (rest,) = [line for line in shown if line.startswith("and ")]
    assert re.fullmatch(r"and 50\d more: \d+ here, \d+ away, \S+ k tokens", rest)
    assert any(line.startswith("anna (you)") for line in shown)
    page = [line.plain for line in draw_status(seen, 10_000, 10_000)]
    assert sum("peer-" in line for line in page) == 500


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_only_ascii(width: int, height: int) -> None:
    shown = on_screen(draw_watch(view(), width, height, ascii_only=True), width, height)
    assert "\n".join(shown).replace("…", "").isascii()


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_nothing_is_known_yet(width: int, height: int) -> None:
    empty = View(status=wire.PeerStatus(), phase=PeerPhase.STARTING, folder=FOLDER, now=1.0)
    text = "\n".join(on_screen(draw_watch(empty, width, height), width, height))
    assert "swarm, peer" in text
    assert "it is starting, and does not answer yet" in text
    assert "none yet" in text
    on_screen(draw_status(empty, width, 10), width, height)
    started = wire.PeerStatus(time=1.0, pid=1, state=wire.PEER_STATE_STARTING, doing="preparing the text")
    seen = View(status=started, phase=PeerPhase.RUNNING, now=2.0)
    text = "\n".join(line.plain for line in draw_status(seen, width, 10))
    assert "the peer, peer" in text
    assert "preparing the text" in text


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e300, -1e300])
def test_senseless_and_huge_numbers(number: float, width: int, height: int) -> None:
    largest = 2**64 - 1
    status = make_status(
        round=largest,
        run_tokens=largest,
        total_tokens=largest,
        own_tokens=largest,
        sent_bytes=largest,
        inner_steps=largest,
        pid=2**32 - 1,
        own_tokens_per_s=number,
        swarm_tokens_per_s=number,
        sent_bytes_per_s=number,
        times_below_allreduce=number,
        stall_share=number,
        held_out_loss=number,
        started_time=number,
    )
    for peer in status.peers:
        peer.tokens, peer.tokens_per_s, peer.round = largest, number, largest
    status.losses.add(round=1, run_tokens=largest, loss=number, held_out_loss=number)
    status.notices.add(time=number, message="m")
    status.checkpoint.time = number
    for phase in PeerPhase:
        for when in (status.time, number):
            status.time = when
            seen = View(status=status, phase=phase, folder=FOLDER, now=time.time())
            on_screen(draw_watch(seen, width, height), width, height)
            assert all(line.cell_len <= width for line in draw_status(seen, width, 10))
            plain_line(seen)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_names_and_messages_of_others_are_plain_text(width: int, height: int) -> None:
    hostile = "\x1b[2J\x1b]0;owned\x07[bold red]x[/]\n\u202ereversed\r" + "宽" * 40
    status = make_status(name=hostile, doing=hostile, run_name=hostile, role=hostile, peer=hostile, end_reason=hostile)
    for peer in status.peers:
        peer.name = peer.peer = hostile
    status.notices.add(time=status.time, message=hostile)
    status.limits.hours = hostile
    for phase in PeerPhase:
        seen = View(status=status, phase=phase, folder=FOLDER, now=status.time)
        for lines in (draw_watch(seen, width, height), draw_status(seen, width, 3)[:height], list_peers([seen], width)):
            text = "\n".join(on_screen(lines, width, height))
            assert not any(ord(character) < 32 for character in text.replace("\n", ""))
            assert "\u202e" not in text
        assert plain_line(seen).isprintable()
        assert "[bold red]" in plain_line(seen) or phase in (
            PeerPhase.STARTING,
            PeerPhase.DIED,
            PeerPhase.LOST,
        )


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (view(), "training round 12: 14 of 25 steps"),
        (view(doing="", state=wire.PEER_STATE_PAUSED), "paused, no details"),
        (view(PeerPhase.STARTING), "it is starting, and does not answer yet"),
        (
            view(PeerPhase.SILENT),
            "it runs but does not answer; its last status, 1 s ago: training round 12: 14 of 25 steps",
        ),
        (view(PeerPhase.ENDING, end_reason="asked", state=wire.PEER_STATE_DONE), "ending: it was asked to leave"),
        (
            view(PeerPhase.ENDED, end_reason="total_tokens"),
            "ended 1 s ago: total_tokens: the run has trained all of them",
        ),
        (view(PeerPhase.ENDED, end_reason="asked"), "ended 1 s ago: it was asked to leave"),
        (
            view(PeerPhase.FAILED, end_reason="nobody answers", exit_code=1),
            "failed 1 s ago: nobody answers (exit code 1); "
            "start it again with `swarmtrain join --name anna --dir /home/anna/swarm` and the other options it had",
        ),
        (
            view(PeerPhase.FAILED, end_reason="nobody answers", exit_code=1, name="Anna01"),
            "failed 1 s ago: nobody answers (exit code 1); "
            "start it again with `swarmtrain join --dir /home/anna/swarm` and the other options it had",
        ),
    ],
)
def test_what_it_does_in_a_sentence(seen: View, expected: str) -> None:
    assert sentence(seen) == expected


def test_a_line_of_one_that_starts_or_ends_says_it_once_and_no_figures_that_are_not_known() -> None:
    ends = [
        view(phase, end_reason="asked", state=wire.PEER_STATE_DONE) for phase in (PeerPhase.RUNNING, PeerPhase.ENDING)
    ]
    assert {plain_line(seen).partition("; ")[0][9:] for seen in ends} == {"anna ending: it was asked to leave"}
    new = wire.PeerStatus(name="anna", time=1.0, state=wire.PEER_STATE_STARTING, doing="starting the network")
    line = plain_line(View(status=new, phase=PeerPhase.RUNNING, folder=FOLDER, now=1.0))
    assert line[9:] == "anna starting: starting the network"


def test_a_death_is_told_with_its_time_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    noon = 1_800_000_000 // 86400 * 86400 + 12 * 3600.0
    status = make_status(time=noon)
    seen = View(status=status, phase=PeerPhase.DIED, folder=Path("/home/anna/my swarm"), now=noon + 3600)
    assert sentence(seen) == (
        "died about 12:00 (it was training round 12); "
        "start it again with `swarmtrain join --name anna --dir '/home/anna/my swarm'` and the other options it had"
    )
    later = View(
        status=make_status(time=noon, name="bootstrap", role="bootstrap", state=5),
        phase=PeerPhase.DIED,
        now=noon + 5 * 86400,
    )
    assert sentence(later) == (
        "died about 2027-01-15 12:00 (it was serving); "
        "start it again with `swarmtrain bootstrap RUN.toml` and the other options it had"
    )
    told = "\n".join(on_screen(draw_watch(seen, 80, 24), 80, 24))
    assert "--dir '/home/anna/my" in told
    assert "q closes" not in told
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "40% of 3 M tokens, about 2 min 26 s left"),
        ({"state": wire.PEER_STATE_PAUSED}, "40% of 3 M tokens"),
        ({"swarm_tokens_per_s": 0}, "40% of 3 M tokens, about 2 min 26 s left"),
        ({"end_time": 0}, "40% of 3 M tokens"),
        ({"run_tokens": 2_999_999, "end_time": NOON}, "99% of 3 M tokens, about to be reached"),
        ({"run_tokens": 3_000_000, "end_time": NOON}, "100% of 3 M tokens, reached at 2026-11-29 12:00"),
        ({"run_tokens": 4_000_000, "end_time": 0}, "100% of 3 M tokens, reached"),
        ({"run_tokens": 3_000_000, "end_time": NOON, "state": 7}, "100% of 3 M tokens, reached at 2026-11-29 12:00"),
        ({"run_tokens": 10_000}, "0.3% of 3 M tokens, about 2 min 26 s left"),
        ({"total_tokens": 2**63, "end_time": 1e10}, "<0.1% of 9223 P tokens, more than 10 years left"),
        ({"total_tokens": 0}, "1.2 M tokens"),
    ],
)
def test_progress(changes: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    page = [line.plain for line in draw_status(view(**changes), 200, 10)]
    (line,) = [line for line in page if line.startswith("progress")]
    assert line.removeprefix("progress").strip() == expected
    monkeypatch.undo()
    time.tzset()


def test_the_status_page_fits_a_screen_and_names_everyone() -> None:
    shown = on_screen(draw_status(view(), 80, 6), 80, 24)
    text = "\n".join(shown)
    assert re.search(r"bert +Bert01  600 k tokens  50%  here  round 12", text)
    assert re.search(r"cleo +Cleo01  200 k tokens  17%  away", text)
    assert re.search(r"bootstrap +Boot01 +bootstrap +here", text)
    assert "limits        2 threads, any memory, nice 10, at any load, in the hours 22-7" in text
    assert "process       " in text
    assert "folder        /home/anna/swarm" in text
    assert "reach" not in text


def test_who_cannot_be_dialled_is_told_so() -> None:
    told = "nobody can dial this computer; its work goes through carl and dora"
    shown = View(status=make_status(reach=told), phase=PeerPhase.RUNNING, folder=FOLDER, now=make_status().time)
    assert f"reach         {told}" in "\n".join(on_screen(draw_status(shown, 120, 6), 120, 30))


def test_what_it_trains_on_is_one_line() -> None:
    status = make_status()
    assert not any(line.plain.startswith("device") for line in draw_status(view(), 120, 6))
    status.device.CopyFrom(
        wire.DeviceStatus(
            device="cuda:0", title="A \x1b[31mCard", precision="bf16", microbatch_sequences=32, why="it works"
        )
    )
    seen = View(status=status, phase=PeerPhase.RUNNING, folder=FOLDER, now=status.time + 1)
    expected = "device        cuda:0 (A \\x1b[31mCard) in bf16, 32 sequences at once: it works"
    assert expected in on_screen(draw_status(seen, 120, 6), 120, 40)
    assert expected in on_screen(draw_watch(seen, 120, 40), 120, 40)
    on_screen(draw_watch(seen, 80, 24), 80, 24)
    status.device.CopyFrom(wire.DeviceStatus(device="cpu", precision="fp32", compiled=True, microbatch_sequences=1))
    page = on_screen(draw_status(seen, 120, 6), 120, 40)
    assert "device        the processor in fp32, compiled, 1 sequence at once" in page
    status.device.CopyFrom(wire.DeviceStatus(device="cuda:0,1", precision="bf16", microbatch_sequences=4))
    expected = "device        cuda:0 and cuda:1, data parallel in bf16, 4 sequences at once on each"
    assert expected in on_screen(draw_status(seen, 120, 6), 120, 40)


def test_a_list_of_peers() -> None:
    ended = make_status(name="bert", state=wire.PEER_STATE_DONE)
    lines = list_peers([view(), View(status=ended, phase=PeerPhase.ENDED, folder=FOLDER, now=ended.time + 400)], 120)
    first, second = on_screen(lines, 120, 24)[:2]
    assert re.fullmatch(r"anna  Anna01  volunteer  training +stdlib-gpt  40%  /home/anna/swarm", first)
    assert re.fullmatch(r"bert  Anna01  volunteer  ended     6 min ago  stdlib-gpt  40%  /home/anna/swarm", second)


def test_a_narrow_list_has_whole_folders() -> None:
    folder = Path("/home/anna/.local/share/swarmtrain/volunteer-anna-of-the-long-name-and-more")
    seen = View(status=make_status(), phase=PeerPhase.RUNNING, folder=folder, now=make_status().time)
    lines = [line.plain for line in list_peers([view(), seen], 60)]
    assert all(len(line) <= 60 for line in lines) and "".join(lines).count("…") == 0
    assert [line.split()[0] for line in lines[:3]] == ["anna", "/home/anna/swarm", "anna"]
    assert "".join(line.strip() for line in lines[3:]) == str(folder)


def test_nobody_is_here_on_the_page_of_one_that_has_ended() -> None:
    ended = make_status(state=wire.PEER_STATE_DONE)
    for width in (40, 80, 10_000):
        over = View(status=ended, phase=PeerPhase.ENDED, folder=FOLDER, now=ended.time + 400)
        page = [line.plain for line in draw_status(over, width, 10)]
        rows = page[next(n for n, line in enumerate(page) if line.startswith("contributions")) :]
        assert rows[0] == "contributions  3 volunteers in all"
        assert not any(word in " ".join(rows) for word in ("here", "away", "round", "tokens/s")), rows
        assert "anna (you)" in rows[1]


def test_limits() -> None:
    assert limits_in_words(wire.Limits()) == "all threads, any memory, at any load, at any hour"
    limits = wire.Limits(threads=1, memory_bytes=4 * 10**9, nice=19, only_when_idle=True, hours="any", up_mbit=2.5)
    assert limits_in_words(limits) == (
        "1 thread, at most 4 GB of memory, nice 19, only when the machine is idle, at any hour, "
        "sends at most 2.5 Mbit/s"
    )
    guest = wire.Limits(gpu_share=50, gpu_any_time=False, on_battery=False, max_temperature=88.0)
    assert limits_in_words(guest).removeprefix("all threads, any memory, at any load, at any hour, ") == (
        "50% of the graphics card's time, only while nothing else uses the card, not on battery, up to 88 °C"
    )
    guest = wire.Limits(gpu_any_time=True, on_battery=True)
    assert limits_in_words(guest).endswith(", whatever else uses the card, also on battery")


def test_a_plain_line() -> None:
    line = plain_line(view())
    assert line[8:] == (
        " anna training: training round 12: 14 of 25 steps; round 12; loss 2.250 nats/token, held-out 2.100 "
        "nats/byte; "
        "40% of 3 M tokens; about 2 min 26 s left; own 400 k tokens, 33% of all"
    )
    assert cell_len(line) == len(line)


# ---------------------------------------------------------------- the stages of a pipeline


def stages_view(*rates: float, mine: tuple[int, ...] = (1,), **changes: Any) -> View:
    """Stages whose peers could do so much, one peer for each thousand tokens/s, half of it passing through."""
    seen = view(**changes)
    for number, rate in enumerate(rates):
        seen.status.stages.add(
            number=number,
            num_peers=int(rate // 1000),
            tokens_per_s=rate / 2,
            most_tokens_per_s=rate,
            mine=number in mine,
        )
    return seen


def stage_lines(lines: list[Text]) -> list[str]:
    return [line.plain for line in lines if re.match(r"stage \d|and \d+ more stage", line.plain)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_each_stage_is_a_line_with_its_peers_and_what_passes(width: int, height: int) -> None:
    expected = [
        "stage 0  2 peers  1 k tokens/s of 2 k tokens/s",
        "stage 1  1 peer   500 tokens/s of 1 k tokens/s    (you)",
        "stage 2  nobody   0 tokens/s of 0 tokens/s",
        "stage 3  3 peers  1.5 k tokens/s of 3 k tokens/s",
    ]
    seen = stages_view(2000, 1000, 0, 3000)
    watched = draw_watch(seen, width, height)
    on_screen(watched, width, height)
    assert stage_lines(watched) == expected
    page = draw_status(seen, width, 6)
    on_screen(page, width, 40)
    assert stage_lines(page) == expected
    assert [line.plain for line in page].index("stages") == [line.plain for line in page].index(expected[0]) - 1


def test_without_a_pipeline_nothing_is_said_of_stages() -> None:
    page = [line.plain for line in (*draw_status(view(), 120, 6), *draw_watch(view(), 120, 40))]
    assert not any("stage" in line for line in page)


def test_of_many_stages_the_slowest_are_shown_in_their_order() -> None:
    rates = [1000.0 * (1 + (7 * number) % 20) for number in range(20)]
    shown = stage_lines(draw_status(stages_view(*rates), 200, 6))
    slowest = sorted(sorted(range(20), key=lambda number: rates[number])[:8])
    assert [int(line.split()[1]) for line in shown[:-1]] == slowest
    assert shown[-1] == "and 12 more stages, not slower than these"
    rates[13] = 0.0
    shown = stage_lines(draw_watch(stages_view(*rates), 120, 40))
    assert any(re.match(r"stage 13 +nobody", line) for line in shown), "an empty one is shown, however many there are"
    assert len(shown) == 9


def test_eight_stages_need_no_word_on_the_rest() -> None:
    shown = stage_lines(draw_status(stages_view(*[1000.0] * 8), 200, 6))
    assert [line.split()[1] for line in shown] == list("01234567")


@pytest.mark.parametrize("width", [1, 2, 10, 20, 40, 79, 80, 250])
@pytest.mark.parametrize("height", [1, 2, 5, 9, 12, 23, 24, 60])
@pytest.mark.parametrize("num_stages", [1, 2, 9, 512])
def test_stages_fit_any_terminal(width: int, height: int, num_stages: int) -> None:
    seen = stages_view(*[1e9] * num_stages)
    lines = draw_watch(seen, width, height)
    assert len(lines) <= height
    assert all(line.cell_len <= width for line in (*lines, *draw_status(seen, width, 6)))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e300, -1e300])
def test_senseless_speeds_of_stages(number: float) -> None:
    seen = stages_view(1000, 2000)
    seen.status.stages.add(number=2**32 - 1, num_peers=2**32 - 1, tokens_per_s=number, most_tokens_per_s=number)
    for width, height in SIZES:
        on_screen(draw_watch(seen, width, height), width, height)
    shown = stage_lines(draw_status(seen, 10_000, 6))
    assert len(shown) == 3 and shown[2].startswith("stage 4294967295  4294967295 peers")
    assert "nan" not in shown[2] and "inf" not in shown[2]


def test_who_holds_which_stage_is_said_of_each_peer() -> None:
    seen = stages_view(1000, 2000)
    seen.status.peers[0].stages.extend([0, 1])
    seen.status.peers[1].stages.append(1)
    text = "\n".join(line.plain for line in draw_status(seen, 200, 6))
    assert re.search(r"anna \(you\).* here  stages 0 and 1, round 12", text)
    assert re.search(r"bert .* here  stage 1, round 12", text)


# ---------------------------------------------------------------- whole, at 80 columns


LONG = "N" * 64
WIDE = "宽" * 40


def crowd(name: str, **changes: Any) -> View:
    """Return the status of a run of many peers, with names of the maximum length."""
    seen = view(name=name, run_name=name, **changes)
    for number in range(12):
        peer, tokens = f"12D3KooWexample{number:06}", 10**9 + number
        seen.status.peers.add(
            peer=peer, name=name, tokens=tokens, present=number % 3 > 0, round=12345, tokens_per_s=123_456.0
        )
    del seen.status.notices[:]
    seen.status.notices.add(time=NOON, message=f"refused what {name[:15]}… sent: a gradient against the own one: "
                            "cosine -0.123, usual are 0.456; it is asked again in a minute")  # fmt: skip
    return seen


def gossip(name: str) -> View:
    three = f"{name[:15]}…, {name[:15]}…, {name[:15]}… and 2 others"
    merged = f"{three} in 12.3 s, at most 2 rounds old, weights 12.3% apart"
    reach = "nobody can dial this computer; its work goes through " + three
    return crowd(name, last_merge=merged, reach=reach, data="the last round from shard 12; 34 are still unseen by all")


def diloco(name: str) -> View:
    waits = f"merging round 12345: waiting for {name[:15]}…, {name[:15]}… and {name[:15]}…, 12 s at most"
    return crowd(name, doing=waits, times_below_allreduce=1234.5, stall_share=1.0)


def bootstrap(name: str) -> View:
    seen = crowd(name, role="bootstrap", state=wire.PEER_STATE_SERVING, own_tokens=0, doing="serving 12 volunteers")
    kept = seen.status.archive
    kept.num_rounds, kept.run_tokens, kept.time = 12_344, 1_100_000, seen.status.time - 12
    kept.path = "/home/anna/.local/share/swarmtrain/bootstrap-of-a-long-run/archive/model.safetensors"
    seen.status.ClearField("checkpoint")
    return seen


def pipeline(name: str) -> View:
    seen = crowd(name, doing="training stage 1, round 1234: 12 of 64 steps; stage 2, round 1234: 11 of 64 steps")
    for number in range(8):
        seen.status.stages.add(
            number=number, num_peers=12, tokens_per_s=123_456, most_tokens_per_s=234_567, mine=number < 2
        )
    for peer in seen.status.peers:
        peer.stages.extend(range(int(peer.tokens) % 4, 8))
    return seen


@pytest.mark.parametrize("name", [LONG, WIDE, "anna"], ids=["long", "wide", "short"])
@pytest.mark.parametrize("made", [gossip, diloco, bootstrap, pipeline])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 30)])
def test_no_line_is_cut_before_its_point(made: Any, name: str, width: int, height: int) -> None:
    seen = made(name)
    page, watched = draw_status(seen, width, 6), draw_watch(seen, width, height)
    on_screen(page, width, 60)
    on_screen(watched, width, height)
    for lines in (page, watched):
        text = "\n".join(line.plain for line in lines)
        assert "…" not in re.sub("(N|宽)+ ?…", "", text.replace("\n" + " " * 14, "").replace("anna…", "")), text
        assert ", about 2 min 2" in text and "12.3 k tokens/s" in text
        assert "it is asked again in a minute" in " ".join(text.split())
        assert made is pipeline or re.search(r"123 k tokens/s$", text, re.MULTILINE), "at least one of the others"
    whole = " ".join(" ".join(line.plain for line in watched).split())
    if made is bootstrap:
        assert "12344 rounds, 1.1 M tokens, 13 s ago, in /home/anna/" in whole and "own 4.1" not in whole
        assert "2.250 nats/token (median of the volunteers)" in whole
        assert "archive/model.safetensors" in "".join(line.plain.strip() for line in watched)
    else:
        assert "contribution 400 k tokens" in whole


def test_what_of_a_peers_line_goes_first_when_it_is_narrow() -> None:
    seen = crowd(LONG)
    for peer in seen.status.peers:
        peer.stages.extend([0, 2, 5])
    lines = {width: draw_status(seen, width, 3)[-2].plain for width in (120, 92, 60, 46)}
    assert re.search(
        r"^N+…  00\d+ +1 G tokens +\S+%  here  stages 0, 2 and 5, round 12345  123 k tokens/s$", lines[120]
    )
    assert re.search(r"^N+… +1 G tokens +\S+%  here  stages 0, 2 and 5, round 12345  123 k tokens/s$", lines[92])
    assert re.search(r"^N+… +1 G tokens +\S+%  here  123 k tokens/s$", lines[60])
    assert re.search(r"^N+… +1 G tokens  here  123 k tokens/s$", lines[46])


def test_shares_are_a_hundred_percent() -> None:
    rng = random.Random(7)
    for _ in range(300):
        counts = [rng.choice([0, 1, 10, 1000, 10**6]) * rng.randrange(5) for _ in range(rng.randrange(1, 40))]
        shares = [float(share.strip("<%")) * (not share.startswith("<")) for share in shares_in_words(counts)]
        assert sum(shares) == pytest.approx(100 if sum(counts) else 0)
    assert shares_in_words([1, 1, 1]) == ["34%", "33%", "33%"] and shares_in_words([5, 0]) == ["100%", "0%"]
    assert shares_in_words([9994, 6]) == ["99.9%", "0.1%"] and shares_in_words([10**9, 1, 0]) == ["100%", "<0.1%", "0%"]
    assert shares_in_words([]) == [] and shares_in_words([0, 0]) == ["0%", "0%"]


def test_the_own_share_is_that_of_the_own_row() -> None:
    seen = view()
    seen.status.own_tokens = seen.status.peers[0].tokens = 410_000
    text = "\n".join(line.plain for line in draw_status(seen, 80, 6))
    assert "contribution  410 k tokens, 34% of all" in text
    assert [int(share) for share in re.findall(r"tokens +(\d+)%", text)] == [34, 50, 16]
    assert "own 410 k tokens, 34% of all" in plain_line(seen)


def test_a_bootstrap_has_no_speed_of_its_own_and_says_that_nothing_is_archived() -> None:
    seen = bootstrap("anna")
    seen.status.ClearField("archive")
    text = "\n".join(line.plain for line in draw_watch(seen, 80, 24))
    assert "speed         swarm 12.3 k tokens/s" in text and "archive       nothing yet" in text


@pytest.mark.parametrize("cells", [10, 17, 66])
def test_wrapped_text_loses_nothing(cells: int) -> None:
    rng = random.Random(cells)
    for _ in range(100):
        words = ["".join(rng.choices("abc宽", k=rng.randrange(1, 30))) for _ in range(rng.randrange(12))]
        lines = wrap(" ".join(words), cells, 10_000)
        assert all(cell_len(line) <= cells for line in lines)
        assert "".join(lines).replace(" ", "") == "".join(words)
        cut = wrap(" ".join(words), cells, 2)
        assert (
            len(cut) == min(2, len(lines)) and cut[-1].endswith("…") == (len(lines) > 2) and cell_len(cut[-1]) <= cells
        )
