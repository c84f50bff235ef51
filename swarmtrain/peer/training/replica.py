"""A peer's replica of what a run trains: outer states, the rounds of its fragments, and the counters.

Here a publication is made and a merge takes effect. When either is due, the session says: nothing here knows a
network, a clock, a model's forward or its optimizer.
"""

from __future__ import annotations

import torch

from swarmtrain.algorithm.fragments import Fragment, FragmentedState, fragments_of
from swarmtrain.algorithm.gossip import layout_of
from swarmtrain.algorithm.outer import OuterConstants, OuterState, momentum_at
from swarmtrain.peer.merging.updates import LentWeights, LocalUpdate, OuterUpdate, Replaced
from swarmtrain.peer.training.parameters import ParameterSource
from swarmtrain.protocol.gossip.fragments import FragmentRounds
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import MergeSection

__all__ = ["Replica"]


class Replica:
    """The outer state of each fragment as of its last merge, and what was trained since, in `parameters`.

    `progress` and `own_tokens` are replaced as a whole, so that other threads may read them.
    """

    def __init__(self, merge: MergeSection, parameters: ParameterSource) -> None:
        """It begins with the values that the parameters have."""
        self._merge, self.parameters = merge, parameters
        self.fragments: tuple[Fragment, ...] = fragments_of(layout_of(parameters.shapes), merge.num_fragments)
        """Of the model; one but with gossip."""
        self.rounds = FragmentRounds(len(self.fragments))
        """How far each fragment's is."""
        self.progress = Progress()
        self.own_tokens = 0
        """All that this peer has trained on in rounds that have ended."""
        self.is_entered = False
        """Whether the parameters have the values that a round begins with."""
        theta = parameters.read()
        self.state = OuterState(theta, torch.zeros_like(theta))

    @property
    def state(self) -> OuterState:
        """Of the whole model, each fragment's as of its last merge; where there are several it follows the next."""
        return self._states[0] if len(self._states) == 1 else FragmentedState(self.fragments, self._states)

    @state.setter
    def state(self, state: OuterState) -> None:
        theta, momentum = state.theta, state.momentum
        self.is_entered = False
        self._states = [OuterState(one.of(theta), one.of(momentum)) for one in self.fragments]
        self.rounds.restart()

    @property
    def states(self) -> list[OuterState]:
        """Of each fragment, (Q,), as of its last merge; not to be written into."""
        return self._states

    def state_of(self, fragment: int) -> OuterState:
        """Of one fragment, (Q,), as of its last merge."""
        return self._states[fragment]

    def restart(self) -> None:
        """Give up what was trained since each fragment's merge, as a kill does."""
        self.is_entered = False
        self.rounds.restart()

    def begin(self, num_parts: int) -> None:
        """A round of so many parts begins, in the parameters too."""
        self.rounds.begin(self.progress.round, num_parts)
        if not self.is_entered:
            self.parameters.write(self.state.theta)
            self.is_entered = True

    def contribution(self, part: int, inner_steps: int, tokens: int) -> LocalUpdate:
        """What `inner_steps` of this round have brought, with publication `part`."""
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
            reached=None if lent else self.parameters.read(),
            tokens=tokens,
            inner_steps=inner_steps,
            own_tokens=self.own_tokens + tokens,
            base=self.progress.roster_sha256,
            lent=lent,
            values=self.parameters.values(),
        )

    def merge(self, arrived: OuterUpdate, own: LocalUpdate, fragment: int) -> None:
        """The outer step of a fragment, and with the last one the counters that follow from what arrived."""
        merge = self._merge
        constants = OuterConstants(
            learning_rate=merge.outer_learning_rate,
            momentum=momentum_at(self.progress.round, merge.outer_momentum, merge.momentum_ramp_rounds),
        )
        state = self.state if arrived.is_whole else self._states[fragment]
        state = arrived.next_state(state, own, fragment, constants, merge.robust)
        if arrived.is_whole:
            self.state = state
        else:
            self._states[fragment] = state
            self.rounds.merged(fragment, own.part, own.tokens, own.inner_steps)
            self.parameters.write(state.theta, self.fragments[fragment])
            self.parameters.write_values(arrived.values)
            self.is_entered = True
        if fragment == len(self.fragments) - 1:
            self.progress = arrived.next_progress(self.progress)

    def adopt(self, replaced: Replaced) -> None:
        """Go on from another peer's state."""
        self.state, self.progress = replaced.state, replaced.progress

    def resume(self, state: OuterState, progress: Progress, own_tokens: int) -> None:
        """Go on where a checkpoint was taken."""
        self.state, self.progress, self.own_tokens = state, progress, own_tokens

    def count_on(self, own_tokens: int) -> None:
        """Others count so many of this peer: it counts on from there, or what it trains with an old folder that was put
        back would count for nothing until it has caught up with itself."""
        self.own_tokens = max(self.own_tokens, own_tokens)
