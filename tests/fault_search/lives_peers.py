"""Peers of the world "lives": processes with a folder each, which come, leave, are killed and come back.

Their decisions are the product's own: who is here (`Membership`), who has trained how much (`TokenAccounting`), what a
state says and what is taken from it (`fetch_consensus_state`, the exchange's `present_state`), what a bootstrap
archives (`Archive`), and who stays until then (`before_leaving`, `DepartureQueue`). Modelled is what travels, when, and
what is on a disk. In place of weights a state has the rounds that went into it, so that a loss is seen.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import math
import random
import statistics
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.errors import RunTimeError
from swarmtrain.network.asynchronous.state_fetcher import FetchedState as State
from swarmtrain.network.codec import body_of
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.discovery.token_accounting import TokenAccounting, counting_rules
from swarmtrain.network.identity import Identity, new_identity, peer_bytes
from swarmtrain.network.snapshots.state_provider import FillManifest, state_specs
from swarmtrain.network.snapshots.store import HeldSnapshot, Snapshot, TensorSpec
from swarmtrain.peer import bootstrap
from swarmtrain.peer.checkpoints.archive import Archive
from swarmtrain.peer.lifecycle import departure
from swarmtrain.peer.lifecycle.bootstrap_peer import COUNTS_EVERY_S, LAST_SAMPLE, LOOK_EVERY_S
from swarmtrain.peer.merging.consensus import ARCHIVED, layout_of_specs, not_far_behind
from swarmtrain.peer.merging.consensus_state import fetch_consensus_state
from swarmtrain.peer.merging.gossip_exchange import GossipExchange
from swarmtrain.peer.merging.updates import Replaced
from swarmtrain.peer.training.replica import Replica
from swarmtrain.peer.training.session import skippable_tokens
from swarmtrain.protocol.archive.departure import DepartureQueue, FellowDepartures, Leave, before_leaving
from swarmtrain.protocol.archive.schedule import ArchiveSchedule
from swarmtrain.protocol.gossip.partners import left_behind
from swarmtrain.protocol.membership.membership import Membership, PeerInfo, PeerState
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile
from swarmtrain.simulate.clock import Clock
from swarmtrain.v1 import snapshot_pb2 as pb

_T = TypeVar("_T")

TOTAL_TOKENS = 200_000
LIE_TOKENS = 150_000
RUN = RunFile.model_validate(
    {
        "run": {"total_tokens": TOTAL_TOKENS},
        "model": {"context_tokens": 16},
        "inner": {"batch_sequences": 1, "warmup_fraction": 0.01},
        "merge": {"inner_steps": 8, "method": "gossip"},
        "network": {"presence_ttl_s": 15.0, "archive_every_s": 20.0},
    }
)
SHA256 = "ab" * 32
SPECS = (TensorSpec("weights", (1,)),)
ONE = OuterState(torch.ones(1), torch.zeros(1))
_ONE_BYTES = body_of(ONE.theta, ONE.momentum)
_STARTS_S, _PULLS_S, _WRITES_S = 0.8, 0.6, 0.3
"""Seconds that a process takes to start, a state to arrive, and a checkpoint to be written."""
_OLD_S = 3600.0
"""Seconds before the play at which the run was published: a time in which nobody has trained, and anybody may claim to
have."""
_LOOKS_S = 3.0
_ASKS_S = 0.5
_FINDS_S = 8.0
"""Seconds after which a new volunteer gives up if it finds no peer and cannot continue alone."""
_KEPT = 6
"""Checkpoints that a folder keeps here. A copy of a folder that is put back can be as old as the oldest of them."""

Round = tuple[str, int]
"""(peer, number of its round over all incarnations): work that went into weights."""


@dataclass(frozen=True)
class Behind:
    """Work that weights contain, which real peers cannot know: the rounds, and the greatest run total at which one was
    trained."""

    rounds: frozenset[Round] = frozenset()
    at_tokens: int = 0

    def with_weights_of(self, partner: Behind) -> Behind:
        """Return the work in the merge with a partner's weights. A merge adds no counts, even if the partner counts
        more."""
        return Behind(self.rounds | partner.rounds, self.at_tokens)


def behind_mean(states: Sequence[Behind]) -> Behind:
    """Return the work in the consensus of several states. Its `at_tokens` is the lower median of theirs."""
    at_tokens = statistics.median_low([one.at_tokens for one in states]) if states else 0
    return Behind(frozenset().union(*(one.rounds for one in states)), at_tokens)


@dataclass(frozen=True)
class DiskCheckpoint:
    """Checkpoint on a disk."""

    progress: Progress
    behind: Behind
    tally: list[list[str | int | float]]
    own_tokens: int = 0
    at_s: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Additional data of an archive's checkpoint."""
    of_server: tuple[int, int, int, list[list[str | int]]] = (0, 0, 0, [])
    """Of a server: gradients taken, refreshes of the momentum, gradients since, and the rounds that have entered."""


