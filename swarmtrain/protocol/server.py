"""Merging with a server: what of a worker's rounds it has, what it does not have yet, and what it does not take.

A worker hands in each of its rounds. It goes on from the server's newest weights at every round's end, whether the
server has that round's work yet or not: what it has not is on its way, or waits to be fetched, and enters once.

    handed in        the server has asked for it: it never changes any more
    waiting          the rounds since then, added up: one piece as soon as the server asks
    entered          the server's weights say so: forgotten, once the worker goes on from those weights

Rounds are the worker's own count and only grow, so one number per worker, the last round that entered, says it all:
the server asks for what is after that number, in order, and refuses for good what is too old.

Pure: gradients are whatever can be added up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

__all__ = ["GradientUpload", "GradientUploads", "UploadVersions", "too_old"]

_MAX_WORKERS = 4096
"""So many workers' rounds are remembered: identities cost nothing."""
_MAX_KEPT = 4


class Summable(Protocol):
    """A pseudo-gradient: two of them have a sum."""

    def __add__(self, other: Self, /) -> Self:
        """Of both."""


G = TypeVar("G", bound=Summable)


@dataclass(frozen=True, kw_only=True)
class GradientUpload(Generic[G]):
    """One or more rounds of a worker: the last one's number, what all took, and the sum of their pseudo-gradients.

    `arrivals` is the age of the weights that the first of them began from: how many gradients had entered those.
    `own_tokens` is all that the worker had trained on by then.
    """

    round: int
    tokens: int
    inner_steps: int
    arrivals: int
    own_tokens: int
    gradient: G

    def then(self, later: GradientUpload[G]) -> GradientUpload[G]:
        """Both as one."""
        return dataclasses.replace(
            later,
            tokens=self.tokens + later.tokens,
            inner_steps=self.inner_steps + later.inner_steps,
            arrivals=self.arrivals,
            gradient=self.gradient + later.gradient,
        )


@dataclass
class GradientUploads(Generic[G]):
    """What of a worker's rounds is not in the weights that it goes on from, oldest first."""

    _pieces: list[GradientUpload[G]] = field(default_factory=list)
    _asked_round: int = -1
    """Pieces up to here were asked for, and stay as they are."""

    @property
    def pieces(self) -> Sequence[GradientUpload[G]]:
        """All of them."""
        return tuple(self._pieces)

    def add(self, one: GradientUpload[G]) -> None:
        """A round is over. Raises ValueError if it is not later than those before."""
        last = self._pieces[-1] if self._pieces else None
        if one.round <= max(self._asked_round, -1 if last is None else last.round):
            raise ValueError(f"round {one.round} was handed in before")
        if last is not None and last.round > self._asked_round:
            self._pieces[-1] = last.then(one)
        else:
            self._pieces.append(one)

    def after(self, entered_round: int | None) -> GradientUpload[G] | None:
        """The first piece that the server, which has this worker's rounds up to `entered_round`, does not have; it is
        handed in by this. None if it has them all."""
        has = -1 if entered_round is None else entered_round
        while len(self._pieces) > _MAX_KEPT and self._pieces[1].round <= has:
            self._pieces.pop(0)  # only what it knows of its own lead is lost
        for piece in self._pieces:
            if piece.round > has:
                self._asked_round = max(self._asked_round, piece.round)
                return piece
        return None

    def entered(self, round: int | None) -> None:
        """The worker goes on from weights that its rounds up to `round` have entered."""
        if round is not None:
            self._pieces = [piece for piece in self._pieces if piece.round > round]


@dataclass
class UploadVersions:
    """The server's count: the last round of each worker that entered its weights, or was refused for good."""

    max_workers: int = _MAX_WORKERS
    _rounds: dict[str, int] = field(default_factory=dict)

    def round(self, peer: str) -> int | None:
        """The last round of `peer`; None if there was none."""
        return self._rounds.get(peer)

    def is_new(self, peer: str, round: int) -> bool:
        """Whether that round of `peer` has yet to enter."""
        return round > self._rounds.get(peer, -1)

    def enter(self, peer: str, round: int) -> None:
        """It enters now. Raises ValueError, changing nothing, if it did before."""
        if not self.is_new(peer, round):
            raise ValueError(f"round {round} of {peer} has entered before")
        self._rounds.pop(peer, None)  # the last one stands last
        self._rounds[peer] = round
        while len(self._rounds) > self.max_workers:
            del self._rounds[next(iter(self._rounds))]

    def newest(self, number: int) -> dict[str, int]:
        """The `number` workers that were heard of last, with their rounds."""
        return dict(list(self._rounds.items())[-number:])

    def rows(self) -> list[list[str | int]]:
        """For a checkpoint: [PeerID, round] of each, the one heard of longest ago first."""
        return [[peer, round] for peer, round in self._rounds.items()]

    def load(self, rows: Iterable[Sequence[object]]) -> None:
        """Become what `rows` gave. ValueError, and nothing changes, if they are something else."""
        rounds: dict[str, int] = {}
        for row in rows:
            match row:
                case [str(peer), int(round)] if round >= 0:
                    rounds[peer] = round
                case _:
                    raise ValueError(f"not a worker's round: {row}")
        self._rounds = rounds


def too_old(base_arrivals: int, arrivals: int, buffer_arrivals: int, max_staleness_rounds: int) -> str:
    """Why what began from weights with `base_arrivals` is not taken into those with `arrivals`; empty if it is.

    A round here is what refreshes the momentum, `buffer_arrivals`. A server that went on from an older checkpoint may
    be behind its workers: what they have is as new as can be.
    """
    behind = (arrivals - base_arrivals) / buffer_arrivals
    if behind <= max_staleness_rounds:
        return ""
    return f"it began from weights {behind:.0f} rounds old; at most {max_staleness_rounds} are taken"
