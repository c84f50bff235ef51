"""Replica of what a run trains, as one peer holds it: the fragments' outer states and rounds, and the token counters.

Publications are made here and merges take effect here; the session decides when. This module knows no network, no
clock, no forward pass and no optimizer, so the simulator with tensors uses it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swarmtrain.algorithm.fragments import Fragment, FragmentedState, fragments_of
from swarmtrain.algorithm.gossip import layout_of
from swarmtrain.algorithm.outer import OuterConstants, OuterState, momentum_at
from swarmtrain.peer.merging.updates import LentWeights, LocalUpdate, OuterUpdate, Replaced
from swarmtrain.peer.training.parameters import ParameterSource
from swarmtrain.protocol.gossip.fragments import FragmentRounds
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import MergeSection


@dataclass(frozen=True, kw_only=True)
class MergedFragment:
    """Result of a merge that the replica does not have yet: see `Replica.merged` and `Replica.enter`."""

    own: LocalUpdate
    arrived: OuterUpdate
    fragment: int
    state: OuterState
    """State (Q,) of the fragment, or of the whole model if `arrived` is of it."""
    change: Tensor | None
    """What is added to the parameters if steps were taken since `own`; see `ParameterSource.change_to`."""


class Replica:
    """Outer state of each fragment after its last merge; `parameters` hold what was trained since.

    The trainer's thread makes all changes. `progress` and `own_tokens` are replaced as a whole, so that other threads
    may read them. Another thread may compute a merge (`merged`) while the trainer takes steps and changes nothing here.
    """

    def __init__(self, merge: MergeSection, parameters: ParameterSource) -> None:
        """Start from the values that the parameters have now."""
        self._merge, self.parameters = merge, parameters
        # In synchronous rounds all groups of an adapter are one fragment: they are merged together.
        by_group = parameters.groups if merge.num_fragments > 1 else None
        self.fragments: tuple[Fragment, ...] = fragments_of(layout_of(parameters.shapes), merge.num_fragments, by_group)
        """Fragments of the model; a single one unless the method is gossip. Those of an adapter are its groups."""
        self._by_group = by_group is not None
        self._trained: frozenset[int] | None = None
        self.rounds = FragmentRounds(len(self.fragments))
        """Position of each fragment in its own round, which runs from one of its merges to the next."""
        self.progress = Progress()
        self.own_tokens = 0
        """Tokens that this peer has trained in rounds that have ended."""
        self.is_entered = False
        """True if the parameters hold the values that a round begins with."""
        theta = parameters.read()
        self.state = OuterState(theta, torch.zeros(merge.kind.num_moments * theta.numel()))

    @property
    def state(self) -> OuterState:
        """State of the whole model, each fragment as of its last merge. With several fragments it is a view of later
        merges too.
        """
        return self._states[0] if len(self._states) == 1 else FragmentedState(self.fragments, self._states)

    @state.setter
    def state(self, state: OuterState) -> None:
        theta, momentum = state.theta, state.momentum
        self.is_entered = False
        self._states = [OuterState(one.of(theta), one.of(momentum)) for one in self.fragments]
        self.rounds.restart()

    @property
    def states(self) -> list[OuterState]:
        """State (Q,) of each fragment after its last merge; read-only."""
        return self._states

    def state_of(self, fragment: int) -> OuterState:
        """Return the state (Q,) of one fragment after its last merge."""
        return self._states[fragment]

    def restart(self) -> None:
        """Discard what was trained since each fragment's last merge, as a kill does."""
        self.is_entered = False
        self.rounds.restart()

    def begin(self, num_parts: int, trained: frozenset[int] | None = None) -> None:
        """Begin a round of `num_parts` parts, and load the outer weights into the parameters if they are not there.

        Of an adapter the groups `trained` are trained in it; None: all.
        """
        self._trained = trained
        self.rounds.begin(self.progress.round, num_parts, trained if self._by_group else None)
        # A merge of one fragment has written its weights already; whole states are written here.
        if not self.is_entered:
            self.parameters.write(self.state.theta)
            self.is_entered = True

    def contribution(
        self, part: int, inner_steps: int, tokens: int, mean_gradient: Tensor | None = None
    ) -> LocalUpdate:
        """Return the update of the round so far, to be published as number `part`, after `inner_steps` steps.

        `mean_gradient` (P,) is given if the steps left the weights as they are.
        """
        update = self._contribution(part, inner_steps, tokens)
        if mean_gradient is not None:
            return replace(update, mean_gradient=mean_gradient)
        return update if update.lent else replace(update, reached=self.parameters.read())

    def contribution_soon(
        self, part: int, inner_steps: int, tokens: int, mean_gradient: Tensor | None = None
    ) -> Callable[[], LocalUpdate]:
        """Return a function that any thread may call and that returns what `contribution` would now.

        It waits for a device that has not copied the weights yet; `contribution_soon` does not.
        """
        update = self._contribution(part, inner_steps, tokens)
        if update.lent or mean_gradient is not None:
            update = replace(update, mean_gradient=mean_gradient)
            return lambda: update
        read = self.parameters.read_soon()
        return lambda: replace(update, reached=read())

    def _contribution(self, part: int, inner_steps: int, tokens: int) -> LocalUpdate:
        """Return the update of the round so far; if the method does not lend weights, without those reached."""
        thetas, lent = [state.theta for state in self._states], tuple[LentWeights, ...]()
        self.parameters.take_back()
        if self._merge.kind.lends_weights:
            pairs = zip(self.fragments, thetas, strict=True)
            lent = tuple(self.parameters.lend(fragment, theta) for fragment, theta in pairs)
        return LocalUpdate(
            round=self.progress.round,
            part=part,
            thetas=() if lent else tuple(thetas),
            fragment_rounds=self.rounds.at(part, tokens, inner_steps),
            reached=None,
            tokens=tokens,
            inner_steps=inner_steps,
            own_tokens=self.own_tokens + tokens,
            base=self.progress.roster_sha256,
            lent=lent,
            values=self.parameters.values(),
            trained=self._trained,
        )

    def merge(self, arrived: OuterUpdate, own: LocalUpdate, fragment: int) -> None:
        """Apply the outer step to a fragment. With the last fragment, advance the counters by what arrived."""
        self.enter(self.merged(arrived, own, fragment))

    def merged(self, arrived: OuterUpdate, own: LocalUpdate, fragment: int) -> MergedFragment:
        """Compute the outer step of a fragment without applying it. Any thread may call this; see the class."""
        merge = self._merge
        constants = OuterConstants(
            learning_rate=merge.outer_learning_rate,
            momentum=momentum_at(self.progress.round, merge.outer_momentum, merge.momentum_ramp_rounds),
        )
        state = self.state if arrived.is_whole else self._states[fragment]
        state = arrived.next_state(state, own, fragment, constants, merge.robust)
        change = None
        if not arrived.is_whole or len(self.fragments) == 1:
            change = self.parameters.change_to(state.theta, self.fragments[fragment])
        return MergedFragment(own=own, arrived=arrived, fragment=fragment, state=state, change=change)

    def enter(self, merged: MergedFragment) -> None:
        """Apply an outer step that was computed: the state, the parameters and, with the last fragment, the counters.

        Steps that were taken since the publication stay in the parameters, if these are on a device.
        """
        arrived, own, fragment = merged.arrived, merged.own, merged.fragment
        if arrived.is_whole:
            self.state = merged.state
        else:
            self._states[fragment] = merged.state
            self.rounds.merged(fragment, own.part, own.tokens, own.inner_steps)
        # Without a change the weights of a whole model are written when the next round begins.
        if not arrived.is_whole or merged.change is not None:
            self.parameters.write_change(merged.state.theta, self.fragments[fragment], merged.change)
            self.parameters.write_values(arrived.values)
            self.is_entered = True
        if fragment == len(self.fragments) - 1:
            self.progress = arrived.next_progress(self.progress)

    def adopt(self, replaced: Replaced) -> None:
        """Replace state and counters by those of another peer."""
        self.state, self.progress = replaced.state, replaced.progress

    def resume(self, state: OuterState, progress: Progress, own_tokens: int) -> None:
        """Continue from a checkpoint."""
        self.state, self.progress, self.own_tokens = state, progress, own_tokens

    def count_on(self, own_tokens: int) -> None:
        """Raise this peer's own token count to `own_tokens`, the count that others have of this peer.

        With an old folder that was put back, newly trained tokens would otherwise count for nothing until the count has
        caught up with the one that others hold.
        """
        self.own_tokens = max(self.own_tokens, own_tokens)