@dataclass
class Folder:
    """What a process leaves behind: its key, its newest checkpoints, and the addresses of the peers it knew."""

    key: str
    checkpoints: list[DiskCheckpoint] = field(default_factory=list)
    peers: dict[str, int] = field(default_factory=dict)
    counts: tuple[list[list[str | int | float]], float] | None = None
    """Tally that a bootstrap wrote between two archives, and the time."""

    def copy(self, age: int = 0) -> Folder:
        """Return the folder as it was `age` checkpoints ago."""
        kept = self.checkpoints[: max(1, len(self.checkpoints) - age)]
        return Folder(self.key, list(kept), dict(self.peers), self.counts)

    def write(self, kept: DiskCheckpoint) -> None:
        """Add a checkpoint."""
        self.checkpoints = [*self.checkpoints[1 - _KEPT :], kept]


class _Loop(asyncio.SelectorEventLoop):
    """Event loop in which work for a thread runs at once."""

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        done = self.create_future()
        done.set_result(func(*args))
        return done


class _Later(Exception):  # noqa: N818 - a signal, not an error
    """Raised where the product would sleep and try again later."""


@functools.cache
def identity_of(key: str) -> Identity:
    """Return the identity that belongs to a process's key, a short name that stands for its PeerID."""
    return new_identity(hashlib.sha256(key.encode()).digest())


