"""Swarms whose model is cut into stages: volunteers are assigned stages, die, join late and are replaced."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from swarm import PATIENCE_S, Child, Swarm, exit_limit_s, wait_until, write_run

from swarmtrain.events import (
    ArchivedEvent,
    AssignedEvent,
    DoneEvent,
    JoinedEvent,
    MovedEvent,
    PausedEvent,
    PeerLeftEvent,
    RefusedEvent,
    ResumedEvent,
    RoundEvent,
    StageThroughputEvent,
)
from swarmtrain.v1 import control_pb2 as pb
from swarmtrain.v1 import control_pb2_grpc as pb_grpc

pytestmark = [pytest.mark.processes, pytest.mark.long]

SHORT_END = "import swarmtrain.peer.lifecycle.bootstrap_peer as module; module.LINGER_S = 3.0"
"""Code that shortens the minute for which a bootstrap waits at the end for a killed volunteer."""
TOTAL_TOKENS = 50_000
"""Tokens of about a hundred steps: enough for one volunteer to be killed and another to join."""
LEARNT = 0.8
"""Largest ratio to the loss of an untrained model, after as many tokens."""
LONG_ROUND = 64
"""Inner steps of a round that lasts until the archive of the one before is there."""
ROUNDS_S = 30.0
"""Time limit for some rounds of a stage, or until a liar is reported, whoever hangs meanwhile."""
RESCUED_S = 60.0
"""Time limit until an empty stage has a round again: presence ends after 6 s, and moves are decided every 2 s."""
FORGOTTEN_S = 5.0
"""Seconds after which reported losses are of microbatches begun without the liar."""
_NETWORK = {"call_limit_s": 3.0, "stall_limit_s": 3.0, "presence_ttl_s": 6.0, "archive_every_s": 5.0}


_GARBAGE = """
import os
from swarmtrain.peer.pipeline import stage_service
right = stage_service.StageServer.answer_untrusted

async def answer_untrusted(self, caller, question, body):
    message, sent = await right(self, caller, question, body)
    return message, [os.urandom(len(part)) for part in sent]

