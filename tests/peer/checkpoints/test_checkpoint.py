"""Checkpoints and the trainer: what comes back is to the bit what was saved, and training goes on as if it had never
stopped."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from swarmtrain.algorithm.fragments import FragmentedState, fragments_of
from swarmtrain.algorithm.gossip import layout_of
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.data.batches import Batches
from swarmtrain.events import Event, WarningEvent
from swarmtrain.model.gpt import build_model
from swarmtrain.network.coverage import DataCoverage, ShardsOf
from swarmtrain.network.identity import Identity, new_identity
from swarmtrain.network.rounds.roster import sign_roster
from swarmtrain.peer.checkpoints import writer as checkpointer_module
from swarmtrain.peer.checkpoints.checkpoint import Checkpoint, load_newest, save
from swarmtrain.peer.checkpoints.files import CheckpointFolder
from swarmtrain.peer.checkpoints.writer import Checkpointer
from swarmtrain.peer.lifecycle.stop import StopTraining
from swarmtrain.peer.merging.updates import Averaged, LocalUpdate, Replaced
from swarmtrain.peer.training.loop import ModelLoop
from swarmtrain.peer.training.replica import Replica
from swarmtrain.peer.training.session import RoundReport, Session, Start
from swarmtrain.protocol.rounds.rosters import Roster, RoundPublication
from swarmtrain.run import RunFile, parse_run
from swarmtrain.v1 import snapshot_pb2 as pb

RUN_SHA256 = "5e" * 32
LIMIT_S = 60.0
TEXT = np.frombuffer(b"a swarm of bees swarms over a swarm of swarms. " * 200, dtype=np.uint8)


def run_file() -> RunFile:
    return parse_run(
        "[run]\ntotal_tokens = 100_000\n"
        "[model]\ncontext_tokens = 16\nnum_layers = 1\nwidth = 16\nnum_heads = 2\n"
        "[data]\nsource = 'text'\npaths = ['x']\n"
        "[inner]\nbatch_sequences = 4\n[merge]\nmethod = 'diloco'\ninner_steps = 3\n",
        "run.toml",
    )


@dataclass
class Lone:
    """Exchange of a peer alone, which signs its rosters as in a swarm."""

    identity: Identity
    run: RunFile
    rounds_left: int
    last: tuple[Roster, pb.Signed] | None = None
    own: LocalUpdate | None = None
    coverage: DataCoverage | None = None
    shards: list[int | None] = field(default_factory=list)

    def hold(self, states: Sequence[OuterState]) -> None:
        pass

    def merged(self, fragment: int, state: OuterState) -> None:
        pass

    def start_round(self, progress: Any, steps_per_s: float) -> Start:
        if not self.rounds_left:
            raise StopTraining
        self.rounds_left -= 1
        self.shards.append(None if self.coverage is None else self.coverage.begin(progress.round, []))
        return Start(inner_steps=self.run.merge.inner_steps, num_peers=1, shard=self.shards[-1])

    def step_done(self, inner_steps_done: int) -> None:
        pass

    def publish(self, contribution: LocalUpdate) -> None:
        self.own = contribution
        if self.coverage is not None:
            self.coverage.reached(contribution.tokens)

    def collect(self, fragment: int = 0) -> Averaged | Replaced:
        own = self.own
        assert own is not None
        me = self.identity.peer_id
        entry = RoundPublication(
            peer=me, snapshot="11" * 32, tokens=own.tokens, inner_steps=own.inner_steps, base=own.base
        )
        base_tokens = 0 if self.last is None else self.last[0].total_tokens
        roster = Roster(round=own.round, signer=me, entries=(entry,), base=own.base, base_tokens=base_tokens)
        self.last = (roster, sign_roster(self.identity, RUN_SHA256, roster))
        return Averaged(
            gradient=own.gradient,
            partners=(me,),
            weights=(own.tokens,),
            signer=me,
            roster_sha256=roster.digest,
        )


@dataclass
class Peer:
    """Trainer alone, with what its checkpoints need."""

    loop: ModelLoop
    session: Session
    exchange: Lone
    reports: list[RoundReport] = field(default_factory=list)

    @property
    def replica(self) -> Replica:
        return self.session.replica

    def train(self) -> str:
        return self.loop.train(self.session)

    def checkpoint(self, room: Tensor | None = None, **extra: Any) -> Checkpoint:
        assert self.exchange.last is not None
        replica = self.replica
        return Checkpoint(
            state=replica.state,
            progress=replica.progress,
            roster=self.exchange.last[0],
            signed_roster=self.exchange.last[1],
            own=self.session.local_checkpoint(torch.empty(2, replica.state.size) if room is None else room),
            extra=extra,
        )

    def bytes(self) -> dict[str, bytes]:
        """Return all that training continues from."""
        state = self.replica.state
        moments = self.loop.inner.copy_moments(torch.empty(2, state.size))
        tensors = {
            "theta": state.theta,
            "momentum": state.momentum,
            "moments": moments.vectors,
            "steps": moments.steps,
        }
        return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def peer(identity: Identity, rounds: int, kept: Checkpoint | None = None) -> Peer:
    run = run_file()
    batches = Batches(
        TEXT,
        context_tokens=run.model.context_tokens,
        batch_sequences=run.inner.batch_sequences,
        run_sha256=RUN_SHA256,
        peer_id=identity.peer_id,
        position=0 if kept is None or kept.own is None else kept.own.batches,
    )
    exchange = Lone(identity, run, rounds)
    reports: list[RoundReport] = []
    model = build_model(run.model, run.run.seed)
    loop = ModelLoop(run, model, batches)
    session = Session(run=run, parameters=loop.parameters, loop=loop, exchange=exchange, report=reports.append)
    if kept is not None:
        assert kept.own is not None
        session.resume(kept.state, kept.progress, kept.own)
        exchange.last = (kept.roster, kept.signed_roster)
    return Peer(loop, session, exchange, reports)


@pytest.fixture(scope="module")
def identity() -> Identity:
    return new_identity()


@pytest.fixture(scope="module")
def trained(identity: Identity) -> Peer:
    """Return a volunteer alone, after two rounds."""
    one = peer(identity, 2)
    assert one.train() == "interrupted" and one.replica.progress.round == 2
    return one


def checkpoints(path: Path, identity: Identity) -> CheckpointFolder:
    return CheckpointFolder(path / "checkpoints", RUN_SHA256, identity.peer_id)


def load(folder: CheckpointFolder, warnings: list[str] | None = None) -> Checkpoint | None:
    parameters = sum(p.numel() for p in build_model(run_file().model, 0).parameters())
    said: list[str] = [] if warnings is None else warnings
    found = load_newest(folder, run_file(), parameters, said.append)
    assert warnings is not None or not said, said
    return None if found is None else found[0]


def extra_of(kept: Checkpoint | None) -> Any:
    assert kept is not None
    return kept.extra


# ---------------------------------------------------------------- what comes back


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path, identity: Identity, trained: Peer) -> None:
    before = trained.checkpoint(tally={"a": [1, 2]})
    folder = checkpoints(tmp_path, identity)
    written = save(folder, before)
    assert written.round == 2 and written.path.exists()
    after = load(checkpoints(tmp_path, identity))
    assert after is not None and after.own is not None and before.own is not None
    for name in ("theta", "momentum"):
        assert getattr(after.state, name).numpy().tobytes() == getattr(before.state, name).numpy().tobytes()
    assert after.own.moments.vectors.numpy().tobytes() == before.own.moments.vectors.numpy().tobytes()
    assert after.own.moments.steps.tolist() == before.own.moments.steps.tolist() and set(
        before.own.moments.steps.tolist()
    ) == {6.0}
    assert dataclasses.replace(after.own, moments=before.own.moments) == before.own
    assert (after.own.batches, after.own.own_tokens) == (6, 6 * run_file().tokens_per_step)
    assert (after.progress, after.roster, after.signed_roster) == (
        before.progress,
        before.roster,
        before.signed_roster,
    )
    assert after.extra == {"tally": {"a": [1, 2]}}
    assert load(CheckpointFolder(tmp_path / "nothing", RUN_SHA256, identity.peer_id)) is None


def test_a_bootstraps_checkpoint_has_no_moments(tmp_path: Path, identity: Identity, trained: Peer) -> None:
    folder = checkpoints(tmp_path, identity)
    save(folder, dataclasses.replace(trained.checkpoint(), own=None))
    after = load(folder)
    assert after is not None and after.own is None
    assert torch.equal(after.state.theta, trained.replica.state.theta)


def test_an_old_folder_that_was_put_back_counts_on_from_what_others_count_of_it(
    identity: Identity, trained: Peer
) -> None:
    """Seen: what it trained anew counted for nothing until it had caught up with itself, and was not archived."""
    after = peer(identity, 0, trained.checkpoint())
    before, position = after.replica.own_tokens, after.loop.batches.position
    after.replica.count_on(before + 10**6)
    assert after.replica.own_tokens == before + 10**6 and after.loop.batches.position == position
    after.replica.count_on(5)
    assert after.replica.own_tokens == before + 10**6


# ---------------------------------------------------------------- damage


def test_another_model_or_other_counters_are_not_used(tmp_path: Path, identity: Identity, trained: Peer) -> None:
    folder = checkpoints(tmp_path, identity)
    kept = trained.checkpoint()
    save(folder, dataclasses.replace(kept, progress=dataclasses.replace(kept.progress, run_tokens=1)))
    small = torch.zeros(10)
    save(
        folder, dataclasses.replace(kept, own=None, state=dataclasses.replace(kept.state, theta=small, momentum=small))
    )
    assert kept.own is not None
    moments = dataclasses.replace(kept.own.moments, vectors=torch.zeros(2, 10))
    save(folder, dataclasses.replace(kept, own=dataclasses.replace(kept.own, moments=moments)))
    warnings: list[str] = []
    assert load(folder, warnings) is None
    assert [warning.split(": ")[1].split(";")[0] for warning in warnings] == [
        "its moments are of another model",
        "it is of another model",
        "its counters do not fit its roster",
    ]


def test_what_is_lacking_is_named_and_nothing_promised(tmp_path: Path, identity: Identity, trained: Peer) -> None:
    save(CheckpointFolder(tmp_path / "checkpoints", "77" * 32, identity.peer_id), trained.checkpoint())
    folder = checkpoints(tmp_path, identity)
    written = folder.write(2, [], {})
    warnings: list[str] = []
    assert load(folder, warnings) is None
    assert warnings == [f"the checkpoint {written.path} is not used: it lacks 'theta'; there is none before it"]


def test_a_folder_that_cannot_be_read_is_a_warning(tmp_path: Path, identity: Identity) -> None:
    (tmp_path / "checkpoints").write_text("no folder")
    warnings: list[str] = []
    assert load(checkpoints(tmp_path, identity), warnings) is None
    (warning,) = warnings
    assert warning.startswith(f"the checkpoints in {tmp_path / 'checkpoints'} cannot be read: Not a directory")


# ---------------------------------------------------------------- the writer


class Gate:
    """Takes the place of `save`: counts, waits to be opened, fails when told to."""

    def __init__(self) -> None:
        self.open = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self.error: Exception | None = None
        self.saved: list[Any] = []

    def save(self, folder: CheckpointFolder, checkpoint: Checkpoint, *_: object) -> Any:
        self.begun.release()
        assert self.open.acquire(timeout=LIMIT_S)
        if self.error is not None:
            raise self.error
        assert checkpoint.own is not None
        self.saved.append((checkpoint.extra["n"], float(checkpoint.own.moments.vectors[0, 0])))
        return save(folder, checkpoint)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(checkpointer_module, "save", gate.save)
    return gate


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


def writer(path: Path, identity: Identity) -> tuple[Checkpointer, list[Event], Clock]:
    events: list[Event] = []
    clock = Clock()
    return Checkpointer(checkpoints(path, identity), events.append, now=clock), events, clock


def numbered(trained: Peer, checkpointer: Checkpointer, n: int) -> Checkpoint:
    """Return a checkpoint that is recognised by its number, in `extra` and in its moments."""
    room = checkpointer.room(trained.replica.state.theta.numel())
    checkpoint = trained.checkpoint(room, n=n)
    room.fill_(n)
    return checkpoint


def test_the_newest_replaces_the_one_that_waits(tmp_path: Path, identity: Identity, trained: Peer, gate: Gate) -> None:
    checkpointer, events, _ = writer(tmp_path, identity)
    checkpointer.prepare(trained.replica.state.theta.numel())
    rooms = set()
    for n in range(5):
        checkpoint = numbered(trained, checkpointer, n)
        assert checkpoint.own is not None
        rooms.add(checkpoint.own.moments.vectors.data_ptr())
        checkpointer.offer(checkpoint)
        if n == 0:
            assert gate.begun.acquire(timeout=LIMIT_S)
    assert not checkpointer.flush(0.01) and checkpointer.last is None
    gate.open.release(2)
    assert checkpointer.flush(LIMIT_S)
    assert gate.saved == [(0, 0.0), (4, 4.0)], "nobody writes into moments that are being written"
    assert len(rooms) == 2, "moments are copied into the same two places again and again"
    assert checkpointer.last is not None and checkpointer.last.round == 2 and not events
    assert checkpointer.close(LIMIT_S)
    kept = load(checkpoints(tmp_path, identity))
    assert kept is not None and kept.extra == {"n": 4}


def flushing(checkpointer: Checkpointer) -> tuple[threading.Thread, list[bool]]:
    """Start a thread that flushes and has begun to wait; returns it and its results."""
    told: list[bool] = []
    thread = threading.Thread(target=lambda: told.append(checkpointer.flush(LIMIT_S)))
    wait_for, waits = checkpointer._change.wait_for, threading.Event()

    def observed(condition: Callable[[], bool], timeout: float | None = None) -> bool:
        waits.set()  # the lock is held until it waits
        return wait_for(condition, timeout)

    checkpointer._change.wait_for = observed  # type: ignore[method-assign, assignment]
    thread.start()
    assert waits.wait(LIMIT_S)
    checkpointer._change.wait_for = wait_for  # type: ignore[method-assign]
    return thread, told


def test_a_disk_slower_than_the_rounds_keeps_nobody_waiting(
    tmp_path: Path, identity: Identity, trained: Peer, gate: Gate
) -> None:
    checkpointer, _, _ = writer(tmp_path, identity)
    checkpointer.offer(numbered(trained, checkpointer, 0))
    assert gate.begun.acquire(timeout=LIMIT_S)
    checkpointer.offer(numbered(trained, checkpointer, 1))
    thread, told = flushing(checkpointer)
    room = checkpointer.room(trained.replica.state.theta.numel())
    gate.open.release()
    assert not checkpointer.flush(0.2), "the one that was asked for was given up for one that is not there yet"
    checkpointer.offer(trained.checkpoint(room, n=2))
    assert gate.begun.acquire(timeout=LIMIT_S)
    checkpointer.offer(numbered(trained, checkpointer, 3))
    gate.open.release()
    assert gate.begun.acquire(timeout=LIMIT_S), "it writes the next already"
    thread.join(LIMIT_S)
    assert told == [True]
    gate.open.release()
    assert checkpointer.close(LIMIT_S)


def test_an_end_wakes_those_who_wait(tmp_path: Path, identity: Identity, trained: Peer, gate: Gate) -> None:
    checkpointer, _, _ = writer(tmp_path, identity)
    checkpointer.offer(numbered(trained, checkpointer, 0))
    assert gate.begun.acquire(timeout=LIMIT_S)
    thread, told = flushing(checkpointer)
    assert not checkpointer.close(0.0)
    thread.join(LIMIT_S / 2)
    assert told == [False]
    gate.open.release()


def test_what_is_kept_beside_does_not_fail_a_checkpoint(
    tmp_path: Path, identity: Identity, trained: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer, events, _ = writer(tmp_path, identity)
    for error in (OSError(errno.ENOSPC, "No space left on device"), ValueError("a mistake of ours")):

        def beside(error: Exception = error) -> None:
            raise error

        checkpointer.offer(trained.checkpoint(), beside)
        with caplog.at_level("INFO"):
            assert checkpointer.flush(LIMIT_S)
        assert str(error) in caplog.text
    assert checkpointer.close(LIMIT_S) and not events


def test_who_reads_lent_moments_is_nice_only_when_it_has_them(
    tmp_path: Path, identity: Identity, trained: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step of a round waits for it; and no thread can become less nice again."""
    checkpointer, _, _ = writer(tmp_path, identity)
    are_left: list[bool] = []
    threads: list[threading.Thread] = []

    def be_nice() -> None:
        are_left.append(bool(lent._left))
        threads.append(threading.current_thread())

    monkeypatch.setattr(checkpointer_module, "_be_nice", be_nice)
    for _ in range(3):
        lent, kept = trained.loop.inner.lend_moments(), trained.checkpoint()
        assert kept.own is not None
        checkpointer.offer(dataclasses.replace(kept, own=dataclasses.replace(kept.own, moments=lent)))
        assert checkpointer.flush(LIMIT_S)
    assert are_left == [False] * 3 and len(set(threads)) == 3
    assert checkpointer.close(LIMIT_S)