class Process:
    """Simulated process of the run: base of volunteers and bootstraps."""

    is_bootstrap = False
    speed = 0.0

    def __init__(self, world: LivesWorld, folder: Folder, address: int, invite: Mapping[str, int]) -> None:
        self.world, self.folder, self.address = world, folder, address
        self.me = identity_of(folder.key).peer_id
        self.alive, self.frozen, self.entered, self.away = True, False, False, True
        self.group = world.new_group()
        self.knows = {**folder.peers, **invite}
        self.dht: dict[str, tuple[float, pb.Record]] = {}
        self.membership = Membership(self.me)
        now = world.clock.now
        self.accounting = TokenAccounting(
            self.me,
            counting_rules(RUN, -_OLD_S),
            self._read_bucket,
            self._speeds,
            lambda: world.clock.now,
            world.refused,
        )
        self.info = PeerInfo(
            peer=self.me, stamp=now, is_bootstrap=self.is_bootstrap, training=not self.is_bootstrap, addresses=("a",)
        )
        self.progress, self.behind = Progress(), Behind()
        self.offered: tuple[Progress, Behind] | None = None
        self.fill: FillManifest = lambda manifest: None
        self.swarm = self._as_swarm()
        self.came_s, self.asked_s = now, math.inf
        """Time when the process was started, and time when it was asked to leave."""
        self.ended_s, self.said_goodbye = math.inf, False
        self._backlog: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def _as_swarm(self) -> Any:
        """Return an object with the parts of `Swarm` that the product's decisions use."""
        process = self

        class _Swarm(SimpleNamespace):
            asynchronous, coverage, specs = True, None, SPECS
            published = PublishedRun(b"", SHA256, process.world.run_file, b"", b"")
            identity, store = identity_of(process.folder.key), SimpleNamespace(arriving=None)
            emit = staticmethod(lambda event: None)

            @property
            def presence(self) -> Any:
                return SimpleNamespace(me=process.info)

        return _Swarm(
            membership=self.membership,
            accounting=self.accounting,
            states=SimpleNamespace(fetch=self._fetch_states, fetch_manifests=self._fetch_manifests),
        )

    # ------------------------------------------------------------- the process

    def later(self, delay_s: float, call: Callable[..., object], *args: Any) -> None:
        """Schedule a call, unless this process has ended by then."""
        self.world.clock.call_later(delay_s, self.deliver, call, *args)

    def deliver(self, call: Callable[..., object], *args: Any) -> None:
        """Run `call` in this process. Everything that the process does passes through here."""
        if self.frozen:
            self._backlog.append((call, args))
        elif self.alive:
            call(*args)

    def freeze(self) -> None:
        """Freeze the process."""
        self.frozen = True

    def thaw(self) -> None:
        """Let the process continue, if it was frozen."""
        if not self.frozen:
            return
        self.frozen = False
        if self.alive:
            self.membership.resume(self.world.clock.now)
        backlog, self._backlog = self._backlog, []
        for call, args in backlog:
            self.deliver(call, *args)

    @property
    def answers(self) -> bool:
        """True once the process has read its folder, so that it answers calls."""
        return self.alive and not self.frozen and self.entered

    def kill(self) -> None:
        """Kill the process. Other processes still have its presence and its records."""
        if self.alive:
            self.ended_s = self.world.clock.now
        self.alive = self.frozen = False

    def end(self) -> None:
        """Say goodbye, then end the process."""
        self.said_goodbye = True
        self.world.board.pop(self.me, None)
        for other in self.neighbours():
            other.membership.left(self.me, self.world.clock.now)
        self.kill()

    def leave(self) -> None:
        """Ask the process to end."""
        raise NotImplementedError

    @property
    def holds(self) -> Behind:
        """What is behind the weights that it offers."""
        return Behind() if self.offered is None else self.offered[1]

    def neighbours(self) -> list[Process]:
        """Return the other processes that answer this one."""
        living = self.world.living()
        return [one for one in living if one is not self and one.answers and one.group == self.group]

    # ------------------------------------------------------------- who is here

    def enter(self) -> None:
        """Dial the peers it knows, and look around."""
        self.entered = True
        self._dial()
        self._look_around()

    def keep_looking(self) -> None:
        """Look around every few seconds, as the product does."""
        self._dial()
        self._look_around()
        self._tell_progress()
        self.world.run(self.accounting.read_all())
        self.announce()
        self.later(_LOOKS_S, self.keep_looking)

    def _dial(self) -> None:
        for key, address in self.knows.items():
            there = self.world.processes.get(key)
            if there is not None and there.answers and there.address == address and there.group != self.group:
                self.world.join_groups(self, there)

    def _look_around(self) -> None:
        now, ttl_s = self.world.clock.now, RUN.network.presence_ttl_s
        for info, group in list(self.world.board.values()):
            if group == self.group and info.peer != self.me:
                self.accounting.meet(info.peer)
                self.membership.saw_presence(info, info.stamp + ttl_s, now)
        self.membership.expire(now)
        for other in self.neighbours():
            self.knows[other.folder.key] = self.folder.peers[other.folder.key] = other.address

    def announce(self) -> None:
        """Renew its presence."""
        self.away = False
        now = self.world.clock.now
        self.info = dataclasses.replace(self.info, stamp=max(now, self.info.stamp + 1e-6))
        self.world.board[self.me] = self.info, self.group

    def _tell_progress(self) -> None:
        """Store a progress record of the tokens on the process's disk, if it trains."""
        if self.is_bootstrap or not self.folder.checkpoints:
            return
        newest, now = self.folder.checkpoints[-1], self.world.clock.now
        tokens = self.own_to_tell(newest.progress.peer_tokens.get(self.me, 0))
        record = now, pb.Record(progress=pb.Progress(tokens=tokens, round=newest.progress.round))
        for holder in (self, *self.neighbours()):
            holder.dht[self.me] = record
        told, key = self.world.told.setdefault(self.me, {}), self.folder.key
        if tokens not in told:
            told[tokens] = frozenset(one for one in newest.behind.rounds if one[0] == key)

    def own_to_tell(self, durable_tokens: int) -> int:
        """Return the process's own tokens to advertise, given those on its disk."""
        return self.accounting.own_to_tell(durable_tokens)

    async def _read_bucket(self, kind: str, prefix: str) -> Mapping[str, tuple[pb.Record, float]]:
        found: dict[str, tuple[float, pb.Record]] = {}
        for holder in (self, *self.neighbours()) if not prefix else ():
            for peer, record in holder.dht.items():
                if peer not in found or record[0] > found[peer][0]:
                    found[peer] = record
        return {peer: (record, math.inf) for peer, (_, record) in sorted(found.items())}

    def _speeds(self) -> dict[str, float]:
        live = (self.info, *self.membership.volunteers())
        return {info.peer: info.steps_per_s * RUN.tokens_per_step for info in live}

    def greet(self, peer: str) -> None:
        """Ask a peer for its progress."""
        there, now = self.world.by_id(peer), self.world.clock.now
        if there not in self.neighbours():
            self.membership.call_failed(peer, now, "unreachable")
        elif not there.away:
            self.membership.heard(peer, now)
            if there.info.stamp < now:
                there.announce()
            self.membership.saw_presence(there.info, now + RUN.network.presence_ttl_s, now)

    # ------------------------------------------------------------- states

    def set_state(self) -> None:
        """Offer the process's present state from now on."""
        self.offered = self.progress, self.behind
        self.accounting.learn(self.progress.peer_tokens)
        self.info = dataclasses.replace(self.info, round=self.progress.round, run_tokens=self.progress.run_tokens)

    def restore(self, kept: DiskCheckpoint) -> None:
        """Continue from a checkpoint."""
        self.progress, self.behind = kept.progress, kept.behind
        self.accounting.restore(kept.tally, kept.at_s)
        self.set_state()

    async def _fetch_states(self, peers: Sequence[str], min_round: int = 0) -> list[State]:
        """Return the states of those peers that deliver one."""
        found: list[State] = []
        for peer in peers:
            there = self.world.by_id(peer)
            if there not in self.neighbours():
                self.membership.call_failed(peer, self.world.clock.now, "unreachable")
            elif there.offered is not None and there.offered[0].round >= min_round:
                found.append(state_that_came(peer, *there.offered, there.fill))
        self.world.pulled = found
        return found

    async def _fetch_manifests(self, peers: Sequence[str]) -> list[pb.Manifest]:
        """Return the manifests of the peers' states."""
        pulled = self.world.pulled
        manifests = [state.held.snapshot.manifest for state in await self._fetch_states(peers, 1)]
        self.world.pulled = pulled
        return manifests

    def pulled_behind(self) -> Behind:
        """Return the work in the consensus of the states that arrived last, without those far behind."""
        pulled: Any = self.world.pulled
        return behind_mean([one.behind for one in not_far_behind(pulled, RUN.merge.max_staleness_rounds)])


