"""How long a merge waits: for the authors of publications, and in shares for the owner of a share before this peer
averages that share itself.

Authors together have one time, `merge_limit_s`, from the links that all tell and the round's limit, however little they
bring and however often (`MergeLimit`). One that brings nothing is given up before (`author_due_s`).

With equal shares it goes by the time that its own took. With shares by links it goes by what the owner and it need, as
all tell of their links (`link_claims.AveragingTimes`). An owner may tell anything and send nothing, so it is also
measured by the others: those who divide a mean by links are ready at about the same time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from swarmtrain.protocol.rounds.link_claims import AveragingTimes

_PATIENCE = 2.0
"""Multiple of the time that its owner and whoever waits should need after which a share of which nothing comes is
overdue."""
_PIECE_PART = 0.25
"""Part of the time that all should need after which a piece is overdue that its owner can make only once the slowest
has sent its bytes: there are four times as many pieces, or more."""
_MOST_PATIENCE = 4.0
"""Multiple of the time that all should need after which a share is overdue although pieces of it come."""
_SILENT_BESIDE_OTHERS, _SLOW_BESIDE_OTHERS = 4.0, 8.0
"""Multiples of the time in which half of what the other owners average has come, after which a share is overdue of
which nothing has come, and one of which something has. Where one link carries all bytes of a mean, and one of four
peers averages three quarters of it, its share is there after six times that, and the first piece of it long before."""
_LEAST_SILENCES = 6.0
"""Multiple of a silence that a merge has at least: as long as a source that is busy with others is waited for, with the
usual five seconds."""
_LIMIT_PATIENCE = 8.0
"""Multiple of the time that merging should take that its authors have at most. Seven readers of one author behind 2
Mbit/s were ready after six times that, because streams that came to nothing took part of the link."""
_OTHERS_PATIENCE = 4.0
"""Multiple of the limit after which authors are given up although most of the others have not come either: then this
peer's own link is slow, and without all these it would merge alone. Also of the time in which half of them came."""


def merge_limit_s(expected_s: float, silence_s: float, round_limit_s: float) -> float:
    """Return the seconds that the authors on a roster have to deliver what a peer averages.

    `expected_s` is what merging should take by the links that all tell, infinity if none is known. An identity may tell
    of any link: what it tells holds a merge up for `round_limit_s` at most.
    """
    return max(_LEAST_SILENCES * silence_s, min(_LIMIT_PATIENCE * expected_s, round_limit_s))


def author_due_s(
    began_s: float, last_s: float, pair_s: float, everyone_s: float, silence_s: float, limit_s: float
) -> float:
    """Return the time until which to wait for the next bytes of a publication whose last ones came at `last_s`.

    Unlike a piece of a share they are there already. So of the time that its author and this peer need (`pair_s`), in
    which the author's link may be busy with others, at most a quarter of the limit counts.
    """
    first_s = min(_PATIENCE * pair_s, limit_s / _MOST_PATIENCE)
    return max(began_s + first_s, max(began_s, last_s) + max(silence_s, _PIECE_PART * everyone_s))


class MergeLimit:
    """Time that the authors of publications have together. Times are seconds of the caller's clock."""

    def __init__(self, began_s: float, limit_s: float) -> None:
        self._began_s, self._limit_s = began_s, limit_s
        self._num_asked, self._num_ended = 0, 0
        self._half_s: float | None = None

    def asked(self) -> None:
        """Note that an author's bytes are pulled."""
        self._num_asked += 1

    def ended(self, now: float) -> None:
        """Note that an author's bytes are here, or that it was given up."""
        self._num_ended += 1
        if self._half_s is None and self._is_half_here:
            self._half_s = now - self._began_s

    @property
    def due_s(self) -> float:
        """Time until which authors are waited for. It is the limit, and more only while this peer sees of most authors
        that they are slow: then its own link is."""
        if not self._is_half_here:
            return self._began_s + _OTHERS_PATIENCE * self._limit_s
        half_s = min(self._half_s or 0.0, self._limit_s)
        return self._began_s + max(self._limit_s, _OTHERS_PATIENCE * half_s)

    @property
    def _is_half_here(self) -> bool:
        """Whether half of the authors besides one have come."""
        return 2 * self._num_ended >= self._num_asked - 1