def test_a_full_disk_is_said_now_and_then_and_training_goes_on(
    tmp_path: Path, identity: Identity, trained: Peer, gate: Gate
) -> None:
    checkpointer, events, clock = writer(tmp_path, identity)
    gate.open.release(100)

    def write(n: int, error: OSError | None) -> bool:
        gate.error = error
        checkpointer.offer(numbered(trained, checkpointer, n))
        return checkpointer.flush(LIMIT_S)

    def said() -> list[tuple[str, str]]:
        told = [(event.code, event.message) for event in events if isinstance(event, WarningEvent)]
        events.clear()
        return told

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert write(0, None) and not said()
    assert not write(1, full)
    ((code, message),) = said()
    assert code == "checkpoint-not-written" and message.startswith("the disk is full") and "make room" in message
    clock.now_s += 299
    assert not write(2, full) and not said()
    clock.now_s += 1
    assert not write(3, OSError(errno.EROFS, os.strerror(errno.EROFS)))
    ((code, message),) = said()
    assert code == "checkpoint-not-written" and "read-only" in message
    assert write(4, None)
    ((code, message),) = said()
    assert code == "checkpoints-again" and str(tmp_path / "checkpoints") in message
    assert write(5, None) and not said()
    assert not write(6, full) and len(said()) == 1, "after it worked, the next failure is news"
    kept = load(checkpoints(tmp_path, identity))
    assert kept is not None and kept.extra == {"n": 5}
    checkpointer.close(LIMIT_S)


