"""Live displays, drawn without a terminal."""

from __future__ import annotations

import io
import threading
import time

import pytest
from rich.console import Console

from swarmtrain.cli.display import PeerDisplay, SwarmDisplay
from swarmtrain.events import (
    ArrivingEvent,
    DoneEvent,
    EvalEvent,
    Event,
    FetchedEvent,
    InviteEvent,
    JoinedEvent,
    PeerLostEvent,
    RoundEvent,
    StartedEvent,
    WarningEvent,
)
from swarmtrain.v1 import control_pb2 as pb


def console(width: int = 80) -> Console:
    return Console(file=io.StringIO(), record=True, width=width, force_terminal=True, color_system=None)


def round_event(number: int, name: str = "anna", run_tokens: int = 0) -> RoundEvent:
    return RoundEvent(
        time=1000.0 + 10 * number,
        peer=f"12D3KooW{name}",
        name=name,
        round=number,
        inner_steps=25,
        tokens=50_000,
        run_tokens=run_tokens or 150_000 * (number + 1),
        loss=2.5 - 0.1 * number,
        first_loss=2.6,
        learning_rate=3e-3,
        seconds=10,
        merge_s=0.4,
        stall_s=0.3,
        bytes_sent=6_800_000,
        bytes_received=6_800_000,
        times_below_allreduce=25.1,
        partners=("12D3KooWanna", "12D3KooWbert", "12D3KooWcleo"),
        weights=(50_000, 50_000, 50_000),
        signer="12D3KooWanna",
        state_sha256="00" * 32,
    )


def drawn(display: PeerDisplay | SwarmDisplay, events: list[Event], width: int = 80) -> str:
    for event in events:
        display.show(event)
    screen = console(width)
    screen.print(display.draw())
    return screen.export_text()


OPENING: list[Event] = [
    FetchedEvent(run_sha256="ab" * 32, run_name="stdlib-gpt", total_tokens=0, held_out_bytes=65536, from_peer="P"),
    JoinedEvent(time=990.0, round=0, run_tokens=0, num_peers=3, state_from="", wall_s=3),
    StartedEvent(inner_steps_per_round=25, num_parameters=853_120, total_tokens=3_000_000, startup_s=4),
]


def test_a_peer_shows_progress_loss_share_and_bytes() -> None:
    events: list[Event] = [
        *OPENING,
        *(round_event(number) for number in range(4)),
        EvalEvent(round=3, held_out_loss=2.2),
    ]
    text = drawn(PeerDisplay(console=console()), events)
    assert "run stdlib-gpt (abababababab)" in text
    assert "20% of 3 M tokens, about 2 min 40 s left" in text
    assert "round 3   loss 2.200   held-out 2.200 nats/byte   3 peers here   own share 33%" in text
    assert "25 inner steps in 10.0 s, merged in 0.4 s, stalled for 0.3 s" in text
    assert "sent 272 kB per inner step, 25.1 times below an all-reduce at every step" in text


def test_losses_by_source_are_shown_beside_the_whole_one() -> None:
    measured = EvalEvent(name="anna", round=3, held_out_loss=2.2, sources=("code", "prose"), source_losses=(2.5, 1.3))
    text = drawn(PeerDisplay(console=console()), [*OPENING, round_event(3), measured])
    assert "held-out by source: code 2.500, prose 1.300 nats/byte" in text
    text = drawn(SwarmDisplay("stdlib-gpt", 3_000_000, console(140)), [round_event(0, "anna"), measured], 140)
    assert "held-out loss 2.200 nats/byte: code 2.500, prose 1.300 nats/byte" in text


def test_what_is_said_of_the_swarm_as_a_whole_is_a_line_and_no_peer() -> None:
    shown = drawn(SwarmDisplay(console=console()), [WarningEvent(message="rehearsal: anna: made to hang for 5 s")])
    assert "made to hang" in shown and "nobody" not in shown


