"""What a partner's publication may do to a merge: `merge.robust`, applied once to each as it arrives.

`algorithm.robust` has the rules and says what they bound. Called from several threads: the one that decodes what
arrives, and the one that hands over this peer's own publications.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from swarmtrain.algorithm.gossip import Layout, PartnerUpdate
from swarmtrain.algorithm.robust import (
    ClipIncident,
    Clipped,
    DirectionTrust,
    DisplacementClip,
    GradientClip,
    per_tensor,
)
from swarmtrain.errors import BadBytesError, RunTimeError
from swarmtrain.peer.merging.rules import is_ours, mean_of
from swarmtrain.protocol.gossip.cut_history import CutHistory

__all__ = ["Naming", "Robustness", "apart", "robust_mean"]

_GRADIENTS = "clipped_gradients"
_DISPLACEMENTS = "clipped_displacements"
_log = logging.getLogger(__name__)
_LEAST_INPUTS = 2
_LEAST_OF_OURS = 4
_ABSURD = 0.01
"""What would have to be cut to less than this, in every tensor, is not worth the rest, and not taken at all."""
_TELLS_AFTER = 40
"""Own publications, of two long rounds or five short ones: before, while the learning rate rises, gradients grow so
fast that honest ones are cut too. Counted anew when this peer comes back: what it takes for usual may be old then."""
_MET_AFTER = 16
_MET_WITHIN = 0.5
"""Independent random weights are 1.4 times their size apart."""


class Naming:
    """Reports a peer's incidents once they repeat (`protocol.gossip.cut_history`), in all fragments; thread-safe."""

    def __init__(self, told: Callable[[str, ClipIncident], None]) -> None:
        """`told` hears of each incident of a peer that is to be named, with its PeerID."""
        self._told = told
        self._history = CutHistory()
        self._lock = threading.Lock()

    def look(self, peer: str, kind: str, round: int, incidents: Sequence[ClipIncident]) -> None:
        """A publication of `kind` from the author's `round` was looked at, and these came of it, or none."""
        with self._lock:
            is_named = self._history.look(peer, kind, round, is_cut=bool(incidents))
        for each in incidents if is_named else ():
            self._told(peer, each)

    def forget(self) -> None:
        """This peer has come back."""
        with self._lock:
            self._history.forget()


