"""Schedule of a bootstrap's archives in runs where each peer has its own weights: decided by what the states contain.

A state contains its author's tokens and those of the states that it was built on. The run's tokens by the bootstrap's
own count say nothing about that: they include work that was lost, and a newcomer's count may be lower (decision 49).

Everything here is pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from swarmtrain.protocol.membership.membership import PeerInfo

_REFUSED_S = 60.0
"""Seconds after which a state is archived even though it lacks more tokens of the archive than it adds."""


@dataclass
class ArchiveSchedule:
    """Tracks which volunteers have merged a round since the last archive; only then the bootstrap asks for states."""

    refused_s: float | None = None
    """Time since which states are refused because they lack more tokens of the archive than they add; None if none
    is."""
    _refused_again_s: float = 0.0
    _archived: dict[str, int] = field(default_factory=dict)
    """Round that each volunteer had advertised at the last archive."""

    def is_new(self, infos: Iterable[PeerInfo]) -> bool:
        """Return whether one of these volunteers may have something that the archive lacks."""
        return any(info.round > 0 and info.round != self._archived.get(info.peer) for info in infos)

    def archived(self, infos: Iterable[PeerInfo]) -> None:
        """Record that the states of these volunteers were asked for. The archive lacks nothing of them now."""
        self.refused_s = None
        self._archived = {info.peer: info.round for info in infos}

    def refuse(self, now: float) -> bool:
        """Return whether to refuse a state that lacks more of the archive's tokens than it adds.

        After a minute it is accepted: the run is what its volunteers train, whatever the archive holds. Otherwise an
        archive made from a liar, or of peers that have left long ago, would keep the volunteers' work out for ever.
        """
        before_s, self._refused_again_s = self._refused_again_s, now
        # another state's, or the clock was set back
        if self.refused_s is None or not 0 <= now - before_s <= _REFUSED_S:
            self.refused_s = now
        return now < self.refused_s + _REFUSED_S


def tokens_gained(counts: Mapping[str, int], authors: Collection[str], archived: Mapping[str, int]) -> int:
    """Return how many of the authors' own tokens, which are in their weights, are not in weights that hold
    `archived`."""
    return sum(max(0, counts.get(peer, 0) - archived.get(peer, 0)) for peer in authors)


def adds_to_archive(
    counts: Mapping[str, int], authors: Collection[str], archived: Mapping[str, int], slack_tokens: int = 0
) -> bool:
    """Return whether states of `authors` with these counts contain something that weights with `archived` lack.

    The authors' own tokens are in their weights, so one of them must have more than is archived. What the states lack
    of other peers would be lost from the archive: a state built on it lacks nothing, but one from an old folder does,
    and must bring more than it loses. Counts of others are a few rounds old, so up to `slack_tokens` are no loss.
    """
    gained = tokens_gained(counts, authors, archived)
    lost = sum(max(0, tokens - counts.get(peer, 0)) for peer, tokens in archived.items())
    return gained > 0 and lost <= gained + slack_tokens