def test_one_that_joins_late_shows_how_far_the_weights_are() -> None:
    display = PeerDisplay(console=console())
    arriving = ArrivingEvent(received_bytes=12_000_000, total_bytes=48_000_000, seconds=10.0)
    text = drawn(display, [OPENING[0], arriving, PeerLostEvent(lost="12D3KooWcleo", reason="silent for 30 s")], 100)
    assert "fetching the current weights" in text and "━" in text
    assert "12 MB of 48 MB (25%), 30.0 s left" in text
    assert "arrive" not in text, "the bar says it"
    assert "12 MB" not in drawn(display, [OPENING[1]])
    assert "joining" in drawn(SwarmDisplay(console=console()), [arriving])


def bootstrap_status() -> pb.PeerStatus:
    status = pb.PeerStatus(
        role="bootstrap",
        state=pb.PEER_STATE_SERVING,
        doing="serving 1 volunteer in round 7; the archive holds 6 rounds",
        run_tokens=300_000,
        total_tokens=3_000_000,
        round=7,
    )
    status.losses.add(round=6, run_tokens=300_000, loss=2.25)
    status.archive.CopyFrom(pb.Archive(num_rounds=6, run_tokens=250_000, time=990.0, path="/runs/archive"))
    status.peers.add(peer="12D3KooWanna", name="anna", tokens=300_000, present=True, round=7)
    return status


def test_a_bootstrap_shows_what_its_status_says() -> None:
    display = PeerDisplay("swarmtrain bootstrap: x", 3_000_000, console())
    status = bootstrap_status()
    display.look_at(lambda: status)
    text = drawn(display, [InviteEvent(line="swarmtrain join x", invite="x", run_sha256="ab", addresses=())])
    assert status.doing in text
    assert "10% of 3 M tokens" in text
    assert "2.250 nats/token (median of the volunteers)" in text
    assert "6 rounds, 250 k tokens" in text and "in /runs/archive" in text
    assert "1 of 1 volunteer here" in text and "anna" in text
    status.doing, status.run_tokens, status.end_time = "serving 2 volunteers", 1_500_000, time.time() + 100.4
    text = drawn(display, [])
    assert "serving 2 volunteers" in text and "50% of 3 M tokens, about 1 min 40 s left" in text


def test_the_screen_goes_on_without_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmtrain.cli.display._DRAWN_PER_S", 50.0)
    screen, status = console(), bootstrap_status()
    looks, again = [0], threading.Event()

    def look() -> pb.PeerStatus:
        looks[0] += 1
        if looks[0] > 2:
            again.set()
        if looks[0] == 2:
            raise RuntimeError("a look that fails")
        return status

    display = PeerDisplay("swarmtrain bootstrap: x", 3_000_000, screen)
    display.look_at(look)
    display.start()
    try:
        assert again.wait(30.0), "nobody looked again"
    finally:
        display.stop()
    assert status.doing in screen.export_text()


def test_a_volunteer_shows_for_whom_it_waits() -> None:
    display = PeerDisplay(console=console())
    status = pb.PeerStatus(role="volunteer", doing="waiting for 1 more volunteer before the first round")
    display.look_at(lambda: status)
    assert status.doing in drawn(display, OPENING[:2])
    status.doing, status.own_tokens = "training round 1: 3 of 25 steps", 50_000
    status.peer = "12D3KooWanna"
    for peer in ("12D3KooWanna", "12D3KooWbert"):
        status.peers.add(peer=peer, tokens=50_000, present=True)
    text = drawn(display, [OPENING[2], round_event(0)], 120)
    assert status.doing in text
    assert "2 peers here   own 50 k tokens, 50% of all" in text, "as its status page has it"


def test_one_peer_and_one_step_are_no_plural() -> None:
    alone = round_event(0).model_copy(update={"partners": (), "signer": "", "inner_steps": 1})
    text = drawn(PeerDisplay(console=console()), [*OPENING, alone])
    assert "1 peer here" in text and "1 inner step in" in text


