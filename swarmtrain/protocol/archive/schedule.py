"""When a bootstrap archives, where each peer has weights of its own: by what their states hold.

A state holds its author's tokens, and those of the states that it was built on. How many tokens the run has by a
bootstrap's own count says nothing of that: it counts also what was lost, and a newcomer's count may be lower.

Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from swarmtrain.protocol.membership.membership import PeerInfo

__all__ = ["ArchiveSchedule", "adds_to_archive", "tokens_gained"]

_REFUSED_S = 60.0


@dataclass
class ArchiveSchedule:
    """Sees who has merged a round since the archive was made last: only then it is worth asking for a state."""

    refused_s: float | None = None
    """Since when states are refused that lack more than they bring."""
    _refused_again_s: float = 0.0
    _archived: dict[str, int] = field(default_factory=dict)
    """The round that each had told of by then."""

    def is_new(self, infos: Iterable[PeerInfo]) -> bool:
        """Whether one of these volunteers may have what the archive lacks."""
        return any(info.round > 0 and info.round != self._archived.get(info.peer) for info in infos)

    def archived(self, infos: Iterable[PeerInfo]) -> None:
        """Their states were asked for, and what they hold is in the archive, or adds nothing to it."""
        self.refused_s = None
        self._archived = {info.peer: info.round for info in infos}

    def refuse(self, now: float) -> bool:
        """A state lacks more of the archive's tokens than it brings: whether it is refused. After a minute those who
        train on are the run, whatever the archive holds: one that lied, or that nobody knows any more, must not keep
        their work out of it."""
        before_s, self._refused_again_s = self._refused_again_s, now
        if self.refused_s is None or not 0 <= now - before_s <= _REFUSED_S:  # another's, or the clock was put back
            self.refused_s = now
        return now < self.refused_s + _REFUSED_S


def tokens_gained(counts: Mapping[str, int], authors: Collection[str], archived: Mapping[str, int]) -> int:
    """How many of the authors' own tokens, which are in their weights, are not in weights that hold `archived`."""
    return sum(max(0, counts.get(peer, 0) - archived.get(peer, 0)) for peer in authors)


def adds_to_archive(
    counts: Mapping[str, int], authors: Collection[str], archived: Mapping[str, int], slack_tokens: int = 0
) -> bool:
    """Whether states of `authors`, which count these tokens, hold something that weights lack which hold `archived`.

    The authors' own tokens are in their weights, so one of them must have more than are archived. What the states do
    not know of others is lost with the archive: a state that was built on it knows all of it, one from an old folder
    does not, and must bring more than it loses. Counts of others are a few rounds old: `slack_tokens` are no loss.
    """
    gained = tokens_gained(counts, authors, archived)
    lost = sum(max(0, tokens - counts.get(peer, 0)) for peer, tokens in archived.items())
    return gained > 0 and lost <= gained + slack_tokens
