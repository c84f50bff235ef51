"""Peer under control: what is said of each way to end, what the handlers do, and how its rounds are shown."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from codes import raises_code
from patience import PATIENCE_S

from swarmtrain.errors import CODE_KEY, RunTimeError, UserError
from swarmtrain.events import DoneEvent, Event, FetchedEvent, FinishingEvent, WarningEvent
from swarmtrain.model.parameter_count import num_parameters
from swarmtrain.network.answers import Serving
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.invite import Invite, InvitedPeer
from swarmtrain.network.discovery.presence import OwnPresence
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.history import history_to_proto, point_of
from swarmtrain.network.identity import new_identity
from swarmtrain.peer.checkpoints.files import CheckpointFolder
from swarmtrain.peer.control.board import Pulse, StatusBoard
from swarmtrain.peer.control.history import PeerHistory
from swarmtrain.peer.control.server import read_status
from swarmtrain.peer.control.session import (
    ControlSession,
    bootstrap_pulse,
    control_session,
    swarm_looker,
    volunteer_pulse,
)
from swarmtrain.peer.estimate import estimate, estimates_of
from swarmtrain.peer.lifecycle.folder import PeerFolder, peer_folder
from swarmtrain.peer.lifecycle.node import PeerSettings
from swarmtrain.peer.lifecycle.stop import Interrupted, StopFlag
from swarmtrain.peer.training.pause import PauseSwitch
from swarmtrain.peer.training.round_report import tell_loss
from swarmtrain.peer.volunteer import Volunteer
from swarmtrain.protocol.history import HistoryPoint, TextSample
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import parse_run, run_sha256
from swarmtrain.run_adapter import AdapterSection
from swarmtrain.v1 import control_pb2 as pb
from swarmtrain.v1 import control_pb2_grpc as pb_grpc
from swarmtrain.v1 import snapshot_pb2 as snapshot_pb

BEN = "12D3KooW" + "b" * 44
DONE = DoneEvent(held_out_loss=None, tokens=5, run_tokens=9, wall_s=1.0, reason="total_tokens")


def settings(folder: Path, control: str = "") -> PeerSettings:
    return PeerSettings(directory=folder, name="anna", control=control)


def left_by(folder: Path) -> pb.PeerStatus:
    status = read_status(folder)
    assert status is not None
    return status


def test_one_can_ask_from_the_moment_the_folder_is_held_to_the_end(tmp_path: Path) -> None:
    events: list[Event] = []
    stop = StopFlag()
    with (
        peer_folder(tmp_path) as folder,
        control_session("volunteer", folder, settings(tmp_path), events.append, stop) as c,
    ):
        c.starting("starting the network")
        c.emit(FetchedEvent(run_sha256="ab" * 32, run_name="tiny", held_out_bytes=1, from_peer=BEN))
        with grpc.insecure_channel((tmp_path / "control.address").read_text().splitlines()[0]) as channel:
            stub = pb_grpc.ControlStub(channel)
            status = stub.Status(pb.StatusRequest(), timeout=PATIENCE_S)
            assert (status.state, status.run_name) == (pb.PEER_STATE_STARTING, "tiny")
            with pytest.raises(grpc.RpcError) as refused:
                stub.Checkpoint(pb.CheckpointRequest(), timeout=PATIENCE_S)
            assert dict(refused.value.trailing_metadata()) == {CODE_KEY: "no-checkpoint"}
            assert stub.Leave(pb.LeaveRequest(), timeout=PATIENCE_S).message.startswith("leaving")
            last = stop.last_work(3600.0)
            assert not last.is_set()
            stub.Leave(pb.LeaveRequest(), timeout=PATIENCE_S)
            assert last.is_set(), "asked twice"
        assert stop.is_set() and stop.reason == "asked"
        assert c.ended(DONE) is DONE
        assert c.board.status().state == pb.PEER_STATE_FINISHING
    assert [event.event for event in events] == ["fetched"]
    left = left_by(tmp_path)
    assert (left.state, left.end_reason, left.exit_code) == (pb.PEER_STATE_DONE, "total_tokens", 0)
    assert left.doing == "ended: the run has trained all its tokens"


@pytest.mark.parametrize(
    ("error", "state", "reason", "code"),
    [
        (UserError("a bad folder", code="folder-altered"), pb.PEER_STATE_FAILED, "a bad folder [folder-altered]", 2),
        (RunTimeError("it broke"), pb.PEER_STATE_FAILED, "it broke", 1),
        (KeyError("oops"), pb.PEER_STATE_FAILED, "an error of swarmtrain itself: KeyError('oops')", 1),
        (Interrupted(), pb.PEER_STATE_DONE, "interrupted", 0),
    ],
)
def test_how_it_ended_is_left_in_the_folder(
    tmp_path: Path, error: Exception, state: int, reason: str, code: int
) -> None:
    with (
        pytest.raises(type(error)),
        peer_folder(tmp_path) as folder,
        control_session("volunteer", folder, settings(tmp_path), lambda event: None, StopFlag()),
    ):
        raise error
    left = left_by(tmp_path)
    assert (left.state, left.end_reason, left.exit_code) == (state, reason, code)


def test_a_life_that_fails_shows_the_checkpoint_that_is_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"a run")
    files = CheckpointFolder(tmp_path / "checkpoints", run_sha256(b"a run"), BEN)
    files.path.mkdir()
    written = [files.write(round, [], {}) for round in (6, 7)][-1]
    with (
        pytest.raises(UserError),
        peer_folder(tmp_path) as folder,
        control_session("volunteer", folder, settings(tmp_path), lambda event: None, StopFlag()),
    ):
        raise UserError("this run trains on your own text files: give their folder with --data FOLDER")
    left = left_by(tmp_path)
    assert (left.checkpoint.round, left.checkpoint.size_bytes) == (7, written.size_bytes)


def test_another_life_has_its_name_before_it_has_a_run(tmp_path: Path) -> None:
    for name, shown in (("anna", "anna"), ("", "anna"), ("ben", "ben")):
        named = dataclasses.replace(settings(tmp_path), name=name)
        with (
            peer_folder(tmp_path) as folder,
            control_session("volunteer", folder, named, lambda event: None, StopFlag()) as c,
        ):
            assert c.board.status().name == shown


def test_a_volunteers_limits_and_metrics_know_what_the_run_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From when it takes part; before that nothing is known, and of a pipeline nothing is said."""
    run = parse_run("[run]\ntotal_tokens = 50_000_000", "r")
    with (
        peer_folder(tmp_path) as folder,
        control_session("volunteer", folder, settings(tmp_path), lambda event: None, StopFlag()) as c,
    ):
        volunteer = Volunteer(Invite("ab" * 32, ()), settings(tmp_path), folder, c)
        c.board.add_looker(lambda status: [status.peers.add(peer=f"{n}", present=True) for n in range(3)] and None)
        assert volunteer.limits._expected() is None
        me = PeerInfo(peer=BEN)
        swarm: Any = SimpleNamespace(
            published=PublishedRun(b"", "ab" * 32, run, b"", b""), presence=SimpleNamespace(me=me)
        )
        monkeypatch.setattr("swarmtrain.peer.control.session.swarm_looker", lambda board, swarm: lambda status: None)
        kept: Any = SimpleNamespace(show=lambda status: None)
        network: Any = SimpleNamespace(submit=lambda work: work.close())
        c.watch(swarm, network, lambda: Pulse(state=pb.PEER_STATE_TRAINING, doing=""), kept)
        assert volunteer.limits._expected() is None, "of a pipeline"
        c.watch(
            swarm,
            network,
            lambda: Pulse(state=pb.PEER_STATE_TRAINING, doing=""),
            kept,
            estimates_of(run, num_parameters(run.model)),
        )
        assert volunteer.limits._expected() == estimate(run, num_parameters(run.model), 3)
        assert "this run needs about" in c.powers().limit(pb.Limits(memory_bytes=10**8))


