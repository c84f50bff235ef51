"""Volunteers of simulated gossip that crash or leave, come back, join late, or fall behind.

When a volunteer goes in the middle of a round, the publications that another has taken count, and the rest of its work
is lost. A volunteer that comes takes the others' present weights as a real one does (`peer.merging.gossip_exchange`):
their consensus, with momentum. If its own weights are not far behind, it continues with them, as from a checkpoint.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from swarmtrain.algorithm.gossip import Layout
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.network.asynchronous.state_fetcher import MOMENTA
from swarmtrain.peer.merging.consensus import SAMPLE, consensus_of_vectors, not_far_behind, round_of
from swarmtrain.peer.training.replica import Replica
from swarmtrain.peer.training.session import Start
from swarmtrain.protocol.gossip.engine import GossipEngine
from swarmtrain.protocol.gossip.messages import ConsensusTaken
from swarmtrain.protocol.gossip.partners import is_too_old
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.protocol.tokens.shards import Coverage, CoverageRow
from swarmtrain.simulate.clock import Clock
from swarmtrain.simulate.learning.fragment import LearningFragment
from swarmtrain.simulate.learning.learner import Learner
from swarmtrain.simulate.learning.setting import Setting
from swarmtrain.simulate.learning.wire import Wire

_BYTES = 4  # of a number, as states travel


class Company(Protocol):
    """Simulated swarm, as a volunteer that leaves or joins sees it."""

    setting: Setting
    clock: Clock
    wire: Wire
    layout: Layout
    tokens: int
    inner_steps: int
    tokens_lost: int
    num_told: int

    @property
    def peers(self) -> Sequence[Comer]:
        """All volunteers, by number."""

    @property
    def live(self) -> Sequence[Comer]:
        """Volunteers that the others believe to be present."""

    @property
    def honest(self) -> Sequence[Comer]:
        """Volunteers that are not hostile: their weights are the swarm's."""

    def is_hanging(self, name: str) -> bool:
        """Return whether this peer hangs now."""

    def count(self, number: int, tokens: int, inner_steps: int) -> None:
        """Count what volunteer `number` trained; negative numbers take back what was counted."""


class DrivesGossip(Protocol):
    """Runner of one volunteer's gossip engine."""

    engine: GossipEngine[Any, Any, Any]

    def tell(self, event: ConsensusTaken) -> object:
        """Report that the volunteer takes others' weights now."""


class Comer(Protocol):
    """Volunteer that can leave and come back."""

    number: int
    name: str
    learner: Learner
    trainer: Replica
    fragments: list[LearningFragment]
    rng: random.Random
    coverage: Coverage | None
    start: Start
    done: int
    is_here: bool
    is_over: bool
    num_lives: int
    began_s: float
    step_share: float

    @property
    def step_tokens(self) -> int:
        """Tokens of each inner step of its round."""

    @property
    def world(self) -> Company:
        """The other volunteers, and the clock."""

    @property
    def gossip(self) -> DrivesGossip:
        """Runner of this volunteer's gossip engine since it last came."""

    @property
    def round(self) -> int:
        """Round that the volunteer is in, or begins."""

    def begin(self) -> None:
        """Begin a round."""

    def begin_or_end(self) -> None:
        """Begin the next round, or end if the run has had its tokens."""

    def forget(self) -> None:
        """Forget everything that a process holds in memory and no checkpoint keeps."""

    def call_at(self, when_s: float, call: Callable[..., None], *args: Any) -> object:
        """Schedule a call on the world's clock; it is dropped if the volunteer has gone by then."""

    def receive_rows(self, name: str, rows: Sequence[CoverageRow]) -> None:
        """Merge the rows of another volunteer that say which data were seen."""


@dataclass(frozen=True)
class _Taken:
    """Consensus of the other volunteers, and the event that reports it to the gossip engine."""

    state: OuterState
    event: ConsensusTaken


def schedule(world: Company) -> None:
    """Schedule all arrivals and departures. Call it before the first volunteer begins."""
    for each in world.setting.away:
        peer = world.peers[each.peer]
        if each.at_s > 0:
            world.clock.call_at(each.at_s, _go, peer)
        else:
            _go(peer)
        world.clock.call_at(each.at_s + each.for_s, _come, peer)


def _go(peer: Comer) -> None:
    world = peer.world
    if peer.is_over or world.tokens >= world.setting.total_tokens:
        return
    if peer in world.honest:
        _count(peer)
    peer.num_lives += 1
    world.num_told += 1
    peer.is_here, peer.began_s = False, math.inf
    peer.forget()


