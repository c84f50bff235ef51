"""The model of a simulated volunteer that gossips, one number per fragment: how it trains, publishes and merges.

An inner step moves a number by `inner_rate` of the way to the volunteer's own `target`. The merge is the one of
`algorithm/gossip.py` with a single weight. Publications are made when somebody asks for them, as in the product.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from swarmtrain.protocol.adapter_groups import trained_groups
from swarmtrain.protocol.gossip.fragments import FragmentRounds, merged_step, published
from swarmtrain.protocol.gossip.messages import ReceivedPublication
from swarmtrain.protocol.gossip.partners import PublicationVersion
from swarmtrain.protocol.tokens.shards import Coverage
from swarmtrain.simulate.systems.publications import (
    GRADIENT,
    WEIGHTS,
    ConsensusSnapshot,
    Entered,
    SimulatedCheckpoint,
    SimulatedGossipSettings,
    SimulatedPublication,
)


class Value(NamedTuple):
    """Part of a publication that can enter a merge: a weight, or the new part of a pseudo-gradient with its tokens."""

    value: float
    tokens: int


class FragmentSchedule(NamedTuple):
    """Inner steps of a round after which fragments are merged and parts are published."""

    merge_after: tuple[int, ...]
    steps: tuple[int, ...]
    parts: tuple[int, ...]

    def passed(self, steps_done: int) -> tuple[int, int] | None:
        """Return (inner steps, part) of the last publication after `steps_done` steps; None before the first."""
        passed = bisect_right(self.steps, steps_done)
        return (self.steps[passed - 1], self.parts[passed - 1]) if passed else None


@lru_cache(maxsize=4096)
def schedule_of(inner_steps: int, num_parts: int, num_fragments: int, every: int) -> FragmentSchedule:
    """Return the schedule that the product's trainer has."""
    fragments = range(num_fragments)
    merge_after = tuple(merged_step(one, num_fragments, inner_steps, num_parts) for one in fragments)
    parts = published(inner_steps, num_parts, num_fragments, every)
    return FragmentSchedule(merge_after, tuple(parts), tuple(parts.values()))


@dataclass(slots=True)
class _Fragment:
    """One fragment of the model: a number."""

    theta: float
    momentum: float = 0.0
    weights: list[SimulatedPublication] = field(default_factory=list)
    """Weights at the starts of the fragment's last two rounds, as published."""
    published: list[SimulatedPublication] = field(default_factory=list)
    """Last two pseudo-gradients that a peer asked for."""
    told_steps: int = 0
    """Inner steps of the round that are in the newest pseudo-gradient in `published`."""