@dataclass(frozen=True, kw_only=True)
class _Pulled(State):
    """State that arrived, and the work in it."""

    behind: Behind


def state_that_came(
    peer: str, progress: Progress, behind: Behind, fill: FillManifest = lambda manifest: None
) -> _Pulled:
    """Return a peer's state as it arrives, with the manifest's fields that the peer fills in."""
    manifest = pb.Manifest(round=progress.round, run_tokens=progress.run_tokens)
    for spec in state_specs(SPECS):
        manifest.tensors.add(name=spec.name, shape=spec.shape, dtype=spec.dtype)
    for whose, tokens in sorted(progress.peer_tokens.items()):
        manifest.peer_tokens.add(peer=peer_bytes(whose), tokens=tokens)
    fill(manifest)
    snapshot = Snapshot(manifest, pb.Signed(), "", peer)
    buffer = bytearray(_ONE_BYTES.read(0, _ONE_BYTES.size_bytes))
    return _Pulled(peer=peer, held=HeldSnapshot(snapshot, _ONE_BYTES, {0}, buffer), whole=True, behind=behind)


# ---------------------------------------------------------------- volunteers


class _Exchange(GossipExchange):
    """The product's exchange, of which only decisions are used here."""

    def __init__(self, volunteer: SearchedVolunteer) -> None:
        world: Any = volunteer.world
        gossip: Any = SimpleNamespace(took_states=lambda *told: None)
        stop: Any = SimpleNamespace(sleep=volunteer.sleep, check=lambda: None)
        self.swarm, self.run, self.network = volunteer.swarm, world.run_file, world
        self._layout = layout_of_specs(SPECS)
        self.gossip, self.stop, self._robustness = gossip, stop, []
        self._fresh, self.on_arriving = True, lambda held: None

    def offer(self, state: Any, progress: Progress) -> None:
        """Do nothing: the volunteer offers its state."""


