"""Volunteer of several stages: an error that ended one of them surfaces after the others; each is left separately."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swarmtrain.errors import RunTimeError
from swarmtrain.network.daemon import swarm_time
from swarmtrain.peer.lifecycle import departure
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.peer.pipeline import bootstrap as pipeline_bootstrap
from swarmtrain.peer.pipeline import pipeline_training
from swarmtrain.peer.pipeline.bootstrap import PipelineBootstrap
from swarmtrain.peer.pipeline.mover import StageMoves
from swarmtrain.peer.pipeline.pipeline_training import PipelineTraining
from swarmtrain.peer.pipeline.stage_replica import StageReplica, StageReplicas
from swarmtrain.peer.training.pause import PauseSwitch
from swarmtrain.protocol.archive.departure import DepartureQueue
from swarmtrain.protocol.archive.schedule import ArchiveSchedule
from swarmtrain.protocol.membership.membership import Membership, PeerInfo
from swarmtrain.protocol.pipeline.balance import StageChange
from swarmtrain.protocol.pipeline.moves import StaysHere
from swarmtrain.protocol.tokens.progress import Progress


class StageStandIn(StageReplica):
    """Stage without a model or a network, which records what is done with its parts."""

    def __init__(
        self,
        training: Future[str],
        done: list[str],
        is_offline: bool = False,
        number: int = 1,
        counted: int = 0,
    ) -> None:
        def run(coroutine: object, limit_s: float) -> None:
            done.append("withdraw")
            if is_offline:
                raise RunTimeError("nobody hears it")

        self.number, self.training, self.pause = number, training, PauseSwitch()
        self.trainer: Any = SimpleNamespace(queue=None)
        self.session: Any = SimpleNamespace(
            progress=Progress(round=5, run_tokens=counted), replica=SimpleNamespace(own_tokens=900)
        )
        self.swarm: Any = SimpleNamespace(withdraw=lambda limit_s: None)
        self.site: Any = SimpleNamespace(context=SimpleNamespace(network=SimpleNamespace(run=run)))
        self.manager: Any = SimpleNamespace(close=lambda: done.append("close"))


def ended(how: str | Exception) -> Future[str]:
    future: Future[str] = Future()
    if isinstance(how, str):
        future.set_result(how)
    else:
        future.set_exception(how)
    return future


BROKEN = RunTimeError("no memory for this stage")


def holding(*stages: StageReplica) -> StageReplicas:
    held = StageReplicas("me", [0.5, 0.5, 0.5])
    for number, stage in enumerate(stages):
        stage.number = number
        held.add(stage)
    return held


def training_of(*stages: StageReplica) -> Any:
    """Make the parts of a pipeline's training that end: it drives, and trains these stages."""
    one: Any = PipelineTraining.__new__(PipelineTraining)
    run = SimpleNamespace(run=SimpleNamespace(total_tokens=10_000))
    stop, folder = StopFlag(), SimpleNamespace(path=Path("/home/ada/run"))
    one._context = SimpleNamespace(control="control", network="network", node="node", stop=stop, folder=folder, run=run)
    one._stages, one._first = holding(*stages), SimpleNamespace(stop_soon=lambda: None)
    one.swarm = SimpleNamespace(presence=SimpleNamespace(me=PeerInfo(peer="me", run_tokens=4096)))
    return one


def test_what_ended_a_stage_is_raised_behind_one_that_still_trains() -> None:
    trains, has_ended, is_done = (StageStandIn(each, []) for each in (Future(), ended(BROKEN), ended("total_tokens")))
    assert not holding(is_done, trains).are_done
    assert holding(is_done).are_done
    with pytest.raises(RunTimeError, match="no memory"):
        assert holding(trains, has_ended).are_done


@pytest.mark.parametrize("is_offline", [False, True])
def test_a_stage_whose_training_failed_says_goodbye_and_is_kept(is_offline: bool) -> None:
    done: list[str] = []
    stage = StageStandIn(ended(BROKEN), done, is_offline)
    with pytest.raises(RunTimeError):
        stage.end()
    assert done == ["withdraw", "close"]
    assert not stage.pause.held


def test_one_stage_that_cannot_be_left_keeps_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    stages = StageStandIn(ended(BROKEN), []), StageStandIn(ended("total_tokens"), done)
    left: list[Any] = []
    monkeypatch.setattr(pipeline_training, "leave_swarm", lambda *what: left.append(what))
    one = training_of(*stages)
    one.leave()
    assert done == ["withdraw", "close"] and left == [("network", one.swarm, "node")]


def test_one_that_drives_says_that_the_first_stage_is_done_before_its_others_are() -> None:
    def says(**stages: str) -> bool:
        """Return whether each of the stages s0, s1 and s2 trains or is done."""
        held = StageReplicas("me", [0.5, 0.5, 0.5])
        for name, how in stages.items():
            training = ended("total_tokens") if how == "done" else Future[str]()
            held.add(StageStandIn(training, [], number=int(name[1])))
        return held.have_had_tokens

    assert says(s0="done", s1="trains")
    assert not says(s0="trains", s1="done")
    assert says(s1="done", s2="done") and not says(s1="done", s2="trains") and not says()