def share_due_s(roster_at_s: float, own_share_at_s: float, silence_s: float) -> float:
    """Return the time until which to wait for the shares of owners that answer. After it, this peer averages these
    shares itself, from the publications that the roster names.

    `roster_at_s` is when the roster came, `own_share_at_s` when this peer's share was averaged. An owner may lack bytes
    that nobody can give it; it then never has a share although it lives.
    """
    return own_share_at_s + max(silence_s, 2 * (own_share_at_s - roster_at_s))


def piece_due_s(roster_at_s: float, last_piece_s: float, pair_s: float, everyone_s: float, silence_s: float) -> float:
    """Return the time until which to wait for the next piece of a share, on a roster whose shares follow from links.

    A peer that has no share itself does not see how long one takes, so it goes by what its reckoning gives for this
    roster (`link_claims.AveragingTimes`): the time that the owner and it need (`pair_s`), and of the time that everyone
    needs only a part, since any peer can tell of a link so slow that this is as long as a round may be. While pieces
    come (`last_piece_s`) it waits longer, but not for ever: the owner may send one now and then.
    """
    next_s = max(silence_s, _PIECE_PART * everyone_s)
    due_s = max(roster_at_s + _PATIENCE * pair_s, max(roster_at_s, last_piece_s) + next_s)
    return min(due_s, roster_at_s + _MOST_PATIENCE * max(silence_s, everyone_s))


class ShareWaits:
    """Waits of one peer for the shares of one roster. Times are seconds of the caller's clock."""

    def __init__(
        self,
        roster_at_s: float,
        shares: Sequence[int],
        own: int | None,
        times: AveragingTimes | None,
        silence_s: float,
        limit_s: float = math.inf,
    ) -> None:
        """`shares` are the chunks that each peer of the roster averages, `own` is this peer's number there, None if it
        is not on it. `times` is None if shares are equal, or no link is known. An owner whose link is told has
        `limit_s` at most (`merge_limit_s`)."""
        self._roster_s, self._shares, self._own, self._times = roster_at_s, tuple(shares), own, times
        self._silence_s, self._limit_s = silence_s, limit_s
        has_share = own is not None and self._shares[own] > 0
        self._own_share_s = math.inf if has_share else roster_at_s
        """Time at which this peer's own share was ready."""
        self._last_s: dict[int, float] = {}
        """Time at which the last piece of each owner came."""
        self._came: list[tuple[float, int, int]] = []
        """Pieces that came: the time, the owner's number, and the chunks."""

    def own_is_ready(self, now: float) -> None:
        """Note that this peer's own share is averaged."""
        self._own_share_s = now

    def came(self, owner: int, num_chunks: int, now: float) -> None:
        """Note that a piece of the share of peer number `owner` came, of `num_chunks` chunks."""
        self._last_s[owner] = now
        self._came.append((now, owner, num_chunks))

    def due_s(self, owner: int) -> float:
        """Return the time until which to wait for the next piece of the share of peer number `owner`."""
        if self._times is None:
            return share_due_s(self._roster_s, self._own_share_s, self._silence_s)
        last_s = self._last_s.get(owner, self._roster_s)
        due_s = piece_due_s(self._roster_s, last_s, self._times.pairs_s[owner], self._times.everyone_s, self._silence_s)
        others_s = self._others_half_s(owner) - self._roster_s
        patience = _SLOW_BESIDE_OTHERS if owner in self._last_s else _SILENT_BESIDE_OTHERS
        return min(due_s, self._roster_s + min(self._limit_s, max(self._silence_s, patience * others_s)))

    def _others_half_s(self, owner: int) -> float:
        """Return when half of what the owners besides this one average had come; infinity while it has not."""
        left = sum(share for number, share in enumerate(self._shares) if number not in (owner, self._own)) / 2
        if not left:
            return math.inf
        for at_s, number, num_chunks in self._came:
            left -= num_chunks * (number != owner)
            if left <= 0:
                return at_s
        return math.inf
