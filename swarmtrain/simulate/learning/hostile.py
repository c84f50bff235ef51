"""Hostile volunteers in gossip: they train and merge as the others do, then spoil what they publish.

So their publications are as good as the others' before they are spoilt. `scenario.ATTACKS` says what each attack is.
What they train does not count: in every run the honest volunteers take the same number of inner steps by the same
schedule as without attackers, share all of the data among themselves, and the loss is that of their consensus.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swarmtrain.algorithm.robust import ClipIncident
from swarmtrain.protocol.gossip.partners import PublicationVersion
from swarmtrain.protocol.gossip.pulls import GroupName
from swarmtrain.simulate.learning.fragment import LearningFragment, Published
from swarmtrain.simulate.learning.gossip import LearningPeer, LearningWorld
from swarmtrain.simulate.learning.setting import RunOutcome, Setting

_HUGE = 1e30


class _Hostile(LearningPeer):
    """Volunteer that publishes something other than what it has trained."""

    gradients: tuple[Tensor, ...] = ()
    """Volunteer's own pseudo-gradients at the previous publication, by fragment."""
    copied: LearningPeer | None = None

    def begin(self) -> None:
        """Begin a round: schedule its publications, merges and end. See `LearningPeer`."""
        self.copied = random.Random(f"{self.name} {self.round}").choice(self.world.honest)
        super().begin()

    def begins(self, fragment: LearningFragment, round: int) -> None:
        """Begin a round of a fragment by publishing its weights. See `LearningPeer`."""
        fragment.begins(round, self.spoilt_weights(fragment.number, self.trainer.state_of(fragment.number).theta))

    def train_to(self, moment: int) -> None:
        """See `LearningPeer`. What it trains does not count."""
        world = self.world
        before, steps_before = world.tokens, world.inner_steps
        super().train_to(moment)
        world.count(self.number, before - world.tokens, steps_before - world.inner_steps)
        self.gradients = tuple(self.own.gradient_of(fragment.number) for fragment in self.fragments)
        for fragment in self.fragments:
            assert fragment.newest is not None
            fragment.newest = self.spoilt(fragment, fragment.newest)

    def serve(self, fragment: LearningFragment, group: GroupName, published: Published) -> None:
        """See `LearningPeer`. Values that no encoder makes are sent as they are, and no rows of seen data."""
        if bool(torch.isfinite(published.vector).all()):
            super().serve(fragment, group, published)
        else:
            published.sent = published.vector
        published.rows = ()

    def spoilt_weights(self, fragment: int, theta: Tensor) -> Tensor:
        """Return the vector to publish in place of the volunteer's weights."""
        attack = self.world.setting.hostile
        if attack.kind == "huge":
            return torch.full_like(theta, _HUGE)
        return theta + attack.factor * self.gradients[fragment] if attack.kind == "drag" and self.gradients else theta

    def spoilt(self, fragment: LearningFragment, honest: Published) -> Published:
        """Return the publication to make in place of the volunteer's pseudo-gradient."""
        g, version, attack = honest.vector, honest.version, self.world.setting.hostile
        if attack.kind == "tokens":  # the most that is not refused
            return dataclasses.replace(
                honest, version=PublicationVersion(version.round, version.part, self.most_tokens(version.part))
            )
        made: dict[str, Callable[[], Tensor]] = {
            "sign-flip": lambda: -attack.factor * g,
            "scaled": lambda: attack.factor * g,
            "noise": lambda: attack.factor * self.noise(fragment, honest),
            "little-is-enough": lambda: self.a_little(fragment, honest),
            "copycat": lambda: self.copy(fragment, honest),
            "huge": lambda: torch.full_like(g, _HUGE),
            "nan": lambda: torch.full_like(g, math.nan),
        }
        return dataclasses.replace(honest, vector=made.get(attack.kind, lambda: g)())

    def most_tokens(self, part: int) -> int:
        """Return the most tokens that a publication may claim without being refused."""
        # One more with each part: a part without a new token brings its reader nothing.
        return self.world.setting.run.max_round_tokens - self.start.num_parts + part

    def tells(self, part: int, tokens: int) -> None:
        """Announce the last part published and its tokens; with the attack "tokens", claim more. See `LearningPeer`."""
        lies = part and self.world.setting.hostile.kind == "tokens"
        super().tells(part, self.most_tokens(part) if lies else tokens)

    def noise(self, fragment: LearningFragment, honest: Published) -> Tensor:
        """Return random numbers with the same norm in each tensor."""
        version, like = honest.version, honest.vector
        key = f"{self.world.setting.run.run.seed} {self.number} {version.round} {version.part}"
        seed = random.Random(f"{key} {fragment.number}" if fragment.number else key).getrandbits(63)
        generator = torch.Generator().manual_seed(seed)
        made = torch.randn(like.shape, generator=generator)
        for place in fragment.fragment.layout.slices:
            made[place] *= like[place].norm() / made[place].norm()
        return made

    def a_little(self, fragment: LearningFragment, own: Published) -> Tensor:
        """Return the mean of the honest volunteers' newest pseudo-gradients less `factor` standard deviations.

        Number by number; anybody can pull those publications. Each is scaled as if it had as many tokens as the own
        one.
        """
        newest = [peer.fragments[fragment.number].newest for peer in self.world.honest]
        known = [each for each in newest if each is not None]
        if len(known) < 2:
            return own.vector
        vectors = torch.stack([one.vector * (own.version.tokens / one.version.tokens) for one in known])
        return vectors.mean(0) - self.world.setting.hostile.factor * vectors.std(0)

    def copy(self, fragment: LearningFragment, own: Published) -> Tensor:
        """Return the newest pseudo-gradient of an honest volunteer (a different one in each round), scaled to the
        tokens of the own one."""
        assert self.copied is not None
        theirs = self.copied.fragments[fragment.number].newest
        return own.vector if theirs is None else theirs.vector * (own.version.tokens / theirs.version.tokens)


@dataclass
class HostileWorld(LearningWorld):
    """World that counts which volunteers a rule named."""

    named: Counter[bool] = field(default_factory=Counter)
    """Number of incidents, by whether the named volunteer is hostile."""

    def peer(self, number: int) -> LearningPeer:
        """Return a new volunteer. See `LearningWorld`."""
        return _Hostile(self, number) if number >= self.setting.num_honest else LearningPeer(self, number)

    def told(self, peer: str, incident: ClipIncident) -> None:
        """Hook, called when a publication of `peer` was cut or refused. See `LearningWorld`."""
        self.named[self.by_name[peer].number >= self.setting.num_honest] += 1

    def finished(self, peer: LearningPeer) -> None:
        """Note that the last round of `peer` is over. See `LearningWorld`."""
        if peer.number < self.setting.num_honest:
            super().finished(peer)

    def outcome(self) -> RunOutcome:
        """Return the results. See `LearningWorld`."""
        return dataclasses.replace(super().outcome(), named_hostile=self.named[True], named_honest=self.named[False])


def gossip(setting: Setting) -> RunOutcome:
    """Run gossip, with hostile volunteers if the scenario has some."""
    world = HostileWorld(setting) if setting.hostile.percent else LearningWorld(setting)
    world.run()
    return world.outcome()