class SearchedVolunteer(Process):
    """Volunteer: it trains."""

    def __init__(
        self, world: LivesWorld, folder: Folder, address: int, invite: Mapping[str, int], speed: float
    ) -> None:
        self.speed, self.own_tokens, self.met_bootstrap = speed, 0, False
        super().__init__(world, folder, address, invite)
        self.info = dataclasses.replace(self.info, steps_per_s=speed)
        self.exchange: Any = _Exchange(self)
        self.leaves = False
        self._merged: dict[str, int] = {}
        """Round of the newest publication that the volunteer has merged, by peer."""
        self.fellows: FellowDepartures | None = None
        self._tries_left = 0
        self.later(_STARTS_S, self._begin)

    def _begin(self) -> None:
        kept = self.folder.checkpoints[-1] if self.folder.checkpoints else None
        if kept is not None:
            self.restore(kept)
            self.own_tokens = kept.own_tokens
        self._find(kept is not None)

    def _find(self, resumes: bool) -> None:
        """Look for a peer that answers."""
        self.enter()
        if not self.neighbours() and self.world.clock.now < self.came_s + _FINDS_S:
            self.later(1.0, self._find, resumes)
        elif self.neighbours() or resumes:
            self._tries_left = 3
            self.later(_PULLS_S, self._join)
        else:
            self.kill()

    def sleep(self, seconds: float) -> None:
        """Stand in for the product's sleep between two attempts: raise `_Later`, so that the caller tries again later,
        or return at once before the last attempt."""
        self._tries_left -= 1
        if self._tries_left > 0:
            raise _Later

    def _join(self) -> None:
        for peer in [info.peer for info in self.membership.live()]:
            self.greet(peer)
        before = self.progress
        try:
            new: Replaced | None = self.exchange.present_state(self.progress)
        except _Later:
            self.later(1.0, self._join)
            return
        except RunTimeError:
            self.kill()  # nobody delivers: a person tries again
            return
        if new is not None:
            merged = new.progress.peer_tokens.get(self.me, 0) - before.peer_tokens.get(self.me, 0)
            if self.folder.checkpoints:
                self.own_tokens += skippable_tokens(merged, RUN.round_tokens)
            self._adopt(new)
        self.met_bootstrap = any(one.is_bootstrap for one in self.neighbours())
        Replica.count_on(self, self.accounting.contributions().get(self.me, 0))  # type: ignore[arg-type]
        self.set_state()
        self.keep_looking()
        self._start_round()

    def _adopt(self, new: Replaced) -> None:
        self.progress = new.progress
        self.behind = self.pulled_behind()

    def _start_round(self) -> None:
        self.world.trains(self)
        self.announce()
        self.later(RUN.merge.inner_steps / self.speed, self._end_round)

    def _end_round(self) -> None:
        """End the round: merge a partner's weights, count the tokens, and write a checkpoint. A volunteer that leaves
        loses what it trained since its last merge."""
        if self.leaves:
            return
        tokens, me = RUN.round_tokens, self.me
        self.own_tokens += tokens
        before_tokens = self.accounting.contributions().get(me, 0)
        self.accounting.learn({me: self.own_tokens})
        self.world.trained(self, before_tokens)
        if not self._merge((self.folder.key, self.world.next_round(me))):
            counts = self.accounting.contributions()
            self.progress = Progress(round=self.progress.round + 1, run_tokens=sum(counts.values()), peer_tokens=counts)
        self.set_state()
        kept = DiskCheckpoint(
            self.progress, self.behind, self.accounting.kept(), self.own_tokens, at_s=self.world.clock.now
        )
        self.later(_WRITES_S, self.folder.write, kept)
        self._start_round()

    def _merge(self, mine: Round) -> bool:
        """Merge the round `mine` and a partner's weights. Return True if the volunteer takes the others' weights
        instead."""
        round = self.progress.round
        others = {info.peer: info.round for info in self.membership.volunteers() if info.round}
        if len(others) == 1:  # as `OtherPeers.left_behind`
            others = {peer: min(told, self._merged[peer]) for peer, told in others.items() if peer in self._merged}
        behind = left_behind(round, others.values(), RUN.merge.max_staleness_rounds)
        replaced = self.exchange._catch_up(round, behind) if behind else None
        if replaced is not None:
            self._adopt(replaced)
            return True
        self.behind = dataclasses.replace(self.behind, rounds=self.behind.rounds | {mine})
        partners = [one for one in self.neighbours() if isinstance(one, SearchedVolunteer) and one.offered is not None]
        partners = [one for one in partners if self.membership.state(one.me) is PeerState.LIVE]
        if partners:
            partner = self.world.rng.choice(partners)
            assert partner.offered is not None
            if self.progress.round - partner.offered[0].round <= RUN.merge.max_staleness_rounds:
                self.accounting.receive(partner.me, partner.own_tokens)
                self.behind = self.behind.with_weights_of(partner.offered[1])
                self._merged[partner.me] = partner.offered[0].round
        return False

    # ------------------------------------------------------------- leaving

    def leave(self) -> None:
        """Leave as after Ctrl-C, between two steps. What was trained since the last merge is lost."""
        if self.away:
            self.kill()
            return
        self.leaves, self.asked_s = True, self.world.clock.now
        self.later(0.1, self.hand_over)

    def hand_over(self) -> None:
        """Hand over as `peer.lifecycle.departure.hand_over` does. A process that answers nobody counts as gone."""
        self._tell_progress()
        self.fellows = FellowDepartures(self.me)
        self._ask_to_leave(self.world.clock.now + departure._IDLE_S)

    def _ask_to_leave(self, idle_s: float) -> None:
        now, fellows = self.world.clock.now, self.fellows
        assert fellows is not None
        answers = [self._asks(info.peer) for info in self.membership.live() if info.is_bootstrap]
        if all(answer is None for answer in answers):
            for info in self.membership.volunteers():
                self.greet(info.peer)
            answering = [info.peer for info in self.membership.answering()]
            fellows.told = {peer for peer in answering if self._asks(peer)}
        leave = before_leaving(self.membership, answers, self.info.round, now - self.asked_s, fellows.leaving)
        fellows.is_going = leave is Leave.GO
        if leave is Leave.WAIT:
            self.later(_ASKS_S, self._ask_to_leave, now + departure._IDLE_S)
        elif leave is Leave.HAND_OVER and now <= idle_s:
            self.later(_ASKS_S, self._ask_to_leave, idle_s)
        else:
            if leave is Leave.HAND_OVER or (
                leave is Leave.GO_UNARCHIVED and self.membership.state(identity_of("b").peer_id) is PeerState.LEFT
            ):
                self.world.left_untaken.add(self.me)  # the bootstrap is to blame, or nobody
            self.world.left(self)
            self.end()

    def _asks(self, asked: str) -> bool | None:
        there, now = self.world.by_id(asked), self.world.clock.now
        if there not in self.neighbours():
            return None
        if not isinstance(there, Bootstrap):
            return (
                isinstance(there, SearchedVolunteer) and there.fellows is not None and there.fellows.ask(self.me, now)
            )
        self.info = dataclasses.replace(self.info, stamp=max(now, self.info.stamp + 1e-6))
        there.membership.saw_presence(self.info, now + RUN.network.presence_ttl_s, now)
        return there.leavers is not None and there.leavers.ask(self.me, now)