class Robustness:
    """The clips of one peer, which remember what is usual. With the rule "none" nothing is clipped.

    With `met` False, peers that began with weights of their own, distances are not clipped until `merged` was told
    that they are close, and directions are not judged: gradients of such weights have none in common.
    """

    def __init__(self, rule: str, layout: Layout, naming: Naming, *, met: bool = True) -> None:
        """`naming` hears of what was looked at once enough is known for a cut to mean something."""
        self.rule = rule
        self._naming = naming
        self._groups = per_tensor([place.stop - place.start for place in layout.slices])
        self._gradients = GradientClip(self._groups)
        self._displacements = DisplacementClip(enabled=met)
        self._directions = DirectionTrust()
        self._num_learned = self._num_merged = 0
        self._lock = threading.Lock()

    def accept(self, peer: str, arrival: PartnerUpdate, own_theta: Tensor, round: int) -> PartnerUpdate:
        """What of `arrival`, of the author's `round`, may enter a merge with `own_theta`, (P,). BadBytesError if
        nothing may."""
        if self.rule == "none":
            return arrival
        tokens, found = arrival.tokens, dict[str, list[ClipIncident | None]]()
        with self._lock:
            cuts = dict[str, Clipped]()
            if tokens:
                found["gradient"] = []
                if self.rule == "direction" and self._displacements.enabled:
                    arrival, incident = self._trusted_untrusted(peer, arrival)
                    found["gradient"].append(incident)
            if arrival.theta is not None:
                cuts["weights"] = self._displacements.clip(own_theta, arrival.theta)
                arrival = dataclasses.replace(arrival, theta=cuts["weights"].vector)
            if tokens:  # a unit of work that both sides count alike
                cuts["gradient"] = self._gradients.clip(arrival.gradient, tokens)
                if cuts["gradient"].incident is not None:
                    arrival = dataclasses.replace(arrival, gradient=cuts["gradient"].vector, lengthened=None)
        for kind, cut in cuts.items():
            if cut.incident is not None and max(cut.factors) < _ABSURD:
                raise BadBytesError(f"far beyond what is usual: {cut.incident.detail}", code="far-from-usual")
            found.setdefault(kind, []).append(cut.incident)
        if self._num_learned >= _TELLS_AFTER:
            for kind, incidents in found.items():
                self._naming.look(peer, kind, round, [each for each in incidents if each is not None])
        return arrival

    def _trusted_untrusted(self, peer: str, arrival: PartnerUpdate) -> tuple[PartnerUpdate, ClipIncident | None]:
        """What the rule "direction" makes of it. BadBytesError if it must not be taken."""
        found = self._directions.judge(peer, arrival.gradient, arrival.tokens)
        if found.refusal is not None:
            raise BadBytesError(found.refusal.detail, code="against-own")
        gradient = arrival.gradient if found.factor == 1 else arrival.gradient * found.factor
        tokens = round(arrival.tokens * found.weight)
        return PartnerUpdate(arrival.theta, gradient, tokens, lengthened=found.factor), found.incident

    def accept_gradient(self, peer: str, gradient: Tensor, tokens: int, theta: Tensor, round: int) -> Tensor:
        """What of a worker's pseudo-gradient (P,) of its `round` may enter the weights `theta`, (P,), of a server,
        which has none of its own to compare it with: nothing longer than the weights themselves, before enough is
        known to say more."""
        if self.rule == "none":
            return gradient
        norm, most = float(gradient.norm()), float(theta.norm())
        incident = None
        if norm > most:
            gradient = (gradient.double() * (most / norm)).float()  # in fp64: it may be huge
            incident = ClipIncident("gradient", f"gradient cut: its norm {norm:.3g} to that of the weights, {most:.3g}")
        with self._lock:
            clipped = self._gradients.clip(gradient, tokens)
        incidents = [each for each in (incident, clipped.incident) if each is not None]
        self._naming.look(peer, "gradient", round, incidents)
        return clipped.vector

    def learn(self, gradient: Tensor, tokens: int) -> None:
        """An own pseudo-gradient (P,) of so many tokens: what is usual here."""
        if self.rule != "none":
            with self._lock:
                self._num_learned += 1
                self._gradients.learn(gradient, tokens)
                self._displacements.learn(gradient)
                if self.rule == "direction":
                    self._directions.learn(gradient, tokens)

    def merged(self, displacement: float) -> None:
        """How far apart the last merge's weights were, relative to their size. After some merges distances count
        whatever they are: one that stays far off must not keep the rule away."""
        self._num_merged += 1
        if displacement < _MET_WITHIN or self._num_merged >= _MET_AFTER:
            self._displacements.enabled = True

    def kept(self) -> dict[str, Callable[[], Any]]:
        """What gives what a checkpoint keeps, by name."""
        return {_GRADIENTS: lambda: self._gradients.history, _DISPLACEMENTS: lambda: self._displacements.history}

    def restore(self, extra: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept. ValueError or TypeError, changing nothing, if it is something else."""
        gradients = GradientClip(self._groups, extra.get(_GRADIENTS, ()))
        history = extra.get(_DISPLACEMENTS, ())
        displacements = DisplacementClip(enabled=self._displacements.enabled, history=history)
        with self._lock:
            self._gradients, self._displacements = gradients, displacements

    def comes_back(self) -> None:
        """This peer has taken the others' present weights: nobody is named before it has published enough again."""
        self._naming.forget()
        with self._lock:
            self._num_learned = 0


def apart(rule: str, arrivals: Sequence[PartnerUpdate]) -> tuple[PartnerUpdate, ...]:
    """What of `arrivals` `robust_mean` needs one by one, beside their mean."""
    return tuple(arrival for arrival in arrivals if arrival.tokens) if mean_of(rule) is not None else ()


@torch.no_grad()
def robust_mean(rule: str, gradients: Sequence[Tensor], tokens: Sequence[float]) -> Tensor | None:
    """The mean that `rule` puts in place of the token-weighted one, of gradients (P,) of so many tokens, the own one
    first; None where it has none, or too few are there.

    They are compared as if each had as many tokens as weigh in the token-weighted mean: a part of a round is shorter
    than a whole one, and would be what is trimmed. Where another package's rule fails on them, the own one is what
    counts: they may have been sent for that. Raises `RunTimeError` for a rule that is wrong whatever is sent."""
    mean_by_rule = mean_of(rule)
    if mean_by_rule is None or len(gradients) < (_LEAST_OF_OURS if is_ours(rule) else _LEAST_INPUTS):
        return None
    usual = sum(number * number for number in tokens) / sum(tokens)
    factors = [usual / number for number in tokens]
    return mean_by_rule(gradients, factors) if is_ours(rule) else _mean_of_theirs(rule, gradients, factors)


def _mean_of_theirs(rule: str, gradients: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    mean_by_rule, own, versions = mean_of(rule), gradients[0], [gradient._version for gradient in gradients]
    assert mean_by_rule is not None
    try:
        mean = mean_by_rule(gradients, factors)
    except Exception as error:
        _log.warning('merge.robust = "%s": the rule failed (%r): this merge has no others', rule, error)
        return own
    if versions != [gradient._version for gradient in gradients]:
        raise RunTimeError(
            f'merge.robust = "{rule}": the rule writes into what it is given; ask those who made it',
            code="merge-package-broken",
        )
    if not isinstance(mean, Tensor) or mean.shape != own.shape or mean.dtype is not own.dtype:
        raise RunTimeError(
            f'merge.robust = "{rule}": the rule gave no fp32 vector of {own.numel()} numbers; ask those who made it',
            code="merge-package-broken",
        )
    if not mean.isfinite().all():
        _log.warning('merge.robust = "%s": the rule gave numbers that are not finite: this merge has no others', rule)
        return own
    return mean