def test_a_mistake_of_ours_ends_neither_writer_nor_training(tmp_path: Path, identity: Identity, trained: Peer) -> None:
    checkpointer, events, _ = writer(tmp_path, identity)
    checkpointer.offer(trained.checkpoint(wrong=object()))
    assert not checkpointer.flush(LIMIT_S)
    (event,) = events
    assert isinstance(event, WarningEvent) and "not JSON serializable" in event.message
    checkpointer.offer(trained.checkpoint(right=1))
    assert checkpointer.close(LIMIT_S)
    assert extra_of(load(checkpoints(tmp_path, identity))) == {"right": 1}


def in_shards(identity: Identity, rounds: int, kept: Checkpoint | None = None) -> Peer:
    """Return a peer that takes each round from the least seen of eight shards."""
    one = peer(identity, rounds, kept)
    assert isinstance(one.loop.batches, Batches)
    one.loop.batches.cut(8)
    shards = ShardsOf(run_sha256=RUN_SHA256, corpus_sha256="c0" * 32, num_shards=8, seed=0, round_tokens=192)
    one.exchange.coverage = DataCoverage(identity, shards, lambda _, tokens: tokens, lambda *told: None)
    one.exchange.coverage.restore(None if kept is None else kept.extra["coverage"])
    return one