class LivesLiar(SearchedVolunteer):
    """Volunteer that claims from the start to have trained for weeks, in its progress record and with its state."""

    def own_to_tell(self, durable_tokens: int) -> int:
        """Return a false count."""
        return durable_tokens + LIE_TOKENS

    def set_state(self) -> None:
        """Offer a state with false counts."""
        super().set_state()
        counts = dict(self.progress.peer_tokens)
        counts[self.me] = counts.get(self.me, 0) + LIE_TOKENS
        told = dataclasses.replace(self.progress, run_tokens=sum(counts.values()), peer_tokens=counts)
        self.offered = told, self.behind


# ---------------------------------------------------------------- the bootstrap


class _Watch(ArchiveSchedule):
    """Archive schedule by the world's clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def refuse(self, now: float) -> bool:
        """Return whether to refuse such a state now, by the simulated clock. See `ArchiveSchedule`."""
        return super().refuse(self.clock.now)


class Bootstrap(Process):
    """Simulated bootstrap: it archives."""

    is_bootstrap = True

    def __init__(self, world: LivesWorld, folder: Folder, address: int, invite: Mapping[str, int]) -> None:
        super().__init__(world, folder, address, invite)
        self.leavers: DepartureQueue | None = DepartureQueue(self.membership)
        self._next_s, self._counts_kept_s = -math.inf, -math.inf
        extras: dict[str, Callable[[], Any]] = {}
        self.manager = SimpleNamespace(
            extras=extras,
            extra=lambda: {name: give() for name, give in extras.items()},
            restore_counts=self._restore_counts,
            offer=self._offer_archived,
        )
        manager: Any = self.manager
        self.archive = Archive(self.swarm, manager, watch=_Watch(world.clock))
        self.later(_STARTS_S, self._begin)

    def _begin(self) -> None:
        kept = self.folder.checkpoints[-1] if self.folder.checkpoints else None
        if kept is not None:
            self.restore(kept)
        self.archive.restore(kept)  # type: ignore[arg-type]
        self.world.begun(self)
        self.enter()
        self.keep_looking()
        self.later(LOOK_EVERY_S, self._look)

    def _restore_counts(self) -> None:
        if self.folder.counts is not None:
            self.accounting.restore(*self.folder.counts)

    def count_once_more(self) -> None:
        """Count the others' tokens once more, because the bootstrap is asked to leave."""
        self.world.run(self.accounting.read_all())
        self.keep_counts()

    def keep_counts(self) -> None:
        """Keep the counts beside the archives."""
        self.folder.counts = self.accounting.kept(), self.world.clock.now

    async def _offer_archived(self, kept: Any) -> None:
        self.offered = kept.progress, self.behind
        self.accounting.learn(kept.progress.peer_tokens)

    def _ask_how_far(self) -> None:
        now = self.world.clock.now
        for info in self.membership.volunteers():
            self.greet(info.peer)
        if now >= self._counts_kept_s + COUNTS_EVERY_S:
            self._counts_kept_s = now
            self.keep_counts()
            self._serve_counts()

    def _serve_counts(self) -> None:
        if self.folder.checkpoints:
            self.world.run(self.archive.serve_counts(ONE, self.progress))

    def _look(self) -> None:
        """Check whether to archive, as `_archive_until_the_end` does."""
        self._ask_how_far()
        now, volunteers = self.world.clock.now, self.membership.volunteers()
        waiting = () if self.leavers is None else self.leavers.waiting(now)
        if self._is_new(volunteers) and (bool(waiting) or now >= self._next_s):
            self.later(_PULLS_S, self._archive, waiting)
            return
        self._taken(waiting, archived=False)

    def _is_new(self, infos: Sequence[PeerInfo]) -> bool:
        """Return whether one of these peers may have work that the archive lacks."""
        return self.archive.watch.is_new(infos)

    def _archive(self, waiting: tuple[str, ...]) -> None:
        volunteers = self.membership.volunteers()
        sample = self.world.rng.sample([info.peer for info in volunteers], min(ARCHIVED, len(volunteers)))
        archived = self._take(volunteers, sample)
        if archived:
            self._next_s = self.world.clock.now + RUN.network.archive_every_s
        elif self.archive.watch.refused_s is not None:
            self._next_s = self.world.clock.now + bootstrap._REFUSED_AGAIN_S
        self._taken(waiting, archived=archived)

    def _taken(self, waiting: tuple[str, ...], *, archived: bool) -> None:
        now, is_new = self.world.clock.now, self._is_new(self.membership.volunteers())
        if self.leavers is not None and waiting and (archived or not is_new):
            self.leavers.taken(waiting, now)
        self.later(LOOK_EVERY_S, self._look)

    def _take(self, volunteers: Sequence[PeerInfo], peers: Sequence[str]) -> bool:
        self.archive.asks(volunteers)
        present = self.world.run(fetch_consensus_state(self.swarm, peers, "archive", 0, self.archive.is_wanted))
        if present is None:
            return False
        kept, behind = self.archive.kept_of(present), self.pulled_behind()
        self.progress, self.behind = present.progress, behind
        self.folder.write(
            DiskCheckpoint(self.progress, behind, self.accounting.kept(), at_s=self.world.clock.now, extra=kept.extra)
        )
        self.set_state()
        self.world.archived(self)
        return True

    def leave(self) -> None:
        """Leave as after Ctrl-C, with one last archive."""
        self.count_once_more()
        volunteers = sorted(self.membership.volunteers(), key=lambda info: -info.run_tokens)
        if volunteers:
            self._take(self.membership.volunteers(), [info.peer for info in volunteers[:LAST_SAMPLE]])
        self.end()


