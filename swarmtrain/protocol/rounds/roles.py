"""Roles by bandwidth: who averages how many chunks of a roster's mean.

Each of n peers on a roster sends its pseudo-gradient of V bytes to those who average it, and needs the whole mean. The
owner of a fraction w of the mean receives that part of the n - 1 other gradients and sends its average to as many
peers; the rest of its own gradient goes to the other owners, and the rest of the mean comes from them. So each peer
sends, and receives,

    (1 - w) V + (n - 1) w V = V (1 + (n - 2) w)

bytes, and the averaging takes as long as the slowest direction of a link: max over peers of V (1 + (n - 2) w) / rate.
The w that make this least are the solution of the linear program in DeDLOC (arXiv 2106.10207, section 3.2), of which
butterfly all-reduce (equal w) and a parameter server (one w of 1) are special cases. A peer that nobody can dial has
w = 0. Here w is limited too, because an owner can write what it likes into its part and peers only tell their rates.
The limit follows from who is on the roster (`largest_share`), so whoever reads a roster checks it.

`divide` finds them without a solver: with all owners busy until the same time t, w follows from t, and t from the sum
of all w. Links that are too slow to send their own gradient by then own nothing; the whole then lasts as long as the
slowest of these. Of the program's solutions this is the one in which the owners are ready first. Tests compare it with
`scipy.optimize.linprog` on the program of the paper, with that limit.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_LEAST_OF_EQUAL = 0.1
"""Shares of less than this part of an equal one are none: each costs a pull from everyone."""
_MOST_OF_EQUAL = 3
"""No share is larger than this multiple of an equal one, however fast a peer says that its link is."""
_SLOWEST_BYTES_PER_S, _FASTEST_BYTES_PER_S = 1e-6, 1e15
"""Rates between which all sums and quotients here are finite."""
_PIECES, MAX_PIECES = 16, 64
"""Pieces in which the owner of a share averages it: of large shares the higher number, if a piece is then still of
`_PIECE_CHUNKS` chunks."""
_PIECE_CHUNKS = 4
PIECES_AT_ONCE = 2
"""Pieces that are pulled from each owner at once: while some are asked for, which takes a few round trips over a link
that is busy sending, others come."""


@dataclass(frozen=True, slots=True)
class LinkRates:
    """Measured link of a peer: bytes per second up and down (0: unknown), and whether others can dial it."""

    up_bytes_per_s: float = 0.0
    down_bytes_per_s: float = 0.0
    can_be_dialled: bool = True

    @property
    def is_known(self) -> bool:
        """True if a direction was measured."""
        return self.up_bytes_per_s > 0 or self.down_bytes_per_s > 0


@dataclass(frozen=True, slots=True)
class Roles:
    """Division of a roster's mean: the chunks that each peer averages, in roster order, and the seconds that averaging
    takes by the linear program's own model; infinity if no link is known."""

    shares: tuple[int, ...]
    averaging_s: float


def known_rates(links: Sequence[LinkRates]) -> list[float]:
    """Return the slower direction of each link, in bytes per second; a direction that is unknown is the median of the
    known ones. All 0 if none is known."""
    ways = []
    for way in ([link.up_bytes_per_s for link in links], [link.down_bytes_per_s for link in links]):
        known = [rate for rate in way if rate > 0]
        middle = statistics.median(known) if known else math.inf
        ways.append([rate if rate > 0 else middle for rate in way])
    rates = [min(both) for both in zip(*ways, strict=True)]
    return [0.0 if math.isinf(rate) else rate for rate in rates]


def averaging_s(links: Sequence[LinkRates], shares: Sequence[int], body_bytes: int) -> float:
    """Return the seconds of averaging `body_bytes` with these shares, by the model above; infinity if no link is
    known."""
    return max(carrying_s(links, shares, body_bytes))


def carrying_s(links: Sequence[LinkRates], shares: Sequence[int], body_bytes: int) -> list[float]:
    """Return the seconds for which each peer's link is busy with that."""
    rates, total = known_rates(links), sum(shares)
    loads = (carried_bytes(body_bytes, len(links), share, total) for share in shares)
    return [load / rate if rate else math.inf for load, rate in zip(loads, rates, strict=True)]


def carried_bytes(body_bytes: int, num_peers: int, share: int, of: int) -> float:
    """Return the bytes that a peer which averages `share` of `of` equal parts sends, and receives as many."""
    return body_bytes + max(0, num_peers - 2) * body_bytes * share / max(1, of)