def test_a_peer_that_draws_from_shards_goes_on_as_if_it_had_never_stopped(tmp_path: Path, identity: Identity) -> None:
    straight, stopped = in_shards(identity, 12), in_shards(identity, 5)
    straight.train()
    stopped.train()
    assert stopped.exchange.coverage is not None
    save(checkpoints(tmp_path, identity), stopped.checkpoint(coverage=stopped.exchange.coverage.kept()))
    again = in_shards(identity, 7, load(checkpoints(tmp_path, identity)))
    again.train()
    assert again.bytes() == straight.bytes()
    assert stopped.exchange.shards + again.exchange.shards == straight.exchange.shards
    assert set(straight.exchange.shards[:8]) == set(range(8)), "each is seen before any is again"
    everywhere = peer(identity, 12)
    everywhere.train()
    assert everywhere.bytes() != straight.bytes()


def test_only_a_peer_without_moments_of_its_own_warms_them_up(identity: Identity, trained: Peer) -> None:
    newcomer = peer(identity, 1)
    replaced = Replaced(state=newcomer.replica.state, progress=newcomer.replica.progress, from_peer="", reason="")
    newcomer.session.adopt(replaced)
    assert newcomer.loop.young_steps == 0
    resumed = peer(identity, 1, trained.checkpoint())
    resumed.session.adopt(replaced)
    assert resumed.loop.young_steps is None