def test_who_leaves_all_its_stages_is_in_the_latest_round_that_any_of_them_was_in() -> None:
    ahead, behind = (StageStandIn(Future[str](), []) for _ in range(2))
    ahead.session.progress, behind.session.progress = Progress(round=10), Progress(round=9)
    held = holding(ahead, behind)
    for number in held.numbers:
        held.drop(number)
    assert held.round == 10


def test_who_does_not_move_after_all_trains_the_stages_that_it_has() -> None:
    """It had told its board that it takes another one."""
    trains, told = list[Any](), list[str]()
    control: Any = SimpleNamespace(training_stages=trains.append)
    pipeline_training: Any = SimpleNamespace(
        volunteer=SimpleNamespace(control=control), swarm=None, mover=None, stages=holding(StageStandIn(Future(), []))
    )
    record: Any = SimpleNamespace(stays=lambda: told.append("stays"))
    nothing: Any = None
    moves = StageMoves(pipeline_training, nothing, record, nothing)
    change = StageChange(peer="me", before=(0,), after=(1,), reason="more is needed there")
    assert moves._do(StaysHere(change, "nobody promises to stay", had_begun=True)) is None
    assert trains == [(0,)] and told == ["stays"]
    moves._do(StaysHere(change, "somebody else moves", had_begun=False))
    assert trains == [(0,)], "it told nobody"


def test_of_the_first_stage_one_that_has_the_last_weights_will_do_and_of_others_all_must() -> None:
    def archive(number: int, *told: int) -> Any:
        infos = [SimpleNamespace(run_tokens=tokens) for tokens in told]
        swarm = SimpleNamespace(membership=SimpleNamespace(volunteers=lambda: infos))
        return SimpleNamespace(number=number, swarm=swarm, is_final=False, state=None)

    run = SimpleNamespace(run=SimpleNamespace(total_tokens=100))
    archives = [archive(0, 100, 7), archive(1, 100, 7), archive(1, 100, 100), archive(0, 7), archive(0), archive(1)]
    bootstrap: Any = SimpleNamespace(
        published=SimpleNamespace(run=run), archives=archives, _archive=lambda one, anyway: True, _tell=lambda one: None
    )
    PipelineBootstrap._archive_ended(bootstrap, False)
    assert [one.is_final for one in archives] == [True, False, True, False, False, False]