def test_a_lost_peer_is_no_longer_counted_and_is_told() -> None:
    events: list[Event] = [*OPENING, round_event(0), PeerLostEvent(lost="12D3KooWcleo", reason="silent for 30 s")]
    text = drawn(PeerDisplay(console=console()), events)
    assert "2 peers here" in text
    assert "peer Wcleo is lost" in text or "Wcleo is lost: silent for 30 s" in text


def test_a_late_joiner_counts_its_share_from_when_it_came() -> None:
    joined = JoinedEvent(time=990.0, round=9, run_tokens=1_000_000, num_peers=3, state_from="P", wall_s=3)
    text = drawn(PeerDisplay(console=console()), [joined, round_event(9, run_tokens=1_100_000)])
    assert "own share 50% since it joined" in text


def test_a_warning_is_shown_whole() -> None:
    words = " ".join(f"word{number}" for number in range(30))
    text = drawn(PeerDisplay(console=console()), [*OPENING, WarningEvent(message=words)], 80)
    assert words in " ".join(text.split()) and "…" not in text


def test_times_below_are_those_of_all_rounds() -> None:
    rounds = [round_event(0), round_event(1).model_copy(update={"bytes_sent": 3 * 6_800_000})]
    for display in (PeerDisplay(console=console()), SwarmDisplay(console=console())):
        text = drawn(display, [*(event.model_copy(update={"name": rounds[0].name}) for event in OPENING), *rounds])
        assert "12.5 times below an all-reduce" in text or "12.5x" in text, text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_every_width_keeps_each_line_within_it(width: int) -> None:
    events: list[Event] = [*OPENING, round_event(0), WarningEvent(message="x" * 300), round_event(1)]
    for display in (PeerDisplay(console=console()), SwarmDisplay(console=console())):
        for line in drawn(display, events, width).splitlines():
            assert len(line) <= width


def test_an_invite_is_printed_once_in_one_piece() -> None:
    screen = console()
    display = PeerDisplay(console=screen)
    display.start()
    line = "swarmtrain join " + "x" * 200
    display.show(InviteEvent(line=line, invite="x" * 200, run_sha256="ab", addresses=()))
    display.show(round_event(0))
    display.stop()
    assert screen.export_text().count(line) == 1


def test_what_others_wrote_is_shown_as_plain_text() -> None:
    fetched = FetchedEvent(run_sha256="ab", run_name="[bold]x\x1b[2J", held_out_bytes=1, from_peer="P")
    text = drawn(PeerDisplay(console=console()), [fetched, WarningEvent(message="[red]\x1b[2J")])
    assert r"[bold]x\x1b[2J" in text
    assert r"[red]\x1b[2J" in text
    assert "\x1b" not in text


def test_a_swarm_has_a_row_for_each_peer() -> None:
    events: list[Event] = [round_event(number, name) for number in range(2) for name in ("anna", "bert", "cleo")]
    events.append(
        DoneEvent(name="bert", held_out_loss=1.912, tokens=9, run_tokens=300_000, wall_s=20, reason="total_tokens")
    )
    text = drawn(SwarmDisplay("stdlib-gpt", 3_000_000, console()), events)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()[0] in ("anna", "bert", "cleo")}
    assert rows["anna"] == ["anna", "training", "1", "2.400", "34%", "10.0", "6.8", "MB", "25.1x"]
    assert rows["bert"][1] == "done"
    assert [rows[name][4] for name in ("bert", "cleo")] == ["33%", "33%"], "of a hundred"
    assert "10% of 3 M tokens" in text
    assert "held-out loss 1.912 nats/byte" in text and "bits" not in text


def test_an_unknown_end_shows_tokens_only() -> None:
    text = drawn(SwarmDisplay(console=console()), [round_event(0)])
    assert "150 k tokens" in text
    assert "left" not in text