def _count(peer: Comer) -> None:
    """Reduce the swarm's counts to the part of the volunteer's round that another volunteer has merged; the rest of the
    round is lost."""
    world = peer.world
    step_tokens = peer.step_tokens
    done = world.setting.steps_between(peer.number, peer.began_s, world.clock.now, peer.step_share)
    trained = step_tokens * min(peer.start.inner_steps, done)
    published = step_tokens * peer.done
    taken = min(published, _taken(peer))
    world.count(peer.number, taken - published, -((published - taken) // step_tokens))
    world.tokens_lost += max(trained, published) - taken
    peer.done = 0


def _taken(peer: Comer) -> int:
    """Return the tokens of `peer`'s present round that other volunteers have merged or are about to merge.

    The result is, for each fragment, the most that any other volunteer has taken, averaged by the fragments' sizes and
    rounded down to whole steps.
    """
    sizes = [fragment.fragment.layout.size for fragment in peer.fragments]
    others = [other for other in peer.world.peers if other is not peer]
    taken = [max((_taken_of(peer, fragment, other) for other in others), default=0) for fragment in peer.fragments]
    mean = sum(each * size for each, size in zip(taken, sizes, strict=True)) / sum(sizes)
    step_tokens = peer.world.setting.run.tokens_per_step
    return int(mean // step_tokens) * step_tokens


def _taken_of(peer: Comer, fragment: LearningFragment, by: Comer) -> int:
    """Return the tokens of `peer`'s present round that volunteer `by` has merged, or is about to merge, into
    `fragment`."""
    engine = by.gossip.engine
    versions = [engine.merged_version(fragment.number, peer.name), engine.pulled_version(fragment.number, peer.name)]
    of_round = peer.trainer.rounds.of_round
    return max(
        (of_round(fragment.number, version.round, version.tokens) for version in versions if version is not None),
        default=0,
    )


def _come(peer: Comer) -> None:
    world = peer.world
    if peer.is_here or world.tokens >= world.setting.total_tokens:
        return
    world.num_told += 1
    peer.is_here, others = True, _answering(peer)
    is_old = is_too_old(peer.round, [other.round for other in others], world.setting.run.merge.max_staleness_rounds)
    if not others or (peer.learner.losses and not is_old):
        peer.begin()
        return
    _take_state(peer, others)


def takes_state(peer: Comer) -> bool:
    """Begin to fetch the others' weights at the end of a round, because this peer's publications are too old for them.

    Return False if nobody can give them.
    """
    if not (others := _answering(peer)):
        return False
    if peer in peer.world.honest:
        _count(peer)
    for fragment in peer.fragments:
        fragment.newest = fragment.weights = None
    _take_state(peer, others)
    return True


def _answering(peer: Comer) -> list[Comer]:
    """Return the other volunteers that can give `peer` a state."""
    world = peer.world
    others = [other for other in world.live if other is not peer and other.round > 0]
    return [other for other in others if not world.is_hanging(other.name)]


def _take_state(peer: Comer, others: list[Comer]) -> None:
    world = peer.world
    sample = peer.rng.sample(others, min(SAMPLE, len(others)))
    state, round = _present_state(world, sample)
    near = not_far_behind(sample, world.setting.run.merge.max_staleness_rounds)
    told = [other.gossip.engine.places(other.round - 1) for other in near]
    taken = _Taken(state, ConsensusTaken(max(round, peer.round), told, {other.name: other.round for other in near}))
    size_bytes = _BYTES * world.layout.size
    arrives_s = max(
        world.wire.arrives_s(
            world.clock.now, other.name, peer.name, size_bytes * (1 + (other in sample[:MOMENTA])), peer.rng
        )
        for other in sample
    )
    rows = {other.name: other.coverage.rows_to_send() for other in sample if other.coverage is not None}
    peer.call_at(arrives_s, _begin_with, peer, taken, rows)


def _present_state(world: Company, sample: list[Comer]) -> tuple[OuterState, int]:
    """Return (consensus of the sample's states, its round)."""
    near = not_far_behind(sample, world.setting.run.merge.max_staleness_rounds)
    states = [each.trainer.state for each in near]
    whole = sample[:MOMENTA]  # of the others only the weights are pulled
    momenta = {number: state.momentum for number, state in enumerate(states) if near[number] in whole}
    present = consensus_of_vectors([state.theta for state in states], momenta, world.layout)
    return present, round_of(near)


def _begin_with(peer: Comer, taken: _Taken, rows: Mapping[str, Sequence[CoverageRow]]) -> None:
    for name, told in rows.items():
        peer.receive_rows(name, told)
    peer.learner.comes_late()
    for fragment in peer.fragments:
        fragment.robustness.comes_back()
    peer.gossip.tell(taken.event)
    peer.trainer.state = taken.state
    peer.trainer.progress = Progress(round=taken.event.round, run_tokens=peer.world.tokens)
    peer.begin_or_end()
