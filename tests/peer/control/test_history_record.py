"""Record of a run as a peer keeps it: over restarts, bounded, and of this run only."""

from __future__ import annotations

from pathlib import Path

from swarmtrain.events import (
    DoneEvent,
    EvalEvent,
    Event,
    FetchedEvent,
    InviteEvent,
    PeerJoinedEvent,
    PeerLeftEvent,
    PeerLostEvent,
    RefusedEvent,
    WarningEvent,
)
from swarmtrain.peer.control.board import StatusBoard
from swarmtrain.peer.control.history import HISTORY_NAME, MAX_EVENTS, PeerHistory, read_history
from swarmtrain.peer.control.server import ControlHandlers, ControlServer
from swarmtrain.protocol.history import HistoryPoint, TextSample, ToldHistory
from swarmtrain.v1 import control_pb2 as pb

RUN = "ab" * 32
SAMPLE = TextSample(prompt="def ", text="f():", round=2, run_tokens=200, time=20.0)


def joined(name: str, time: float = 1.0) -> Event:
    return PeerJoinedEvent(time=time, joined="12D3KooWexample", joined_name=name)


def begun() -> PeerHistory:
    history = PeerHistory()
    history.begin(RUN, 1_000_000)
    return history


def words(history: PeerHistory) -> list[str]:
    return [event.words for event in history.message().events]


def test_what_is_noted_is_what_one_looks_back_at() -> None:
    history = begun()
    history.take(InviteEvent(line="swarmtrain join st1", invite="st1", run_sha256=RUN, addresses=()))
    history.take(joined("anna"))
    history.take(DoneEvent(time=3.0, held_out_loss=None, tokens=5, run_tokens=9, wall_s=1.0, reason="asked"))
    assert [event.event for event in history.message().events] == ["peer_joined", "done"]
    assert words(history)[0] == "peer anna joined"


def test_an_event_names_whom_it_is_about() -> None:
    history = begun()
    history.take(joined("anna"))
    history.take(PeerLostEvent(time=2.0, lost="12D3KooWbert", lost_name="bert", reason="it does not answer"))
    history.take(PeerLeftEvent(time=3.0, left="12D3KooWcleo"))
    history.take(RefusedEvent(time=4.0, from_peer="12D3KooWmallory", rule="finite", detail="7 NaNs"))
    history.take(WarningEvent(time=5.0, message="the disk is full", code="disk-full"))
    told = [event.about.removeprefix("12D3KooW") for event in history.message().events]
    assert told == ["example", "bert", "cleo", "mallory", ""]


def test_an_event_without_a_time_happens_now() -> None:
    """Events are stamped where they are written, which is after they are noted here."""
    times = iter((1000.0, 1007.0))
    history = PeerHistory(lambda: next(times))
    for _ in range(2):
        history.take(RefusedEvent(from_peer="12D3KooWmallory", rule="finite", detail="7 NaNs"))
    (event,) = history.message().events
    assert (event.time, event.last_time, event.count) == (1000.0, 1007.0, 2)


def test_what_repeats_is_counted() -> None:
    history = begun()
    for time in range(1, 6):
        history.take(RefusedEvent(time=time, from_peer="12D3KooWmallory", rule="finite", detail=f"{time} NaNs"))
        history.take(WarningEvent(time=time, message="the disk is full", code="disk-full"))
    events = history.message().events
    assert [(event.event, event.count, event.time, event.last_time) for event in events] == [
        ("refused", 5, 1.0, 5.0),
        ("warning", 5, 1.0, 5.0),
    ]


def test_a_flood_leaves_the_beginning_and_the_end() -> None:
    history = begun()
    for number in range(3 * MAX_EVENTS):
        history.take(joined(f"peer-{number}"))
    told = words(history)
    assert len(told) == MAX_EVENTS
    assert told[0] == "peer peer-0 joined" and told[-1] == f"peer peer-{3 * MAX_EVENTS - 1} joined"


def test_a_record_that_is_taken_over_after_each_restart_does_not_grow() -> None:
    before = begun()
    for number in range(MAX_EVENTS):
        before.take(joined(f"peer-{number}"))
    for life in range(3):
        after = PeerHistory()
        after.remember(before.message())
        for number in range(5):
            after.take(joined(f"life-{life}-{number}"))
        after.begin(RUN, 1_000_000)
        after.take(joined(f"life-{life}-last"))
        told = words(after)
        assert len(told) == MAX_EVENTS == len(after._subjects)
        assert told[0] == "peer peer-0 joined" and told[-2:] == [
            f"peer life-{life}-{end} joined" for end in (4, "last")
        ]
        before = after