class GossipModel:
    """Numbers of one peer's model, what is published of them, and what has entered them."""

    def __init__(self, name: str, settings: SimulatedGossipSettings, theta: float) -> None:
        self._name, self._settings, self.target = name, settings, theta
        self.fragments = [_Fragment(theta) for _ in range(settings.num_fragments)]
        self.schedule = schedule_of(settings.inner_steps, settings.num_parts, settings.num_fragments, 1)
        """Schedule of this round."""
        self._rounds = FragmentRounds(settings.num_fragments)
        self.entered: list[Entered] = []
        """Inner steps of others that were merged, by publication; empty unless `keeps_past`."""
        self.came: list[Entered] = []
        """Inner steps that were in the weights taken from others, and those of this peer."""

    @property
    def theta(self) -> float:
        """Mean of the fragments' weights."""
        return sum(one.theta for one in self.fragments) / len(self.fragments)

    @property
    def told_steps(self) -> int:
        """Inner steps of this round that are in publications which a peer asked for; mean over the fragments."""
        return round(statistics.mean(one.told_steps for one in self.fragments))

    def _gradient(self, fragment: _Fragment, steps: int) -> float:
        """Return theta less the weight after `steps` inner steps."""
        return (fragment.theta - self.target) * (1.0 - (1.0 - self._settings.inner_rate) ** steps)

    # ------------------------------------------------------------------ rounds

    def restart(self) -> None:
        """Record that all weights were replaced, so that nothing was trained since."""
        self._rounds.restart()

    def begin_round(self, round: int, schedule: FragmentSchedule, *, all_begin: bool) -> None:
        """Begin the peer's round, and with it the last fragment's round, or every fragment's if `all_begin`.

        A fragment whose round begins publishes its weights.
        """
        self.schedule, last = schedule, len(self.fragments) - 1
        s = self._settings
        trained = trained_groups(self._name, round, s.num_fragments, s.adapter_groups) if s.adapter_groups else None
        self._rounds.begin(round, s.num_parts, trained)
        for number, fragment in enumerate(self.fragments):
            fragment.told_steps = 0
            if all_begin or number == last:
                self.publish_weights(number, round)

    def merge(self, number: int, pulled: Sequence[ReceivedPublication[SimulatedPublication, Value]]) -> None:
        """Merge a fragment: mean of the weights, token-weighted mean of the pseudo-gradients, one Nesterov step.

        A fragment that nobody trained stays.
        """
        s, schedule, fragment = self._settings, self.schedule, self.fragments[number]
        steps = schedule.merge_after[number]
        part = schedule.parts[schedule.steps.index(steps)]
        own = self._rounds.of(number, part, steps * s.tokens_per_step, steps)
        weight, thetas = self._gradient(fragment, own.inner_steps) * own.tokens, [fragment.theta]
        tokens = own.tokens
        for one in pulled:
            value, new_tokens = one.payload
            if one.group == WEIGHTS:
                thetas.append(value)
                continue
            weight, tokens = weight + value * new_tokens, tokens + new_tokens
            if s.keeps_past:
                until = one.version.tokens
                self.entered.append(Entered(self._name, one.peer, number, one.version.round, until - new_tokens, until))
        if s.keeps_past:
            self.came.append(Entered(self._name, self._name, number, own.round, 0, own.tokens))
        if tokens:
            mean = weight / tokens
            fragment.momentum = s.outer_momentum * fragment.momentum + mean
            step = s.outer_learning_rate * (mean + s.outer_momentum * fragment.momentum)
            fragment.theta = sum(thetas) / len(thetas) - step
        self._rounds.merged(number, part, steps * s.tokens_per_step, steps)

    # ------------------------------------------------------------------ publications

    def publish_weights(self, number: int, round: int) -> None:
        """Begin a fragment's round by publishing its weights."""
        fragment = self.fragments[number]
        newest = SimulatedPublication(
            WEIGHTS, self._name, PublicationVersion(round, 0, 0), fragment.theta, 0.0, fragment=number
        )
        fragment.weights = [*fragment.weights[-1:], newest]

    def weights(self, number: int) -> SimulatedPublication | None:
        """Return a fragment's newest published weights."""
        weights = self.fragments[number].weights
        return weights[-1] if weights else None

    def publish(self, number: int, steps_done: int, coverage: Coverage | None) -> SimulatedPublication | None:
        """Return a fragment's newest pseudo-gradient. It is made now if that is due."""
        fragment = self.fragments[number]
        newest = fragment.published[-1] if fragment.published else None
        if (passed := self.schedule.passed(steps_done)) is not None:
            done, part = passed
            of = self._rounds.of(number, part, done * self._settings.tokens_per_step, done)
            version = PublicationVersion(of.round, of.part, of.tokens)
            if not of.tokens and newest is not None and newest.version.round < of.round - 1:
                fragment.published, newest = [], None
            if of.tokens and (newest is None or newest.version != version):
                rows = () if coverage is None else tuple(coverage.rows_to_send())
                gradient = self._gradient(fragment, of.inner_steps)
                newest = SimulatedPublication(GRADIENT, self._name, version, fragment.theta, gradient, rows, number)
                fragment.published, fragment.told_steps = [*fragment.published[-1:], newest], done
        return newest

    def has(self, publication: SimulatedPublication) -> bool:
        """Return whether the publication is one of the last two of its kind."""
        fragment = self.fragments[publication.fragment]
        return publication in (fragment.published if publication.version.part else fragment.weights)

    # ------------------------------------------------------------------ states and checkpoints

    @property
    def thetas(self) -> list[float]:
        """Weights by fragment."""
        return [one.theta for one in self.fragments]

    @property
    def momenta(self) -> list[float]:
        """Momenta by fragment."""
        return [one.momentum for one in self.fragments]

    def take(self, state: ConsensusSnapshot) -> None:
        """Replace the weights by another peer's."""
        self._put(state)
        self.entered, self.came = [], list(state.entered)

    def resume(self, saved: SimulatedCheckpoint) -> None:
        """Restore a checkpoint. What was merged later is gone with the weights it entered."""
        self._put(saved)
        self.entered, self.came = list(saved.entered), list(saved.came)

    def _put(self, of: ConsensusSnapshot | SimulatedCheckpoint) -> None:
        for fragment, theta, momentum in zip(self.fragments, of.thetas, of.momenta, strict=True):
            fragment.theta, fragment.momentum = theta, momentum
