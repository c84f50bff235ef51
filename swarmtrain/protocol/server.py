"""Merging with a server: which of a worker's rounds the server has, which it lacks, and which it refuses.

A worker uploads each of its rounds. At every round's end it continues from the server's newest weights, whether or not
they contain that round's work: what they lack is on its way or waits to be fetched, and enters once (decision 22). A
round's states:

    handed in        the server has asked for it: it never changes any more
    waiting          the rounds since then, added up: one piece as soon as the server asks
    entered          the server's weights contain it: forgotten once the worker continues from those weights

A worker numbers its rounds, and the numbers only grow. So one number for each worker, the last round that entered, is
enough: the server asks for what follows it, in order, and refuses for good what is too old.

Everything here is pure. Gradients are anything that can be added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

_MAX_WORKERS = 4096
"""Workers whose rounds are remembered. Identities cost nothing."""
_MAX_KEPT = 4
"""Pieces that a worker keeps although the server has them."""


class Summable(Protocol):
    """Pseudo-gradient: two of them have a sum."""

    def __add__(self, other: Self, /) -> Self:
        """Return the sum."""


G = TypeVar("G", bound=Summable)
"""Type of the pseudo-gradients."""


@dataclass(frozen=True, kw_only=True)
class GradientUpload(Generic[G]):
    """Rounds of a worker, one or more: the last one's number, their totals, and the sum of their pseudo-gradients.

    `arrivals` is the age of the weights from which the first round began: the number of gradients that had entered
    them. `own_tokens` is all that the worker had trained on by then.
    """

    round: int
    tokens: int
    inner_steps: int
    arrivals: int
    own_tokens: int
    gradient: G

    def then(self, later: GradientUpload[G]) -> GradientUpload[G]:
        """Return this upload and a later one as one."""
        return dataclasses.replace(
            later,
            tokens=self.tokens + later.tokens,
            inner_steps=self.inner_steps + later.inner_steps,
            arrivals=self.arrivals,
            gradient=self.gradient + later.gradient,
        )


@dataclass
class GradientUploads(Generic[G]):
    """Rounds of a worker that are not in the weights that it continues from, oldest first."""

    _pieces: list[GradientUpload[G]] = field(default_factory=list)
    _asked_round: int = -1
    """Pieces up to this round were asked for, and must not change."""

    @property
    def pieces(self) -> Sequence[GradientUpload[G]]:
        """Pieces, oldest first."""
        return tuple(self._pieces)

    def add(self, one: GradientUpload[G]) -> None:
        """Add a finished round. Raise ValueError if its number is not greater than those of earlier rounds."""
        last = self._pieces[-1] if self._pieces else None
        if one.round <= max(self._asked_round, -1 if last is None else last.round):
            raise ValueError(f"round {one.round} was handed in before")
        if last is not None and last.round > self._asked_round:
            self._pieces[-1] = last.then(one)
        else:
            self._pieces.append(one)

    def after(self, entered_round: int | None) -> GradientUpload[G] | None:
        """Return the first piece after `entered_round`, the last of this worker's rounds that the server has; None if
        it has all.

        The piece counts as handed in from then on.
        """
        has = -1 if entered_round is None else entered_round
        while len(self._pieces) > _MAX_KEPT and self._pieces[1].round <= has:
            self._pieces.pop(0)  # the worker only loses track of how far it is ahead
        for piece in self._pieces:
            if piece.round > has:
                self._asked_round = max(self._asked_round, piece.round)
                return piece
        return None

    def entered(self, round: int | None) -> None:
        """Drop the rounds up to `round`, which the weights that the worker continues from contain."""
        if round is not None:
            self._pieces = [piece for piece in self._pieces if piece.round > round]


@dataclass
class UploadVersions:
    """Server's record of the last round of each worker that entered its weights, or was refused for good."""

    max_workers: int = _MAX_WORKERS
    _rounds: dict[str, int] = field(default_factory=dict)

    def round(self, peer: str) -> int | None:
        """Return the last round of `peer` that entered or was refused; None without any."""
        return self._rounds.get(peer)

    def is_new(self, peer: str, round: int) -> bool:
        """Return whether that round of `peer` has not entered yet."""
        return round > self._rounds.get(peer, -1)

    def enter(self, peer: str, round: int) -> None:
        """Record that `round` of `peer` enters the weights now. Raise ValueError, changing nothing, if it did
        before."""
        if not self.is_new(peer, round):
            raise ValueError(f"round {round} of {peer} has entered before")
        self._rounds.pop(peer, None)  # the most recent worker is last
        self._rounds[peer] = round
        while len(self._rounds) > self.max_workers:
            del self._rounds[next(iter(self._rounds))]

    def newest(self, number: int) -> dict[str, int]:
        """Return the `number` most recent workers with their rounds."""
        return dict(list(self._rounds.items())[-number:])

    def rows(self) -> list[list[str | int]]:
        """Return rows for a checkpoint: [PeerID, round] of each worker, the least recent first."""
        return [[peer, round] for peer, round in self._rounds.items()]

    def load(self, rows: Iterable[Sequence[object]]) -> None:
        """Restore the record from `rows`. Raise ValueError, changing nothing, if they are malformed."""
        rounds: dict[str, int] = {}
        for row in rows:
            match row:
                case [str(peer), int(round)] if round >= 0:
                    rounds[peer] = round
                case _:
                    raise ValueError(f"not a worker's round: {row}")
        self._rounds = rounds


def too_old(base_arrivals: int, arrivals: int, buffer_arrivals: int, max_staleness_rounds: int) -> str:
    """Return the reason to refuse a gradient that began from weights with `base_arrivals` gradients, when the server's
    weights have `arrivals`; "" to accept it.

    A round here is `buffer_arrivals` gradients, after which the momentum is refreshed. A server that continued from an
    older checkpoint may be behind its workers; their work is then as new as can be.
    """
    behind = (arrivals - base_arrivals) / buffer_arrivals
    if behind <= max_staleness_rounds:
        return ""
    return f"it began from weights {behind:.0f} rounds old; at most {max_staleness_rounds} are taken"