def test_a_late_joiner_among_a_liar_sees_the_curve_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked twice: what a peer had not counted at first comes with the second answer."""
    monkeypatch.setattr("swarmtrain.peer.control.session._HISTORY_AGAIN_S", 0.0)
    monkeypatch.setattr("swarmtrain.peer.control.session.swarm_looker", lambda board, swarm: lambda status: None)
    run, now_s = parse_run("[run]\ntotal_tokens = 50_000_000", "r"), swarm_time()
    truth = {tokens: 6.0 - tokens / 10**7 for tokens in range(10**5, 10**7, 10**5)}
    honest = PeerHistory()
    honest.begin("ab" * 32, 50_000_000)
    for tokens, loss in truth.items():
        honest.add(HistoryPoint(run_tokens=tokens, time=now_s - 60, loss=loss, held_out_loss=loss / 3))
    sample = TextSample(prompt="Once ", text="upon", round=1, run_tokens=10**6, time=now_s - 60)
    honest.add_sample(HistoryPoint(run_tokens=10**6, time=now_s - 60), sample)
    lies = [HistoryPoint(run_tokens=n, time=1.0 + n, loss=999, held_out_loss=999) for n in range(1, 10**7, 10**4)]
    lies += [HistoryPoint(run_tokens=n, time=now_s, loss=999, held_out_loss=999) for n in range(1, 10**8, 10**5)]
    forged = dataclasses.replace(sample, text="buy", run_tokens=2**59)
    told = {peer: history_to_proto(honest.losses(), honest.sample) for peer in ("anna", "boot", "carl")}
    told["liar"] = history_to_proto(lies, forged)
    counted = [5 * 10**6, 10**7]

    async def asked(peer: str) -> snapshot_pb.HistoryReply:
        return told[peer]

    class Accounting:
        rules = SimpleNamespace(began_s=now_s - 3600)

        @property
        def total(self) -> int:
            return counted.pop(0)

    live = [PeerInfo(peer=peer, is_bootstrap=peer == "boot") for peer in told]
    swarm: Any = SimpleNamespace(
        published=PublishedRun(b"", "ab" * 32, run, b"", b""),
        presence=SimpleNamespace(me=PeerInfo(peer=BEN)),
        membership=SimpleNamespace(live=lambda: live, measurer=lambda: "boot"),
        calls=SimpleNamespace(history=asked),
        accounting=Accounting(),
    )
    with (
        peer_folder(tmp_path) as folder,
        control_session("volunteer", folder, settings(tmp_path), lambda event: None, StopFlag()) as c,
    ):
        c.board.history.begin("ab" * 32, 50_000_000)
        network: Any = SimpleNamespace(submit=asyncio.run)
        kept: Any = SimpleNamespace(show=lambda status: None)
        c.watch(swarm, network, lambda: Pulse(state=pb.PEER_STATE_TRAINING, doing=""), kept)
        c.joined([InvitedPeer("boot", ())])
        told_points = c.board.history.losses()
        assert not counted
        assert {point.run_tokens for point in told_points} >= set(truth)
        for point in told_points:
            right = truth.get(point.run_tokens, 6.0 - point.run_tokens / 10**7)
            assert abs((point.loss or 3 * point.held_out_loss) - right) < 0.1 and point.run_tokens < 10**7
        assert c.board.history.sample == sample

        reply, newest = swarm.history(), HistoryPoint(run_tokens=2 * 10**7, time=now_s, loss=4.0)
        assert len(reply.points) == len(told_points) and reply.sample.text == sample.text
        c.board.history.add(newest)
        again = swarm.history()
        assert again is not reply and point_of(again.points[-1]) == newest
        c.board.history.add(dataclasses.replace(newest, time=now_s + 1))
        c.board.take(WarningEvent(message="the disk is full", code="disk-full"))
        assert swarm.history() is again, "nothing of it is new"


def test_a_pause_that_a_person_asked_for_is_remembered_until_they_resume_it(tmp_path: Path) -> None:
    with (
        peer_folder(tmp_path) as folder,
        control_session("volunteer", folder, settings(tmp_path), lambda event: None, StopFlag()) as c,
    ):

        def volunteer() -> Volunteer:
            return Volunteer(Invite("ab" * 32, ()), settings(tmp_path), folder, c)

        assert not volunteer().pause.held
        c.powers().pause()
        again = volunteer()
        assert "before it was started again; `swarmtrain resume`" in again.pause.reason
        c.powers().resume()
        assert not again.pause.held and not volunteer().pause.held
        c.powers().limit(pb.Limits(hours="22-7"))
        assert folder.started.read().options == {"--hours": ("22-7",)}


def test_what_is_left_to_do_at_the_end_is_an_event(tmp_path: Path) -> None:
    events: list[Event] = []
    with (
        peer_folder(tmp_path) as folder,
        control_session("volunteer", folder, settings(tmp_path), events.append, StopFlag()) as c,
    ):
        c.finishing("measuring and saving the model")
    assert events == [FinishingEvent(doing="measuring and saving the model")]


def test_a_tcp_address_that_is_taken_ends_the_peer(tmp_path: Path) -> None:
    def life(folder: PeerFolder, address: str) -> Any:
        return control_session("volunteer", folder, settings(folder.path, address), lambda event: None, StopFlag())

    with peer_folder(tmp_path / "a") as first, life(first, "127.0.0.1:0"):
        taken = (tmp_path / "a" / "control.address").read_text().splitlines()[1]
        with (
            raises_code("port-taken", UserError, "--control"),
            peer_folder(tmp_path / "b") as second,
            life(second, taken),
        ):
            raise AssertionError("it must not come so far")
    assert left_by(tmp_path / "b").exit_code == 2


def test_a_peer_without_a_socket_runs_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_sockets(server: Any, path: Path) -> str:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("swarmtrain.peer.control.server._listen_privately", no_sockets)
    events: list[Event] = []
    with (
        peer_folder(tmp_path) as folder,
        control_session("volunteer", folder, settings(tmp_path), events.append, StopFlag()) as control,
    ):
        control.ended(DONE)
    (warning,) = events
    assert isinstance(warning, WarningEvent) and warning.code == "no-control"
    assert left_by(tmp_path).state == pb.PEER_STATE_DONE


def test_pause_and_resume() -> None:
    control = ControlSession(StatusBoard("volunteer", 0.0), lambda event: None, StopFlag())
    powers = control.powers()
    assert powers.pause is not None and powers.resume is not None and powers.limit is not None
    with raises_code("not-a-volunteer", UserError):
        powers.pause()
    with raises_code("not-a-volunteer", UserError):
        powers.resume()
    with raises_code("limits-fixed", UserError):
        powers.limit(pb.Limits())
    pause, asked = PauseSwitch(), list[bool]()
    control.takes_orders(pause, asked.append, lambda limits: "changed")
    assert powers.resume() == "it was not paused"
    assert powers.pause().startswith("pausing")
    assert powers.pause() == "it is paused already; `swarmtrain resume` ends the pause"
    assert pause.reason == "you asked for it"
    pause.hold("hours", "outside the hours 22-7")
    assert powers.resume() == "it stays paused: outside the hours 22-7"
    pause.release("hours")
    powers.pause()
    back = powers.resume()
    assert back.startswith("resuming") and "if it is a few rounds behind" in back
    assert not pause.held
    assert asked == [False, True, True, False, True, False]
    assert powers.limit(pb.Limits()) == "changed"


# ---------------------------------------------------------------- what a volunteer is doing


@pytest.fixture
def exchange() -> Any:
    rounds = SimpleNamespace(current_round=12, waiting_for="", waiting_until_s=0.0)
    node = SimpleNamespace(traffic=SimpleNamespace(sent_bytes=5, received_bytes=6))
    swarm = SimpleNamespace(rounds=rounds, node=node, presence=SimpleNamespace(me=SimpleNamespace(steps_per_s=2.0)))
    run = SimpleNamespace(merge=SimpleNamespace(round_limit_s=600.0))
    return SimpleNamespace(
        swarm=swarm,
        run=run,
        num_missing=0,
        num_steps=99,
        round_steps=64,
        steps_done=31,
        is_training=True,
        progress_in_words=lambda: "31 of 64 steps",
    )


def test_a_volunteer_says_what_it_does_and_why(exchange: Any) -> None:
    board = StatusBoard("volunteer", 0.0)
    board.know_name(BEN, "ben")
    pulse, rounds = volunteer_pulse(board, exchange, lambda: 0.25), exchange.swarm.rounds
    now = pulse()
    assert now.doing == "training round 12: 31 of 64 steps"
    assert (now.round, now.inner_steps_done, now.inner_steps, now.num_steps) == (12, 31, 64, 99)
    assert (now.sent_bytes, now.received_bytes, now.patience_s, now.learnt_share) == (5, 6, 60.0, 0.25)
    exchange.swarm.presence.me.steps_per_s = 0.01
    assert pulse().patience_s == 400.0, "steps that take long may take long"
    exchange.swarm.presence.me.steps_per_s = 0.0
    assert pulse().patience_s == 600.0, "the first round"

    exchange.steps_done, exchange.is_training = 64, False
    assert pulse().doing == "merging round 12"
    rounds.waiting_for, rounds.waiting_until_s = f"waiting for {BEN}", swarm_time() + 12.3
    assert pulse().doing == "merging round 12: waiting for ben, 12 s at most"
    assert pulse().about == f"waiting for {BEN}"
    assert pulse().patience_s == 660.0, "as long as a round may take"
    rounds.waiting_for, rounds.waiting_until_s = f"signed by {BEN}", 0.0
    assert pulse().doing == "merging round 12: fetching what is on the roster signed by ben"

    exchange.num_missing = 1
    assert pulse().state == pb.PEER_STATE_WAITING
    assert pulse().doing == "waiting for 1 more volunteer before the first round"
    exchange.num_missing = 2
    assert pulse().doing == "waiting for 2 more volunteers before the first round"


def test_a_bootstrap_says_whom_it_serves_and_for_whom_it_waits() -> None:
    volunteers: list[Any] = []
    members = SimpleNamespace(volunteers=lambda: volunteers)
    node = SimpleNamespace(traffic=SimpleNamespace(sent_bytes=0, received_bytes=0))
    run = SimpleNamespace(merge=SimpleNamespace(min_peers=2), batch_rows=1)
    swarm: Any = SimpleNamespace(membership=members, node=node, published=SimpleNamespace(run=run))
    progress = Progress()
    pulse = bootstrap_pulse(swarm, lambda: progress)
    waiting = "before the first round; send them the `swarmtrain join` line; nothing is archived yet"
    assert pulse().doing == f"waiting for 2 volunteers {waiting}"
    volunteers.append(SimpleNamespace(round=0, inner_steps_done=0))
    assert pulse().doing == f"waiting for 1 more volunteer {waiting}"
    volunteers[0].inner_steps_done = 3
    assert pulse().doing == "serving 1 volunteer in round 0; nothing is archived yet", "the other one has left again"
    volunteers[:] = [SimpleNamespace(round=6), SimpleNamespace(round=7)]
    progress = Progress(round=6)
    assert pulse().doing == "serving 2 volunteers in round 7; the archive holds 6 rounds"
    assert (pulse().state, pulse().learnt_share) == (pb.PEER_STATE_SERVING, 1.0)
    run.batch_rows = 2  # samples: only volunteers know what of them is learnt
    assert bootstrap_pulse(swarm, lambda: progress)().learnt_share == 0.0
    volunteers.clear()
    assert pulse().doing == (
        "waiting for 1 volunteer to go on; send them the `swarmtrain join` line; the archive holds 6 rounds"
    )


def test_a_screen_is_told_where_the_status_is(tmp_path: Path) -> None:
    seen: list[Any] = []
    with (
        peer_folder(tmp_path) as folder,
        control_session(
            "bootstrap",
            folder,
            dataclasses.replace(settings(tmp_path), show_status=seen.append),
            lambda event: None,
            StopFlag(),
        ) as control,
    ):
        control.board.doing(pb.PEER_STATE_SERVING, "serving 2 volunteers")
        assert seen[0]().doing == "serving 2 volunteers"


def test_what_volunteers_say_of_their_losses_reaches_the_board() -> None:
    board = StatusBoard("bootstrap", 0.0)
    live = [
        PeerInfo(peer=BEN[:-1] + end, training=training, loss=loss)
        for end, training, loss in (("1", True, 2.0), ("2", True, 3.0), ("3", True, 0.0), ("4", False, 9.0))
    ]
    swarm: Any = SimpleNamespace(
        membership=SimpleNamespace(live=lambda: live, volunteers=lambda: live, heard_s=lambda peer: -math.inf),
        presence=SimpleNamespace(me=PeerInfo(peer=BEN, is_bootstrap=True)),
        published=SimpleNamespace(
            run=SimpleNamespace(tokens_per_step=1, pipeline=SimpleNamespace(stages=1), adapter=AdapterSection())
        ),
        accounting=SimpleNamespace(contributions=dict, acknowledged=dict, total=0),
        reaching=SimpleNamespace(in_words=lambda: ""),
        node=SimpleNamespace(num_dht_records=0),
        serving=Serving(),
    )
    board.add_looker(swarm_looker(board, swarm))
    assert board.status().swarm_loss == 2.5
    swarm.presence.me = PeerInfo(peer=BEN, training=True, loss=4.0)
    assert board.status().swarm_loss == 3.0, "this peer is one of them"


def test_a_loss_that_is_no_number_is_not_told() -> None:
    swarm: Any = SimpleNamespace(presence=OwnPresence(new_identity(), "ab" * 32, PeerInfo(peer=BEN), lambda: 0))
    network: Any = SimpleNamespace(submit_unhurried=asyncio.run)
    for loss, told in ((2.5, 2.5), (float("nan"), 0.0), (float("inf"), 0.0), (1e9, 0.0)):
        tell_loss(network, swarm, loss)
        assert swarm.presence.me.loss == told