def equal_shares(num_chunks: int, owners: Sequence[bool]) -> tuple[int, ...]:
    """Return shares of equal size, to within a chunk, for the peers that are True in `owners`; 0 for the others."""
    num, places = sum(owners), itertools.accumulate(owners)
    ends = [num_chunks * place // num for place in places]
    return tuple(end - start for start, end in itertools.pairwise([0, *ends]))


def largest_share(num_chunks: int, num_peers: int, num_dialled: int) -> int:
    """Return the most chunks that one of `num_peers` peers on a roster may average, of which others can dial
    `num_dialled`: three times an equal share. If fewer than a third can be dialled, they have equal shares."""
    parts = (math.ceil(_MOST_OF_EQUAL * num_chunks / num_peers), math.ceil(num_chunks / max(1, num_dialled)))
    return min(num_chunks, max(parts))


def divide(links: Sequence[LinkRates], num_chunks: int, body_bytes: int) -> Roles:
    """Return who averages how many of `num_chunks` chunks of a mean of `body_bytes` bytes over the peers with `links`.

    Equal shares if no link is known, or the rate of one is not to be reckoned with. Peers that cannot be dialled get
    none, unless nobody can be. No share is larger than `largest_share`.
    """
    dialled = [link.can_be_dialled for link in links]
    if not any(dialled):
        dialled = [True] * len(links)
    equal, rates = equal_shares(num_chunks, dialled), known_rates(links)
    equal_s = averaging_s(links, equal, body_bytes)
    are_sound = all(_SLOWEST_BYTES_PER_S <= rate <= _FASTEST_BYTES_PER_S for rate in rates)
    if len(links) < 3 or not num_chunks or not are_sound:
        return Roles(equal, equal_s)
    most_chunks = largest_share(num_chunks, len(links), sum(dialled))
    while True:
        shares = _fastest(rates, dialled, num_chunks, most_chunks)
        least = _LEAST_OF_EQUAL * num_chunks / sum(dialled)
        others = [may and not 0 < share < least for may, share in zip(dialled, shares, strict=True)]
        if others == dialled or sum(others) * most_chunks < num_chunks:
            break
        dialled = others
    its_s = averaging_s(links, shares, body_bytes)
    are_alike = max(shares) - min(shares) <= 1
    return Roles(equal, equal_s) if equal_s <= its_s * (1 + (1e-9 if are_alike else -1e-9)) else Roles(shares, its_s)


def _fastest(rates: Sequence[float], may_own: Sequence[bool], num_chunks: int, most_chunks: int) -> tuple[int, ...]:
    """Return the shares with which the owners are ready first, if none has more than `most_chunks`.

    In units of V: by time t an owner of rate r has carried 1 + (n - 2) w = r t, so w = (r t - 1) / (n - 2). That the w
    of the fastest k owners add up to 1 gives t; k is the largest for which none of them is negative. An owner for which
    w is too much gets the most, and the others divide what is left in the same way.
    """
    others, most = len(rates) - 2, most_chunks / max(1, num_chunks)
    free = sorted((index for index, may in enumerate(may_own) if may), key=lambda index: -rates[index])
    parts, left = [0.0] * len(rates), 1.0
    while free:
        ready_s = _ready_s([rates[index] for index in free], others, left)
        if (rates[free[0]] * ready_s - 1) / others <= most:
            break
        parts[free.pop(0)], left = most, max(0.0, left - most)
    for index in free:
        parts[index] = max(0.0, (rates[index] * ready_s - 1) / others)
    shares = [min(most_chunks, math.floor(part / sum(parts) * num_chunks + 1e-9)) for part in parts]
    # The few chunks that are left go, one by one, to whoever is ready first with one more.
    for _ in range(num_chunks - sum(shares)):
        owners = [index for index, may in enumerate(may_own) if may and shares[index] < most_chunks]
        first = min(owners, key=lambda index: (1 + others * (shares[index] + 1) / num_chunks) / rates[index])
        shares[first] += 1
    return tuple(shares)


def _ready_s(fastest: Sequence[float], others: int, left: float) -> float:
    """Return when owners with these rates, the fastest first, are ready that divide the part `left` of the whole."""
    total, ready_s = 0.0, 0.0
    for number, rate in enumerate(fastest, 1):
        total += rate
        at_s = (others * left + number) / total
        if number > 1 and at_s * rate < 1:
            break
        ready_s = at_s
    return ready_s


def share_pieces(chunks: range) -> list[range]:
    """Cut a share into the pieces in which its owner averages it: whoever waits pulls one while the next is made, so
    that the links are busy both ways."""
    num = max(1, min(len(chunks), max(_PIECES, min(MAX_PIECES, len(chunks) // _PIECE_CHUNKS))))
    bounds = [chunks.start + len(chunks) * i // num for i in range(num + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]
