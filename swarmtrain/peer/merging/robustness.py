"""Limits on what a partner's publication may do to a merge: `merge.robust`, applied once to each as it arrives.

`algorithm.robust` has the rules and what they bound. Several threads call this module: the one that decodes what
arrives, and the one that publishes this peer's own updates.
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

_GRADIENTS = "clipped_gradients"
_DISPLACEMENTS = "clipped_displacements"
_log = logging.getLogger(__name__)
_LEAST_INPUTS = 2
_LEAST_OF_OURS = 4
_ABSURD = 0.01
"""Factor below which a cut refuses the publication: if every tensor would be cut that far, the rest is worth
nothing.
"""
_TELLS_AFTER = 40
"""Own publications before peers are named: 40 are two long rounds or five short ones. While the learning rate rises,
gradients grow so fast that honest ones are cut too. The count restarts when this peer comes back, since what it
considers usual may be outdated.
"""
_MET_AFTER = 16
_MET_WITHIN = 0.5
"""Relative distance below which peers' weights count as close; independent random weights are 1.4 times their size
apart.
"""


class Naming:
    """Reports a peer's incidents once they repeat (`protocol.gossip.cut_history`), over all fragments. Thread-safe."""

    def __init__(self, told: Callable[[str, ClipIncident], None]) -> None:
        """`told` is called with the PeerID and each incident of a peer that is to be named."""
        self._told = told
        self._history = CutHistory()
        self._lock = threading.Lock()

    def look(self, peer: str, kind: str, round: int, incidents: Sequence[ClipIncident]) -> None:
        """Record that a publication of `kind` from the author's `round` was examined, and the incidents it caused, if
        any.
        """
        with self._lock:
            is_named = self._history.look(peer, kind, round, is_cut=bool(incidents))
        for each in incidents if is_named else ():
            self._told(peer, each)

    def forget(self) -> None:
        """Forget all incidents: this peer has come back."""
        with self._lock:
            self._history.forget()


class Robustness:
    """Clips of one peer and what they have learned to be usual. With the rule "none" nothing is clipped. Thread-safe.

    `met` False is for peers that began with different weights. Then distances are not clipped until `merged` reports
    that the weights are close, and directions are not judged: gradients of such weights have none in common.
    """

    def __init__(self, rule: str, layout: Layout, naming: Naming, *, met: bool = True) -> None:
        """`naming` gets each examined publication once enough is known for a cut to mean something."""
        self.rule = rule
        self._naming = naming
        self._groups = per_tensor([place.stop - place.start for place in layout.slices])
        self._gradients = GradientClip(self._groups)
        self._displacements = DisplacementClip(enabled=met)
        self._directions = DirectionTrust()
        self._num_learned = self._num_merged = 0
        self._lock = threading.Lock()

    def accept(self, peer: str, arrival: PartnerUpdate, own_theta: Tensor, round: int) -> PartnerUpdate:
        """Return the part of `arrival`, of the author's `round`, that may enter a merge with `own_theta` (P,).

        Raises BadBytesError if nothing may.
        """
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
            if tokens:  # compared per token, a unit of work that both sides count alike
                cuts["gradient"] = self._gradients.clip(arrival.gradient, tokens)
                if cuts["gradient"].incident is not None:
                    arrival = dataclasses.replace(arrival, gradient=cuts["gradient"].vector, lengthened=None)
        for kind, cut in cuts.items():
            if cut.incident is not None and max(cut.factors) < _ABSURD:
                raise BadBytesError(f"far beyond what is usual: {cut.incident.detail}", code="far-from-usual")
            found.setdefault(kind, []).append(cut.incident)
        # A cut is safe and applies at once; naming a peer accuses it, and needs more knowledge (decision 55).
        if self._num_learned >= _TELLS_AFTER:
            for kind, incidents in found.items():
                self._naming.look(peer, kind, round, [each for each in incidents if each is not None])
        return arrival

    def _trusted_untrusted(self, peer: str, arrival: PartnerUpdate) -> tuple[PartnerUpdate, ClipIncident | None]:
        """Apply the rule "direction". Raises BadBytesError if the gradient must be refused."""
        found = self._directions.judge(peer, arrival.gradient, arrival.tokens)
        if found.refusal is not None:
            raise BadBytesError(found.refusal.detail, code="against-own")
        gradient = arrival.gradient if found.factor == 1 else arrival.gradient * found.factor
        tokens = round(arrival.tokens * found.weight)
        return PartnerUpdate(arrival.theta, gradient, tokens, lengthened=found.factor), found.incident

    def accept_gradient(self, peer: str, gradient: Tensor, tokens: int, theta: Tensor, round: int) -> Tensor:
        """Return the part of a worker's pseudo-gradient (P,) of its `round` that may enter a server's weights `theta`
        (P,).

        A server has no gradient of its own to compare with. Before enough is known to say more, the limit is the length
        of the weights themselves.
        """
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
        """Learn from an own pseudo-gradient (P,) of `tokens` tokens what is usual here."""
        if self.rule != "none":
            norms = self._gradients.norms(gradient)
            with self._lock:
                self._num_learned += 1
                self._gradients.learn(gradient, tokens, norms)
                self._displacements.learn(gradient, norms)
                if self.rule == "direction":
                    self._directions.learn(gradient, tokens, norms)

    def not_trained(self) -> None:
        """Note that this peer does not train these tensors in this round. Where it does not, it judges no directions:
        compared with a gradient of some rounds ago, those of honest peers were refused."""
        with self._lock:
            self._directions.forget()

    def merged(self, displacement: float) -> None:
        """Record how far apart the last merge's weights were, relative to their size.

        After 16 merges distances are clipped whatever they are: a peer that stays far off must not keep the rule
        disabled.
        """
        self._num_merged += 1
        if displacement < _MET_WITHIN or self._num_merged >= _MET_AFTER:
            self._displacements.enabled = True

    def kept(self) -> dict[str, Callable[[], Any]]:
        """Return functions, by name, that give what a checkpoint keeps."""
        return {_GRADIENTS: lambda: self._gradients.history, _DISPLACEMENTS: lambda: self._displacements.history}

    def restore(self, extra: Mapping[str, Any]) -> None:
        """Restore what a checkpoint kept. Raises ValueError or TypeError, changing nothing, if it is malformed."""
        gradients = GradientClip(self._groups, extra.get(_GRADIENTS, ()))
        history = extra.get(_DISPLACEMENTS, ())
        displacements = DisplacementClip(enabled=self._displacements.enabled, history=history)
        with self._lock:
            self._gradients, self._displacements = gradients, displacements

    def comes_back(self) -> None:
        """Note that this peer took the others' present weights: nobody is named until it has published enough again."""
        self._naming.forget()
        with self._lock:
            self._num_learned = 0