stage_service.StageServer.answer_untrusted = answer_untrusted
"""


def _run(swarm: Swarm, total_tokens: int, balance: str, inner_steps: int = 8) -> Path:
    return write_run(
        swarm.folder,
        run={"total_tokens": total_tokens},
        model={"num_layers": 3, "context_tokens": 32},
        inner={"batch_sequences": 16, "microbatch_sequences": 2, "learning_rate": 1e-2},
        pipeline={"stages": 3, "balance": balance, "balance_every_s": 2.0},
        merge={"method": "gossip", "inner_steps": inner_steps},
        network=_NETWORK,
    )


def _join_all(swarm: Swarm, invite: str, stages: Sequence[int], *extra: str) -> list[Child]:
    """Start a volunteer for each of these stages, and wait until all are assigned."""
    children = [
        swarm.join(f"v{number}", invite, f"--first-stages={stage}", *extra) for number, stage in enumerate(stages)
    ]
    for child in children:
        child.wait_event(AssignedEvent)
    return children


def _holds(child: Child) -> tuple[int, ...]:
    """Return the stages that it last reported to hold."""
    told = [
        event.stages if isinstance(event, AssignedEvent) else event.after
        for event in list(child.events)
        if isinstance(event, AssignedEvent | MovedEvent)
    ]
    return told[-1]


def _rounds(child: Child, stage: int) -> list[RoundEvent]:
    return [event for event in child.all(RoundEvent) if event.stage == stage]


def _wait_more_rounds(children: Sequence[Child], stage: int, number: int) -> None:
    """Wait for so many more rounds of a stage, whoever takes them."""
    before = sum(len(_rounds(child, stage)) for child in children)
    wait_until(
        lambda: sum(len(_rounds(child, stage)) for child in children) >= before + number,
        lambda: "\n".join(child.story() for child in children),
        ROUNDS_S + exit_limit_s(),
    )


def test_a_model_in_stages_to_its_end_with_one_killed_and_one_late(swarm: Swarm) -> None:
    """Nobody says who holds what; at the end the bootstrap has the whole model, which nobody else ever had."""
    bootstrap = swarm.bootstrap(_run(swarm, TOTAL_TOKENS, "none"), "--wait-for", "4", prelude=SHORT_END)
    invite = bootstrap.invite.invite
    first = [swarm.join(f"v{number}", invite) for number in range(4)]
    held = [child.wait_event(AssignedEvent).stages for child in first]
    assert sorted({stage for stages in held for stage in stages}) == [0, 1, 2]
    assert all(len(stages) == 1 for stages in held), "as many as there are stages: each holds one"
    twice = next(stages for stages in held if held.count(stages) == 2)
    victim = first[held.index(twice)]
    for child, stages in zip(first, held, strict=True):
        child.wait_event(RoundEvent, lambda event, stages=stages: event.stage == stages[0] and event.round >= 1)
    victim.kill()
    late = swarm.join("late", invite)
    (stage,) = late.wait_event(AssignedEvent).stages
    late.wait_event(RoundEvent, lambda event: event.stage == stage and event.round > 0)
    assert late.wait_event(JoinedEvent).state_from, "it took the present weights of its stage from somebody"
    for child in (*(child for child in first if child is not victim), late, bootstrap):
        assert child.wait() == 0, child.story()
    (done,) = bootstrap.all(DoneEvent)
    assert done.reason == "total_tokens"
    assert done.held_out_loss is not None and done.held_out_loss < LEARNT * math.log(256)
    told = [child.all(DoneEvent)[0] for child in first if child is not victim]
    assert all(0 < event.tokens < TOTAL_TOKENS for event in told), "a part of the model's work each"
    model = bootstrap.folder / "model"
    measured = swarm.run("eval", str(model), "--json")
    assert json.loads(measured.stdout)["held_out_loss"] == pytest.approx(done.held_out_loss, rel=1e-4)
    swarm.assert_nothing_left()


def test_one_that_answers_garbage_is_named_and_left_alone(swarm: Swarm) -> None:
    """Of two peers of the second stage one sends random bytes of the right size."""
    bootstrap = swarm.bootstrap(_run(swarm, 10**9, "none"), "--wait-for", "4")
    invite = bootstrap.invite.invite
    children = [swarm.join(f"v{number}", invite, f"--first-stages={number}") for number in range(3)]
    garbage = swarm.join("garbage", invite, "--first-stages=1", prelude=_GARBAGE)
    mallory = garbage.id
    refused = children[0].wait_event(RefusedEvent, lambda event: event.from_peer == mallory, ROUNDS_S + exit_limit_s())
    _wait_more_rounds(children, 0, 3)
    _wait_more_rounds(children, 2, 3)
    later_s = refused.time + FORGOTTEN_S
    flow = children[0].wait_event(
        StageThroughputEvent, lambda event: event.loss is not None and event.time > later_s, ROUNDS_S + exit_limit_s()
    )
    assert flow.loss is not None and flow.loss < 0.9 * math.log(256), "what it sent was not computed with"
    for child in (*children, garbage, bootstrap):
        child.interrupt()
    for child in (*children, garbage, bootstrap):
        assert child.wait() == 0, child.story()


def test_everyone_killed_and_started_again_goes_on_from_what_each_kept(swarm: Swarm) -> None:
    """Each takes the stage again that its folder has the newest checkpoint of, and so no stage begins anew."""
    run_file = _run(swarm, 10**9, "none")
    bootstrap = swarm.bootstrap(run_file, "--wait-for", "4")
    stages = (2, 0, 1, 1)
    children = _join_all(swarm, bootstrap.invite.invite, stages)
    for child in children:
        child.wait_event(RoundEvent, lambda event: event.round >= 3)
    before = [max(event.round for child in children for event in _rounds(child, stage)) for stage in range(3)]
    bootstrap.interrupt()
    assert bootstrap.wait() == 0, bootstrap.story()
    for stage, round in enumerate(before):
        names = [path.stem for path in (bootstrap.folder / "checkpoints" / f"stage-{stage}").glob("*.json")]
        assert max(int(name.rpartition("-")[2]) for name in names) >= round, "a last archive of every stage"
    for child in children:
        child.kill()
    rounds = [max(event.round for event in child.all(RoundEvent)) for child in children]
    bootstrap = swarm.bootstrap(run_file, "--wait-for", "4")
    again = [swarm.join(f"v{number}", bootstrap.invite.invite) for number in range(4)]
    taken = [child.wait_event(AssignedEvent).stages for child in again]
    assert taken[:2] == [(2,), (0,)] and (1,) in taken[2:], "\n".join(child.story() for child in again)
    for child, stage, (now,), last in zip(again, stages, taken, rounds, strict=True):
        joined = child.wait_event(JoinedEvent)
        if stage == now:
            assert joined.resumed_round is not None
            assert joined.resumed_round >= last - 1, "but for the round that it was in, or was writing"
        child.wait_event(RoundEvent, lambda event, now=now: event.round > before[now])
    for child in (*again, bootstrap):
        child.interrupt()
    for child in (*again, bootstrap):
        assert child.wait() == 0, child.story()
    swarm.assert_nothing_left()


def test_one_that_rests_holds_nothing_and_one_that_starts_paused_takes_nothing(swarm: Swarm) -> None:
    """A pause that a person asked for outlives the process."""
    bootstrap = swarm.bootstrap(_run(swarm, 10**9, "none"), "--wait-for", "2")
    invite = bootstrap.invite.invite
    anna, ben = swarm.join("anna", invite), swarm.join("ben", invite)
    for child in (anna, ben):
        child.wait_event(RoundEvent)
    with _control_of(anna) as stub:
        stub.Pause(pb.PauseRequest(), timeout=PATIENCE_S)
        paused = anna.wait_event(PausedEvent)
        ben.wait_event(PeerLeftEvent, lambda event: event.left == anna.id)
        assert max(event.time for event in anna.all(RoundEvent)) <= paused.time, "it has left its stages"
        stub.Resume(pb.ResumeRequest(), timeout=PATIENCE_S)
        resumed = anna.wait_event(ResumedEvent)
        assert len(anna.all(AssignedEvent)) == 2, "it takes what needs it then"
        anna.wait_event(RoundEvent, lambda event: event.time > resumed.time)
        stub.Pause(pb.PauseRequest(), timeout=PATIENCE_S)
        wait_until(lambda: len(anna.all(PausedEvent)) == 2, "the second pause")
    anna.interrupt()
    assert anna.wait() == 0, anna.story()
    again = swarm.join("anna", invite)
    again.wait_event(PausedEvent)
    assert not again.all(AssignedEvent) and not again.all(JoinedEvent)
    with _control_of(again) as stub:
        stub.Resume(pb.ResumeRequest(), timeout=PATIENCE_S)
        again.wait_event(RoundEvent)
    assert not again.all(ResumedEvent), "it had not been there"
    for child in (again, ben, bootstrap):
        child.interrupt()
    for child in (again, ben, bootstrap):
        assert child.wait() == 0, child.story()


@contextmanager
def _control_of(child: Child) -> Iterator[pb_grpc.ControlStub]:
    address = child.folder / "control.address"
    wait_until(address.exists, f"control of {child.name}")
    with grpc.insecure_channel(address.read_text().splitlines()[0]) as channel:
        yield pb_grpc.ControlStub(channel)


def test_one_of_two_that_hangs_or_dies_costs_seconds_and_the_last_one_is_replaced(swarm: Swarm) -> None:
    """SIGSTOP for one of two peers of the second stage, SIGKILL for one of the third's, then for the last of it."""
    bootstrap = swarm.bootstrap(_run(swarm, 10**9, "rates"), "--wait-for", "6")
    children = _join_all(swarm, bootstrap.invite.invite, (0, 0, 1, 1, 2, 2))
    for child in children:
        child.wait_event(RoundEvent, lambda event: event.round >= 1)
    bootstrap.wait_event(ArchivedEvent)

    def of_the_second() -> list[Child]:
        return [child for child in children if 1 in _holds(child)]

    wait_until(lambda: len(of_the_second()) > 1, "two of it: they may have moved since they were started")
    stopped = of_the_second()[-1]
    stopped.process.send_signal(signal.SIGSTOP)
    _wait_more_rounds(children, 0, 2)
    [child for child in children if child is not stopped and 2 in _holds(child)][-1].kill()
    _wait_more_rounds(children, 0, 2)
    stopped.process.send_signal(signal.SIGCONT)
    at_s = time.time()
    for child in children:
        if 2 in _holds(child) and child.process.poll() is None:
            child.kill()  # nobody has the third stage's weights then but the bootstrap
    last_round = max(event.round for child in children for event in _rounds(child, 2))
    alive = [child for child in children if child.process.poll() is None]

    def rescued() -> list[RoundEvent]:
        return [event for child in alive for event in _rounds(child, 2) if event.time > at_s]

    wait_until(rescued, lambda: "\n".join(child.story() for child in alive), RESCUED_S + exit_limit_s())
    assert 0 < rescued()[0].round <= last_round + 1, "from the archive, not from the beginning"
    for child in (*alive, bootstrap):
        child.interrupt()
    for child in (*alive, bootstrap):
        assert child.wait() == 0, child.story()
    swarm.assert_nothing_left()