def test_a_word_of_a_stranger_is_one_short_line() -> None:
    history = begun()
    history.take(RefusedEvent(time=1.0, from_peer="x", rule="shape", detail="a\nb\x1b[2J" + "c" * 5000))
    (told,) = words(history)
    assert told.isprintable() and len(told) == 400


def test_it_goes_on_after_a_restart_and_not_with_another_run() -> None:
    before = begun()
    before.add(HistoryPoint(run_tokens=100_000, time=5.0, loss=3.0))
    before.add_sample(HistoryPoint(run_tokens=100_000, time=6.0, held_out_loss=2.0), SAMPLE)
    before.take(joined("anna"))
    for sha256, known in ((RUN, True), ("cd" * 32, False)):
        after = PeerHistory()
        after.remember(before.message())
        after.take(joined("bert"))
        after.begin(sha256, 1_000_000)
        assert words(after) == ["peer anna joined"] * known + ["peer bert joined"]
        assert len(after.losses()) == 2 * known and after.sample == (SAMPLE if known else None)


def test_the_newest_sample_of_others_is_shown_and_its_own_before_it() -> None:
    history, old = begun(), TextSample(prompt="", text="old", round=1, run_tokens=100, time=99.0)
    history.fill([ToldHistory(sample=old), ToldHistory(sample=SAMPLE)])
    assert history.sample == SAMPLE
    history.fill([ToldHistory(sample=None), ToldHistory(sample=old)])
    assert history.sample == SAMPLE
    history.add_sample(HistoryPoint(run_tokens=90, time=6.0, held_out_loss=2.0), old)
    assert history.sample == old, "its own"


def test_of_what_is_told_the_longest_is_shown_and_less_erases_nothing() -> None:
    history = begun()
    points = [HistoryPoint(run_tokens=tokens, time=5.0, loss=3.0) for tokens in range(10_000, 500_000, 10_000)]
    history.fill([ToldHistory(points=points[:5]), ToldHistory(points=points)])
    shown = history.losses()
    assert shown == points
    history.fill([ToldHistory(), ToldHistory(points=points[3:])])
    assert history.losses() == shown


def test_a_run_that_another_follows_keeps_nothing_of_it() -> None:
    history = begun()
    history.fill([ToldHistory(points=[HistoryPoint(run_tokens=10, time=5.0, loss=3.0)], sample=SAMPLE)])
    history.begin("cd" * 32, 1_000_000)
    assert history.losses() == [] and history.sample is None


def test_the_board_records_losses_with_their_tokens() -> None:
    board = StatusBoard("volunteer", 0.0, now=lambda: 0.0, wall=lambda: 50.0)
    board.take(
        FetchedEvent(run_sha256=RUN, run_name="r", total_tokens=1_000_000, held_out_bytes=5, from_peer="x", summary="s")
    )
    board.doing(pb.PEER_STATE_TRAINING, "training")
    tokens = [0]

    def look(status: pb.PeerStatus) -> None:
        status.run_tokens = tokens[0]
        for peer, loss in (("a", 3.0), ("b", 5.0), ("c", 4.0)):
            status.peers.add(peer=peer, present=True)
            board.tell_losses({"a": 3.0, "b": 5.0, "c": loss})

    board.add_looker(look)
    for tokens[0] in (100_000, 200_000):
        board.status()
    board.take(EvalEvent(time=60.0, round=3, held_out_loss=1.5, bits_per_byte=2.1, perplexity=4.0, own_loss=None))
    assert [(point.run_tokens, point.loss) for point in board.history.losses() if point.loss] == [
        (100_000, 4.0),
        (200_000, 4.0),
    ]
    assert [point.held_out_loss for point in board.history.losses() if point.held_out_loss] == []


def test_the_folder_keeps_it(tmp_path: Path) -> None:
    history = begun()
    history.add_sample(HistoryPoint(run_tokens=10, time=1.0, held_out_loss=2.0), SAMPLE)
    status = pb.PeerStatus(pid=1, state=pb.PEER_STATE_DONE)
    powers = ControlHandlers(status=lambda: status, healthy=lambda: True, leave=lambda: "", history=history.message)
    server = ControlServer(tmp_path, powers)
    server.start()
    server.stop()
    assert read_history(tmp_path) == history.message()
    assert (tmp_path / HISTORY_NAME).stat().st_mode & 0o777 == 0o600
    (tmp_path / HISTORY_NAME).write_bytes(b"\xff\xff")
    assert read_history(tmp_path) is None and read_history(tmp_path / "nowhere") is None
