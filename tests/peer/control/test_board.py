"""Status board: the status that follows from a peer's events and pulses, and when it counts as healthy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from swarmtrain.events import (
    ArchivedEvent,
    CaughtUpEvent,
    DeviceEvent,
    DoneEvent,
    EvalEvent,
    Event,
    FetchedEvent,
    InviteEvent,
    JoinedEvent,
    PausedEvent,
    PeerJoinedEvent,
    RefusedEvent,
    ResumedEvent,
    RoundEvent,
    StartedEvent,
    WarningEvent,
    in_words,
)
from swarmtrain.peer.control.board import MAX_LOSSES, LossCurve, Pulse, StatusBoard, Watched
from swarmtrain.peer.control.health import Vitals, health
from swarmtrain.v1 import control_pb2 as pb

ANNA = "12D3KooWAnnaAnnaAnnaAnnaAnnaAnnaAnnaAnnaAnnaAnnaAnna"
BEN, CARL, DORA, EMIL = (ANNA[:-4] + end for end in ("Ben1", "Car1", "Dor1", "Em11"))
SHA = "ab" * 32


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> StatusBoard:
    return StatusBoard("volunteer", 50.0, now=clock, wall=lambda: 1e9 + clock.now_s)


def round_event(number: int, **changed: Any) -> RoundEvent:
    fields: dict[str, Any] = {
        "round": number,
        "inner_steps": 10,
        "tokens": 1000,
        "run_tokens": 2000 * (number + 1),
        "loss": 3.0 - number / 1000,
        "first_loss": 3.0,
        "learning_rate": 0.001,
        "seconds": 10.0,
        "merge_s": 2.0,
        "stall_s": 1.0,
        "bytes_sent": 4000,
        "bytes_received": 4000,
        "times_below_allreduce": 20.0,
        "partners": (ANNA, BEN),
        "weights": (1000, 1000),
        "signer": ANNA,
        "state_sha256": SHA,
    }
    return RoundEvent(**fields | changed)


def fetched(total_tokens: int = 10**6) -> FetchedEvent:
    return FetchedEvent(
        run_sha256=SHA, run_name="tiny", total_tokens=total_tokens, held_out_bytes=5, from_peer=BEN, peer=ANNA, name="a"
    )


JOINED = JoinedEvent(round=3, run_tokens=6000, num_peers=2, state_from=BEN, wall_s=1.0)
STARTED = StartedEvent(inner_steps_per_round=10, num_parameters=1000, total_tokens=10**6, startup_s=2.0)


def test_a_volunteers_events_make_its_status(board: StatusBoard) -> None:
    heard: list[Event] = []
    emit = board.listening(heard.append)
    first = board.status()
    assert (first.state, first.role, first.started_time) == (pb.PEER_STATE_STARTING, "volunteer", 50.0)
    emit(fetched())
    assert board.status().doing == "preparing the text and the model"
    emit(JOINED)
    assert board.status().state == pb.PEER_STATE_WAITING
    emit(InviteEvent(line="swarmtrain join st1x", invite="st1x", run_sha256=SHA, addresses=()))
    emit(STARTED)
    emit(PeerJoinedEvent(joined=BEN, joined_name="ben"))
    emit(round_event(3))
    emit(EvalEvent(time=99, round=3, held_out_loss=2.5))
    emit(round_event(4, stall_s=3.0))
    status = board.status()
    assert len(heard) == 8, "each event goes on to the next"
    assert (status.peer, status.name, status.run_name, status.run_sha256) == (ANNA, "a", "tiny", SHA)
    assert (status.state, status.round, status.run_tokens, status.total_tokens) == (
        pb.PEER_STATE_TRAINING,
        5,
        10_000,
        10**6,
    )
    assert status.invite_line == "swarmtrain join st1x"
    assert [(p.round, p.run_tokens, round(p.loss, 3), p.held_out_loss) for p in status.losses] == [
        (3, 8000, 2.997, 2.5),
        (4, 10_000, 2.996, 0.0),
    ]
    assert status.held_out_loss == 2.5
    assert status.held_out_time == 99
    assert status.times_below_allreduce == pytest.approx(8 * 1000 * 20 / 8000)
    assert status.stall_share == pytest.approx(4 / 20)
    assert board.name_of(BEN) == "ben"


def test_the_device_that_it_trains_on_is_in_its_status_from_when_it_is_known(board: StatusBoard) -> None:
    assert not board.status().HasField("device")
    on = DeviceEvent(
        device="cuda:0", title="A Card", precision="bf16", microbatch_sequences=8, batch_sequences=16, why="it works"
    )
    board.take(on)
    board.take(STARTED)
    assert board.status().device == pb.DeviceStatus(
        device="cuda:0", title="A Card", precision="bf16", microbatch_sequences=8, why="it works"
    )
    board.take(on.model_copy(update={"compiled": True, "microbatch_sequences": 4, "why": "memory ran out"}))
    now = board.status().device
    assert (now.compiled, now.microbatch_sequences, now.why) == (True, 4, "memory ran out")


def test_whom_it_merged_last_is_said_by_name(board: StatusBoard) -> None:
    board.take(PeerJoinedEvent(joined=BEN, joined_name="ben"))
    board.take(round_event(3))
    assert board.status().last_merge == "", "a roster is everyone's"
    board.take(round_event(4, signer="", partners=(BEN,), weights=(99,), staleness_rounds=(1,), pull_s=0.5))
    assert board.status().last_merge == "ben in 0.5 s, at most 1 round old"


def test_which_data_it_trained_on_is_said_where_there_are_shards(board: StatusBoard) -> None:
    board.take(round_event(3))
    assert board.status().data == ""
    board.take(round_event(4, shard=2, unseen_shards=9))
    assert board.status().data == "the last round from shard 2; 9 are still unseen by all"


def test_pauses_warnings_and_the_end(board: StatusBoard) -> None:
    board.take(fetched())
    board.take(PausedEvent(reason="you asked for it"))
    assert (board.status().state, board.status().doing) == (pb.PEER_STATE_PAUSED, "paused: you asked for it")
    board.take(ResumedEvent(round=7, paused_s=3.0))
    assert board.status().state == pb.PEER_STATE_TRAINING
    for number in range(20):
        board.take(WarningEvent(message=f"warning {number}", time=number))
    board.take(WarningEvent(message="warning 15", time=99))
    notices = [(notice.time, notice.message) for notice in board.status().notices]
    assert len(notices) == 8
    assert notices[-2:] == [(19, "warning 19"), (99, "warning 15")], "the same warning again is one warning"
    board.take(DoneEvent(held_out_loss=2.0, tokens=5, run_tokens=10, wall_s=3.0, reason="asked"))
    board.ended(pb.PEER_STATE_DONE, "asked", 0)
    last = board.status()
    assert (last.state, last.end_reason, last.exit_code, last.held_out_loss) == (pb.PEER_STATE_DONE, "asked", 0, 2.0)
    assert last.doing == "ended: you asked it to leave"
    board.ended(pb.PEER_STATE_FAILED, "nobody answers", 1)
    assert board.status().doing == "ended: nobody answers"
    assert board.status().exit_code == 1


def test_rates_are_those_of_the_last_half_minute(board: StatusBoard, clock: Clock) -> None:
    steps = 0

    def pulse() -> Pulse:
        return Pulse(
            state=pb.PEER_STATE_TRAINING, doing="training", num_steps=steps, sent_bytes=steps * 10, received_bytes=7
        )

    board.watch(Watched(pulse=pulse, tokens_per_step=100))
    board.take(STARTED)
    for _ in range(200):  # 100 s at two steps a tick
        board.tick()
        clock.now_s += 0.5
        steps += 2
    status = board.status()
    assert status.own_tokens_per_s == pytest.approx(400)
    assert status.sent_bytes_per_s == pytest.approx(40)
    assert status.received_bytes_per_s == 0
    board.take(PausedEvent(reason="you asked for it"))
    assert board.status().own_tokens_per_s == 0, "at once"
    for _ in range(80):
        board.tick()
        clock.now_s += 0.5
    assert board.status().own_tokens_per_s == 0, "a pause is no training"


def looker_of(*rows: dict[str, Any], **fields: Any) -> Any:
    """Fills in these peers, and these fields; both may be changed later."""

    def look(status: pb.PeerStatus) -> None:
        for row in rows:
            status.peers.add(**row)
        for name, value in fields.items():
            setattr(status, name, value)

    return look


def test_the_swarms_speed_is_the_sum_of_the_peers_and_each_is_measured(board: StatusBoard, clock: Clock) -> None:
    me = {"peer": ANNA, "present": True, "tokens": 0}
    ben = {"peer": BEN, "present": True, "tokens": 1000, "tokens_per_s": 123.456}
    gone = {"peer": CARL, "present": False, "tokens": 10**6, "tokens_per_s": 99.0}
    boot = {"peer": DORA, "present": True, "bootstrap": True}
    board.add_looker(looker_of(me, ben, gone, boot))
    board.take(STARTED)
    steps = 0
    board.watch(
        Watched(
            pulse=lambda: Pulse(state=pb.PEER_STATE_TRAINING, doing="", num_steps=steps),
            peer=ANNA,
            name="anna",
            tokens_per_step=100,
        )
    )
    for second in range(40):
        if second % 10 == 5:
            me["tokens"] += 1000
            ben["tokens"] += 3000
        status = board.status()
        speeds = [item.tokens_per_s for item in status.peers]
        assert status.swarm_tokens_per_s == pytest.approx(sum(speeds), rel=0.01)
        if second < 15:
            assert speeds[1] == 123, "what it says, in three digits, before its count has grown twice"
        board.tick()
        clock.now_s += 1.0
        steps += 1
    assert speeds == [status.own_tokens_per_s, 300, 0, 0] and status.own_tokens_per_s == pytest.approx(100)
    clock.now_s += 200.0
    ben["device"] = "RTX 4090"
    assert board.status().peers[1].tokens_per_s < 60, "it has stopped"
    ben |= {"present": False, "device": ""}
    last = board.status().peers[1]
    assert (last.tokens_per_s, last.last_tokens_per_s, last.device) == (0, 300, "RTX 4090"), "as it was when it worked"


def test_who_had_gone_before_a_restart_is_known_by_device_and_speed(board: StatusBoard) -> None:
    before = pb.PeerStatus(run_name="tiny", run_sha256="ab" * 32, total_tokens=1000)
    before.peers.add(peer=CARL, name="carl", tokens=700, device="cpu", last_tokens_per_s=40)
    board.remember(before)
    board.take(fetched())
    board.add_looker(looker_of({"peer": CARL, "tokens": 700}))
    (carl,) = board.status().peers
    assert (carl.device, carl.last_tokens_per_s, carl.tokens_per_s) == ("cpu", 40, 0)


def test_speeds_and_the_time_left_count_what_is_learnt(board: StatusBoard, clock: Clock) -> None:
    me, ben = ({"peer": peer, "present": True, "tokens": 0, "tokens_per_s": 0.0} for peer in (ANNA, BEN))
    ben["tokens_per_s"] = 100.0  # it says how many steps it takes, and not how many of their tokens it learns from
    run = {"total_tokens": 10_000, "run_tokens": 0}
    board.add_looker(lambda status: looker_of(me, ben, **run)(status))
    board.take(STARTED)
    pulse = {"num_steps": 0.0, "learnt_share": 0.0}
    board.watch(
        Watched(
            pulse=lambda: Pulse(state=pb.PEER_STATE_TRAINING, doing="", **pulse),
            peer=ANNA,
            name="anna",
            tokens_per_step=100,
        )
    )
    board.tick()
    assert board.tokens_per_step == 0 and board.status().peers[1].tokens_per_s == 0, "not known before the first step"
    for second in range(40):
        clock.now_s += 1.0
        pulse = {"num_steps": pulse["num_steps"] + 1, "learnt_share": 0.2}
        board.tick()
        if second % 10 == 5:
            me["tokens"] += 200
            ben["tokens"] += 200
            run["run_tokens"] += 400
        status = board.status()
        assert status.peers[1].tokens_per_s == 20
        if second > 1:
            assert (status.own_tokens_per_s, status.swarm_tokens_per_s) == (20, 40)
    assert board.tokens_per_step == 20
    left_s = (10_000 - run["run_tokens"]) / 40
    changed_s = clock.now_s - 4  # when the count grew last
    assert status.end_time == pytest.approx(1e9 + changed_s + left_s)


def test_in_a_pipeline_a_step_of_a_stage_is_no_step_of_the_model(board: StatusBoard, clock: Clock) -> None:
    me = {"peer": ANNA, "present": True, "tokens": 0, "tokens_per_s": 70.0}
    board.add_looker(looker_of(me))
    board.add_looker(lambda status: status.stages.add(number=0) and None)
    board.take(STARTED)
    steps = 0
    board.watch(
        Watched(
            pulse=lambda: Pulse(state=pb.PEER_STATE_TRAINING, doing="", num_steps=steps),
            peer=ANNA,
            name="anna",
            tokens_per_step=100,
        )
    )
    for _ in range(8):
        board.tick()
        status = board.status()
        clock.now_s += 10.0
        steps += 100
        me["tokens"] += 400
    assert status.own_tokens_per_s == status.peers[0].tokens_per_s == status.swarm_tokens_per_s == 40


def test_the_end_is_measured_and_then_told(board: StatusBoard, clock: Clock) -> None:
    board.take(fetched(total_tokens=20_000))
    board.take(JOINED)  # 6000 tokens: nobody knows since when
    board.take(STARTED)
    board.add_looker(looker_of({"peer": BEN, "present": True, "tokens_per_s": 1e6}))
    assert board.status().end_time == 0, "what peers say of their speed is no measurement"
    board.take(round_event(3))
    assert board.status().end_time == 0, "one change says nothing of a speed"
    clock.now_s += 10.0
    board.take(round_event(4))
    expected = board.status().end_time
    assert expected == pytest.approx(1e9 + clock.now_s + 10_000 / 200)
    clock.now_s += 5.0
    assert board.status().end_time == expected, "it comes nearer between two rounds"
    for number in range(5, 10):
        clock.now_s += 10.0
        board.take(round_event(number))
        board.status()
    reached = board.status().end_time
    assert reached == pytest.approx(1e9 + clock.now_s)
    clock.now_s += 100.0
    again = StatusBoard("volunteer", 50.0, now=clock, wall=lambda: 1e9 + clock.now_s)
    again.remember(board.status())
    again.take(fetched(total_tokens=20_000))
    assert board.status().end_time == again.status().end_time == reached


def test_while_nobody_trains_no_time_is_left(clock: Clock) -> None:
    board = StatusBoard("bootstrap", 50.0, now=clock, wall=lambda: 1e9 + clock.now_s)
    board.take(fetched(total_tokens=20_000))
    ben: dict[str, Any] = {"peer": BEN, "present": True}
    tokens = {"run_tokens": 1000}
    board.add_looker(
        lambda status: looker_of({"peer": ANNA, "present": True, "bootstrap": True}, ben, **tokens)(status)
    )

    def trained() -> float:
        for _ in range(3):
            tokens["run_tokens"] += 1000
            clock.now_s += 10.0
            status = board.status()
        return float(status.end_time)

    assert trained() == pytest.approx(1e9 + clock.now_s + 160.0)
    ben["present"] = False
    assert board.status().end_time == 0, "it has left"
    ben["present"] = True
    assert board.status().end_time == 0, "and is back, which is measured anew"
    assert trained() > 0


def test_an_ended_bootstrap_has_the_round_that_it_was_in(clock: Clock) -> None:
    board = StatusBoard("bootstrap", 50.0, now=clock, wall=lambda: 1e9 + clock.now_s)
    board.doing(pb.PEER_STATE_SERVING, "serving")
    board.watch(Watched(pulse=lambda: Pulse(state=pb.PEER_STATE_SERVING, doing="serving", round=7)))
    board.tick()
    board.ended(pb.PEER_STATE_DONE, "asked", 0)
    assert board.status().round == 7


def test_a_bootstrap_shows_the_median_of_what_volunteers_say_of_their_losses(clock: Clock) -> None:
    board = StatusBoard("bootstrap", 50.0, now=clock, wall=lambda: 1e9 + clock.now_s)
    rows = [{"peer": peer, "present": True} for peer in (ANNA, BEN, CARL)]
    fields = {"run_tokens": 1000, "round": 3}
    board.add_looker(lambda status: looker_of(*rows, **fields)(status))
    board.tell_losses({ANNA: 2.0, BEN: 3.0, CARL: 999.0, DORA: 0.5})
    assert board.status().swarm_loss == 3.0, "one liar does not move it, nor one who is not here"
    board.tell_losses({ANNA: 2.0, BEN: 2.5})
    fields["run_tokens"] = 2000
    board.status()
    assert [(p.run_tokens, p.loss) for p in board.status().losses] == [(1000, 3.0), (2000, 2.25)]
    board.tell_losses({})
    assert board.status().swarm_loss == 0 and len(board.status().losses) == 2


def test_what_a_bootstrap_archived_is_kept_over_a_restart(clock: Clock) -> None:
    board = StatusBoard("bootstrap", 50.0, now=clock, wall=lambda: 1e9 + clock.now_s)
    board.take(fetched())
    board.take(ArchivedEvent(round=6, run_tokens=9000, path="/here"))
    kept = board.status().archive
    assert (kept.num_rounds, kept.run_tokens, kept.time, kept.path) == (6, 9000, 1e9 + clock.now_s, "/here")
    again = StatusBoard("bootstrap", 50.0, now=clock)
    again.remember(board.status())
    again.take(fetched())
    assert again.status().archive == kept


def test_the_pulse_speaks_only_in_rounds(board: StatusBoard) -> None:
    board.watch(Watched(pulse=lambda: Pulse(state=pb.PEER_STATE_TRAINING, doing="step 3", round=2, inner_steps=10)))
    assert board.status().state == pb.PEER_STATE_STARTING
    board.take(STARTED)
    assert (board.status().doing, board.status().round, board.status().inner_steps) == ("step 3", 2, 10)
    with board.busy("measuring the held-out loss"):
        assert board.status().doing == "measuring the held-out loss"
    board.take(PausedEvent(reason="outside the hours 22-7"))
    assert board.status().doing == "paused: outside the hours 22-7"
    board.doing(pb.PEER_STATE_FINISHING, "serving on")
    assert board.status().doing == "serving on"


def test_whatever_a_thread_still_begins_the_last_word_stays(board: StatusBoard) -> None:
    board.watch(Watched(pulse=lambda: Pulse(state=pb.PEER_STATE_TRAINING, doing="step 3")))
    board.ended(pb.PEER_STATE_DONE, "asked", 0)
    last = board.status()
    board.take(STARTED)
    board.arriving("fetching the swarm's current weights")
    now = board.status()
    assert (now.state, now.doing) == (last.state, last.doing) == (pb.PEER_STATE_DONE, "ended: you asked it to leave")


def test_events_have_names_for_a_person_and_peer_ids_for_a_program(board: StatusBoard) -> None:
    told: list[Event] = []
    emit = board.listening(told.append)
    board.know_name(BEN, "ben")
    emit(RefusedEvent(from_peer=BEN, rule="shards", detail=f"says that {BEN} has trained on 40 tokens"))
    emit(CaughtUpEvent(round=3, from_peer=BEN, reason="it was away"))
    emit(JoinedEvent(round=3, run_tokens=1, num_peers=2, state_from=BEN, wall_s=1.0))
    emit(RefusedEvent(from_peer=CARL, rule="hash", detail="of a chunk"))
    refused, caught_up, joined, stranger = told
    assert isinstance(refused, RefusedEvent) and (refused.from_peer, refused.from_name) == (BEN, "ben")
    end = BEN[-6:]
    assert in_words(refused) == f"refused what ben ({end}) sent (shards): says that ben has trained on 40 tokens"
    assert in_words(caught_up) == f"caught up to round 3 from ben ({end}): it was away"
    assert f"with the state of ben ({end})" in in_words(joined)
    assert in_words(stranger) == f"refused what {CARL[-6:]} sent (hash): of a chunk"
    assert board.status().notices[0].message == "refused what ben sent: says that ben has trained on 40 tokens"


def test_names_in_place_of_peer_ids(board: StatusBoard) -> None:
    board.know_name(BEN, "ben")
    board.know_name(CARL, "carl")
    assert board.in_names(f"waiting for {BEN}") == "waiting for ben"
    assert board.in_names(f"waiting for {BEN}, {CARL}") == "waiting for ben and carl"
    assert board.in_names(f"{DORA} signs the roster") == "naDor1 signs the roster"
    many = ", ".join([BEN, CARL, DORA, EMIL, ANNA])
    assert board.in_names(f"waiting for {many}") == "waiting for ben, carl, naDor1 and 2 others"
    assert board.in_names("everyone alive has published") == "everyone alive has published"


def test_names_that_are_learned_in_two_threads_at_once_fail_neither(board: StatusBoard) -> None:
    class Shared(dict[str, str]):
        def __iter__(self) -> Iterator[str]:
            first = next(iter(super().__iter__()))
            del self[first]  # another thread was quicker
            return iter([first])

    board._names = Shared({str(number): "crowd" for number in range(4096)})
    board.know_name(BEN, "ben")
    assert board.in_names(BEN) == "ben" and len(board._names) == 4096


def test_a_name_of_two_comes_with_whose_it_is(board: StatusBoard) -> None:
    told: list[Event] = []
    board.know_name(BEN, "ben")
    board.know_name(CARL, "ben")  # anybody may call itself so
    board.know_name(DORA, f"ben ({BEN[-6:]})")  # no name that a command takes
    board.know_name(EMIL, "emil")
    ben, carl, dora = (peer[-6:] for peer in (BEN, CARL, DORA))
    assert board.in_names(f"waiting for {BEN}, {CARL}, {EMIL}") == f"waiting for ben ({ben}), ben ({carl}) and emil"
    board.listening(told.append)(WarningEvent(message=f"{CARL} lies, and {DORA}"))
    assert isinstance(told[0], WarningEvent) and told[0].message == f"ben ({carl}) lies, and {dora}"


def test_losses_by_source_are_the_last_that_were_measured(board: StatusBoard) -> None:
    def told() -> list[tuple[str, float]]:
        return [(each.name, each.held_out_loss) for each in board.status().source_losses]

    of_sources = {"sources": ("code", "prose"), "source_losses": (2.5, 1.5)}
    board.take(EvalEvent(round=3, held_out_loss=2.0, **of_sources))
    board.take(EvalEvent(round=5, held_out_loss=1.5, **of_sources | {"source_losses": (2.0, 1.0)}))
    assert told() == [("code", 2.0), ("prose", 1.0)]
    board.take(DoneEvent(held_out_loss=None, tokens=5, run_tokens=10, wall_s=3.0, reason="asked"))
    assert told() == [("code", 2.0), ("prose", 1.0)], "it measured none at its end"
    board.take(DoneEvent(held_out_loss=1.0, tokens=5, run_tokens=10, wall_s=3.0, reason="total_tokens", **of_sources))
    assert told() == [("code", 2.5), ("prose", 1.5)]


def test_another_life_of_the_same_peer_goes_on_with_its_curve(board: StatusBoard) -> None:
    before = pb.PeerStatus(run_sha256=SHA, own_tokens=77, held_out_loss=1.5, held_out_time=99)
    before.source_losses.add(name="code", held_out_loss=1.5)
    before.losses.add(round=0, run_tokens=10, loss=4.0)
    before.peers.add(peer=BEN, name="ben")
    board.remember(before)
    board.take(fetched())
    board.take(round_event(1))
    status = board.status()
    assert [point.round for point in status.losses] == [0, 1]
    assert (status.own_tokens, status.held_out_loss, board.name_of(BEN)) == (77, 1.5, "ben")
    assert status.held_out_time == 99
    done = DoneEvent(time=200, held_out_loss=1.5, tokens=5, run_tokens=10, wall_s=3.0, reason="asked")
    board.take(done)
    assert board.status().held_out_time == 99, "the end repeats the last loss, of then"
    board.take(done.model_copy(update={"held_out_loss": 1.25}))
    assert board.status().held_out_time == 200
    assert [each.name for each in status.source_losses] == ["code"]


def test_another_run_begins_a_new_curve(board: StatusBoard) -> None:
    before = pb.PeerStatus(run_sha256="cd" * 32)
    before.losses.add(round=0, run_tokens=10, loss=4.0)
    board.remember(before)
    board.take(fetched())
    assert not board.status().losses


@pytest.mark.parametrize("number", [1, 2, 511, 512, 513, 514, 1025, 5000, 100_000])
def test_a_long_curve_is_thinned_evenly(number: int) -> None:
    curve = LossCurve()
    for round in range(number):
        curve.add(pb.LossPoint(round=round, loss=1.0))
    rounds = [point.round for point in curve.points]
    assert len(rounds) <= MAX_LOSSES
    assert (rounds[0], rounds[-1]) == (0, number - 1)
    assert rounds == sorted(set(rounds))
    if number > MAX_LOSSES:
        gaps = [after - before for before, after in itertools.pairwise(rounds)]
        assert max(gaps) <= 4 * number / MAX_LOSSES
        assert len(rounds) >= MAX_LOSSES // 2


def test_thinning_keeps_what_was_measured() -> None:
    curve = LossCurve()
    for round in range(3000):
        curve.add(pb.LossPoint(round=round, loss=1.0))
        if round % 100 == 0:
            curve.measured(round, 2.0)
    measured = [point.round for point in curve.points if point.held_out_loss]
    assert measured == list(range(0, 3000, 100))


# ---------------------------------------------------------------- health


def vitals(state: int, progressed_s: float = 100.0) -> Vitals:
    return Vitals(state=state, progressed_s=progressed_s, patience_s=60.0)


@pytest.mark.parametrize("state", ["STARTING", "WAITING", "PAUSED", "DONE", "FAILED", "UNSPECIFIED"])
def test_who_neither_trains_nor_serves_is_not_serving(state: str) -> None:
    serving, reason = health(vitals(pb.PeerState.Value(f"PEER_STATE_{state}")), 100.0)
    assert not serving
    assert reason == f"it is {state.lower()}"


@pytest.mark.parametrize("state", [pb.PEER_STATE_TRAINING, pb.PEER_STATE_SERVING])
def test_who_gets_further_serves_until_it_is_still_for_long(state: int) -> None:
    assert health(vitals(state), 160.0) == (True, "it got further 60 s ago")
    assert health(vitals(state), 161.0) == (False, "nothing got further for 61 s, more than 60 s")


def test_a_peer_that_serves_on_at_the_end_may_take_its_time() -> None:
    assert health(vitals(pb.PEER_STATE_FINISHING), 1000.0)[0]


def test_a_state_of_a_later_version_is_not_serving() -> None:
    assert health(vitals(99), 100.0) == (False, "it is 99")


@pytest.mark.parametrize(
    ("change", "is_progress"),
    [
        ({}, False),
        ({"num_steps": 1}, True),
        ({"round": 1}, True),
        ({"about": "waiting for ben"}, True),
        ({"doing": "11 s at most"}, False),  # a countdown alone is none
        ({"received_bytes": 1000}, False),  # the chatter of presences
        ({"received_bytes": 262_144}, True),
    ],
)
def test_what_counts_as_getting_further(
    board: StatusBoard, clock: Clock, change: dict[str, Any], is_progress: bool
) -> None:
    fields: dict[str, Any] = {"state": pb.PEER_STATE_TRAINING, "doing": "12 s at most"}
    board.watch(Watched(pulse=lambda: Pulse(**fields)))
    board.take(STARTED)
    board.tick()
    clock.now_s += 40.0
    fields |= change
    board.tick()
    clock.now_s += 40.0
    assert health(board.tick(), clock.now_s)[0] is is_progress


def test_a_beat_counts_as_getting_further(board: StatusBoard, clock: Clock) -> None:
    board.watch(Watched(pulse=lambda: Pulse(state=pb.PEER_STATE_SERVING, doing="serving")))
    board.doing(pb.PEER_STATE_SERVING, "serving")
    for _ in range(10):
        clock.now_s += 40.0
        board.beat()
        assert health(board.tick(), clock.now_s)[0]
    clock.now_s += 61.0
    assert not health(board.tick(), clock.now_s)[0]


def test_names_are_kept_within_bounds(board: StatusBoard) -> None:
    """Whoever comes has one, and identities cost nothing."""
    for number in range(5000):
        board.know_name(f"stranger {number}", f"name{number}")
    assert len(board._names) == 4096 and board._names["stranger 4999"] == "name4999"


def test_moves_of_others_between_stages_are_in_the_record(board: StatusBoard) -> None:
    ben: dict[str, Any] = {"peer": BEN, "name": "ben", "present": True, "stages": [1]}
    me: dict[str, Any] = {"peer": ANNA, "name": "anna", "present": True, "stages": [0]}
    board.take(fetched())
    board.add_looker(looker_of(me, ben))
    for stages in ([1], [2, 3], [2, 3], [], [1]):
        ben["stages"] = me["stages"] = stages
        board.status()
    moves = [event for event in board.history.message().events if event.event == "moved"]
    assert [(event.words, event.about) for event in moves] == [
        ("peer ben moved from stage 1 to stages 2 and 3", BEN),
        ("peer ben moved from stages 2 and 3 to stage 1", BEN),
    ], "one's own are events; while nothing is told, nothing moves"