def test_a_stage_held_by_one_alone_is_archived_after_its_round_though_its_tokens_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its progress record may be read before its weights are: they are no less new for that."""
    asked: list[tuple[int, Any]] = []

    async def fetch(swarm: Any, peers: Any, reason: str, above_tokens: int, is_wanted: Any) -> None:
        asked.append((above_tokens, is_wanted))

    monkeypatch.setattr(pipeline_bootstrap, "fetch_consensus_state", fetch)

    def archive(number: int, *rounds: int) -> Any:
        infos = [SimpleNamespace(peer=str(round), round=round) for round in rounds]
        swarm = SimpleNamespace(membership=SimpleNamespace(volunteers=lambda: infos))
        archived = SimpleNamespace(asks=lambda infos: None)
        return SimpleNamespace(number=number, swarm=swarm, archived=archived, progress=Progress(round=6, run_tokens=50))

    bootstrap: Any = SimpleNamespace(archives=[archive(0, 7), archive(1, 6), archive(2, 7, 7)], _wait=asyncio.run)
    bootstrap._pulled = lambda *what: PipelineBootstrap._pulled(bootstrap, *what)
    bootstrap._archive = lambda one, anyway: PipelineBootstrap._archive(bootstrap, one, anyway)
    assert not PipelineBootstrap._archive_the_lonely(bootstrap)
    assert asked == [(0, None)], "whatever it holds"


def test_the_last_of_a_stage_waits_until_it_is_archived_and_who_leaves_others_does_not() -> None:
    now, archived, greeted = swarm_time(), list[int](), list[int]()

    def archive(number: int, *peers: str) -> Any:
        members = Membership("boot")
        for peer in peers:
            members.saw_presence(PeerInfo(peer=peer, training=True, round=7, stamp=now), now + 1e6, now)
        leavers = DepartureQueue(members)

        async def greet_some() -> None:
            greeted.append(number)
            for peer in peers[1:]:
                members.heard(peer, swarm_time() + 1.0)

        swarm = SimpleNamespace(membership=members, greeter=SimpleNamespace(greet_some=greet_some))
        archived = SimpleNamespace(watch=ArchiveSchedule())
        return SimpleNamespace(number=number, swarm=swarm, archived=archived, leavers=leavers)

    alone, others, quiet = archive(0, "anna"), archive(1, "anna", "ben"), archive(2, "ben")

    def take(one: Any) -> bool:
        archived.append(one.number)
        one.archived.watch.archived(one.swarm.membership.volunteers())
        return True

    joined: list[int] = []
    bootstrap: Any = SimpleNamespace(archives=[alone, others, quiet], _wait=asyncio.run, _archive=take, _unjoined={0})
    bootstrap._write_joined = lambda: joined.append(len(archived))
    for one in (alone, others):
        assert one.leavers.ask("anna", now)
    PipelineBootstrap._archive_for_leavers(bootstrap)
    assert archived == [0] and greeted == [0, 1]
    assert joined == [1], "the model of all stages, for whoever reads the folder"
    assert not alone.leavers.ask("anna", now + 0.5) and not others.leavers.ask("anna", now + 0.5)


@pytest.mark.parametrize("held", [(0, 1), (0,)])
def test_stages_that_one_peer_holds_alone_are_joined_too(monkeypatch: pytest.MonkeyPatch, held: tuple[int]) -> None:
    """Each was archived by itself after its rounds, and while one was, the model of all was never written: `export` of
    the bootstrap's folder found nothing, or what was there before."""
    written, now = list[list[int]](), [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(pipeline_bootstrap, "time", clock)
    bootstrap: Any = PipelineBootstrap.__new__(PipelineBootstrap)
    stages = [SimpleNamespace(number=number, is_final=False, rounds=0, state=None) for number in (0, 1)]
    for stage in stages:
        stage.swarm, stage.leavers = SimpleNamespace(accounting=SimpleNamespace(total=0)), None
    nobody = SimpleNamespace(membership=SimpleNamespace(volunteers=list, known=list))
    run = SimpleNamespace(network=SimpleNamespace(archive_every_s=20.0), run=SimpleNamespace(total_tokens=10**6))

    def rest(leavers: Any) -> None:
        now[0] += 1.0
        if now[0] > 45.0:
            raise KeyboardInterrupt

    def archive_the_lonely() -> bool:
        for stage in (stages[number] for number in held):
            stage.rounds += 1
            bootstrap._unjoined.add(stage.number)
        return True

    bootstrap.__dict__ |= {
        "archives": stages,
        "published": SimpleNamespace(run=run),
        "rest": rest,
        "control": SimpleNamespace(board=SimpleNamespace(beat=lambda: None)),
        "_unjoined": set(),
        "_archive_for_leavers": lambda: None,
        "_archive_the_lonely": archive_the_lonely,
        "_archive": lambda stage: False,
        "_joined": lambda: {"weights": [stage.rounds for stage in stages]},
        "write_archive": lambda weights, progress: written.append(weights["weights"]),
        "_keep_peers": lambda: None,
    }
    monkeypatch.setattr(PipelineBootstrap, "progress", Progress())
    with pytest.raises(KeyboardInterrupt):
        bootstrap._archive_until_the_end(nobody)
    assert written == [[seconds * (number in held) for number in (0, 1)] for seconds in (1, 21, 41)]


def test_what_a_bootstrap_kept_before_it_was_killed_is_joined_when_it_is_back() -> None:
    written: list[Any] = []
    bootstrap: Any = PipelineBootstrap.__new__(PipelineBootstrap)
    run = SimpleNamespace(network=SimpleNamespace(archive_every_s=20.0), run=SimpleNamespace(total_tokens=10**6))
    bootstrap.__dict__ |= {
        "archives": [SimpleNamespace(is_final=True, state=None, progress=Progress(round=7, run_tokens=700))],
        "published": SimpleNamespace(run=run),
        "_unjoined": {0},
        "_joined": dict,
        "write_archive": lambda weights, progress: written.append(progress.run_tokens),
    }
    bootstrap._archive_until_the_end(None)
    assert written == [700] and not bootstrap._unjoined


def test_done_tells_the_rounds_since_it_told_the_run_last() -> None:
    """Seen: 4,096 where the stage's own rounds said 6,656."""

    def stage(number: int, counted: int) -> StageStandIn:
        return StageStandIn(ended("interrupted"), [], number=number, counted=counted)

    one = training_of(stage(0, 6656), stage(1, 5000))
    assert one._done("interrupted").run_tokens == 6656
    one._stages.drop(0)
    done = one._done("interrupted")
    assert (done.run_tokens, done.tokens) == (6656, 900), "it has moved, or rests"
    assert one._stages.durable() == Progress(round=5, run_tokens=0, peer_tokens={"me": 900})
    one._stages.drop(1)
    assert one._stages.durable().round == 5 and one._stages.numbers == ()
    one._stages.add(stage(2, 10_500))
    assert one._done("interrupted").run_tokens == 10_000


def test_a_volunteer_hands_over_all_its_stages_before_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    stages = [StageStandIn(ended("interrupted"), []), StageStandIn(ended(BROKEN), [])]
    for stage in stages:
        stage.manager = SimpleNamespace(checkpointer=SimpleNamespace(flush=done.append))
    monkeypatch.setattr(departure, "hand_over", lambda *what: done.append(what))
    one = training_of(*stages)
    one._first.stop_soon = lambda: done.append("drives no more")
    one._context.stop.stop()
    event = one.hand_over()
    assert all(stage.pause.held for stage in stages) and done[0] == "drives no more"
    assert done[3:] == [("control", [stage.swarm for stage in stages], "network", Path("/home/ada/run"))]
    assert (event.reason, event.tokens) == ("interrupted", 900)