# ---------------------------------------------------------------- the world


class LivesWorld:
    """All processes, their folders, and the record of what happened."""

    def __init__(self, seed: int, run_file: RunFile = RUN) -> None:
        self.run_file = run_file
        self.clock, self.rng, self._loop = Clock(), random.Random(f"lives {seed}"), _Loop()
        self.clock.most_events = 100_000
        self.processes: dict[str, Process] = {}
        """Processes by their key. Only one process at a time uses a folder."""
        self.board: dict[str, tuple[PeerInfo, int]] = {}
        """Presences in the DHT, each with the part of the network that it is stored in."""
        self.told: dict[str, dict[int, frozenset[Round]]] = {}
        """Advertised progress: peer -> tokens -> its own rounds that were on its disk at that time."""
        self.left_untaken: set[str] = set()
        self.pulled: list[Any] = []
        self._num_groups = 0
        self._rounds: dict[str, int] = {}

    def close(self) -> None:
        """Close the world and its loop."""
        self._loop.close()

    # ------------------------------------------------------------- the network

    def new_group(self) -> int:
        """Return a new part of the network, for a process that has not met any other yet."""
        self._num_groups += 1
        return self._num_groups

    def join_groups(self, one: Process, other: Process) -> None:
        """Join two parts of the network that have met: all of both know each other."""
        new, old = one.group, other.group
        for process in self.processes.values():
            if process.group == old:
                process.group = new
        self.board = {peer: (info, new if group == old else group) for peer, (info, group) in self.board.items()}

    def living(self) -> list[Process]:
        """Return the processes that run or are frozen."""
        return [process for process in self.processes.values() if process.alive]

    def by_id(self, peer: str) -> Process:
        """Return the process with that PeerID."""
        return next(process for process in self.processes.values() if process.me == peer)

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine of the network now."""
        return self._loop.run_until_complete(work)

    def submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run a coroutine now, for callers that expect a network thread."""
        future: Future[_T] = Future()
        future.set_result(self.run(work))
        return future

    def refused(self, peer: str, rule: str, detail: str) -> None:
        """Hook, called when a peer is accused."""

    # ------------------------------------------------------------- what happened

    def next_round(self, peer: str) -> int:
        """Return the number of a peer's round, over all its incarnations."""
        self._rounds[peer] = self._rounds.get(peer, 0) + 1
        return self._rounds[peer]

    def trains(self, volunteer: SearchedVolunteer) -> None:
        """Hook, called when a round begins."""

    def first_round(self, volunteer: SearchedVolunteer) -> None:
        """Hook, called when the first of its rounds begins."""

    def trained(self, volunteer: SearchedVolunteer, before_tokens: int) -> None:
        """Hook, called after a round. Before it, `before_tokens` tokens of the volunteer were counted."""

    def archived(self, bootstrap: Bootstrap) -> None:
        """Hook, called after an archive was written."""

    def begun(self, bootstrap: Bootstrap) -> None:
        """Hook, called when a bootstrap has read its folder."""

    def left(self, volunteer: SearchedVolunteer) -> None:
        """Hook, called when a volunteer leaves because it is allowed to."""