def apart(rule: str, arrivals: Sequence[PartnerUpdate]) -> tuple[PartnerUpdate, ...]:
    """Return those of `arrivals` that `robust_mean` needs one by one, besides their mean."""
    return tuple(arrival for arrival in arrivals if arrival.tokens) if mean_of(rule) is not None else ()


@torch.no_grad()
def robust_mean(rule: str, gradients: Sequence[Tensor], tokens: Sequence[float]) -> Tensor | None:
    """Return the mean by `rule` of gradients (P,) with their tokens, the own one first; None to use the token-weighted
    mean.

    None is returned if the rule has no mean of its own or there are too few gradients. Gradients are compared as if
    each had the tokens that weigh in the token-weighted mean: a part of a round is shorter than a whole one and would
    be trimmed for that. The own one without tokens, of a fragment that this peer did not train, is left out. If another
    package's rule fails on them, the own gradient counts alone, since they may have been sent to make it fail. Raises
    `RunTimeError` for a rule that is wrong whatever is sent.
    """
    mean_by_rule, own = mean_of(rule), gradients[0]
    if not tokens[0]:
        gradients, tokens, own = gradients[1:], tokens[1:], torch.zeros_like(own)
    if mean_by_rule is None or len(gradients) < (_LEAST_OF_OURS if is_ours(rule) else _LEAST_INPUTS):
        return None
    usual = sum(number * number for number in tokens) / sum(tokens)
    factors = [usual / number for number in tokens]
    return mean_by_rule(gradients, factors) if is_ours(rule) else _mean_of_theirs(rule, own, gradients, factors)


def _mean_of_theirs(rule: str, own: Tensor, gradients: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    mean_by_rule, versions = mean_of(rule), [gradient._version for gradient in gradients]
    assert mean_by_rule is not None
    try:
        mean = mean_by_rule(gradients, factors)
    except Exception as error:
        _log.warning('merge.robust = "%s": the rule failed (%r); this merge leaves out the other peers', rule, error)
        return own
    if versions != [gradient._version for gradient in gradients]:
        raise RunTimeError(
            f'merge.robust = "{rule}": the rule modifies its arguments; ask its authors',
            code="merge-package-broken",
        )
    if not isinstance(mean, Tensor) or mean.shape != own.shape or mean.dtype is not own.dtype:
        raise RunTimeError(
            f'merge.robust = "{rule}": the rule did not return a vector of {own.numel()} fp32 numbers; ask its authors',
            code="merge-package-broken",
        )
    if not mean.isfinite().all():
        _log.warning(
            'merge.robust = "%s": the rule returned numbers that are not finite; this merge leaves out the other peers',
            rule,
        )
        return own
    return mean