def test_what_is_replaced_of_a_state_goes_when_it_is_written_and_not_when_it_is_on_the_disk(
    tmp_path: Path, identity: Identity, trained: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained.checkpoint()
    fragments = fragments_of(layout_of([tuple(one.shape) for one in trained.loop.model.parameters()]), 2)
    gone: list[weakref.ref[np.ndarray[Any, Any]]] = []

    def watched(vector: Tensor) -> Tensor:
        numbers = vector.numpy().copy()
        gone.append(weakref.ref(numbers))
        return torch.from_numpy(numbers)

    states = [
        OuterState(watched(one.of(whole.state.theta)), watched(one.of(whole.state.momentum))) for one in fragments
    ]
    checkpoint = dataclasses.replace(whole, state=FragmentedState(fragments, states).frozen())
    del states
    assert len(gone) == 4 and all(ref() is not None for ref in gone)
    alive: list[bool] = []
    fsync = os.fsync

    def look_and_sync(descriptor: int) -> None:
        alive.extend(ref() is not None for ref in gone)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look_and_sync)
    written = save(checkpoints(tmp_path, identity), checkpoint)
    assert alive and not any(alive)
    kept = load(checkpoints(tmp_path, identity))
    assert kept is not None and written.size_bytes > 0
    assert torch.equal(kept.state.theta, whole.state.theta) and torch.equal(kept.state.momentum, whole.state.momentum)
