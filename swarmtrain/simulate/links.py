"""Rates of links from a table `[links]`, and how transfers share links.

A machine that sends to four peers at once sends to each at a quarter of its rate.

Among few machines the rates are max-min fair, about as those of TCP connections with equal round trips: no transfer can
have more without one that has no more than it having less (Bertsekas and Gallager, Data Networks, section 6.5). Among
many machines, a transfer has the smaller of its equal shares at both ends. That is less than fair where another
transfer at an end is held back at its other end, but a change concerns two machines instead of all.
"""

from __future__ import annotations

import heapq
import random
import statistics
from collections.abc import Callable, Iterable
from typing import Protocol

from swarmtrain.network.links.impairments import Lateness
from swarmtrain.network.links.throttle import BYTES_PER_S_OF_MBIT
from swarmtrain.rehearsal import LinksSection
from swarmtrain.simulate.clock import Clock, Timer
from swarmtrain.simulate.systems.messages import SimulatedLink

EXACT_UP_TO = 500
"""Number of machines up to which rates are max-min fair."""
_UNLIMITED_BYTES_PER_S = 1e12
"""Rate of a link without a limit."""


def rates(links: LinksSection) -> tuple[float, float]:
    """Return the bytes per second up and down."""
    up, down = (rate * BYTES_PER_S_OF_MBIT or _UNLIMITED_BYTES_PER_S for rate in (links.up_mbit, links.down_mbit))
    return up, down


def link_of(links: LinksSection, size_bytes: int, rng: random.Random) -> SimulatedLink:
    """Return a volunteer's link, with the latency that transfers of `size_bytes` find."""
    up, down = rates(links)
    return SimulatedLink(latency_s=latency_s(links, size_bytes, rng), bytes_per_s=up, down_bytes_per_s=down)


def latency_s(links: LinksSection, size_bytes: int, rng: random.Random) -> float:
    """Return the latency from an end to the middle: four of them are a round trip.

    It includes half of what jitter and losses add to a transfer of so many bytes, because a pull is two round trips.
    Nothing is lost: in a stream a lost packet comes later.
    """
    rtt_s = links.rtt_ms / 1000
    lateness = Lateness(jitter_s=links.jitter_ms / 1000, loss=links.loss_percent / 100, rtt_s=rtt_s, rng=rng)
    late_s = statistics.mean(lateness.of_transfer(size_bytes, min(rates(links))) for _ in range(20))
    return rtt_s / 4 + late_s / 8


class _End(Protocol):
    name: str
    link: SimulatedLink


class Transfer:
    """Bytes on their way from one machine to another, from `begins_s` on."""

    __slots__ = ("begins_s", "done", "down_per_s", "dst", "left_bytes", "rate", "src", "timer", "up_per_s")

    def __init__(self, src: _End, dst: _End, num_bytes: float, begins_s: float, done: Callable[[bool], None]) -> None:
        self.src, self.dst, self.left_bytes, self.begins_s, self.done = src, dst, num_bytes, begins_s, done
        self.up_per_s, self.down_per_s = src.link.bytes_per_s, dst.link.down_per_s
        """Rates in bytes per second that the sender's uplink and the receiver's downlink carry."""
        self.rate = 0.0
        """Present rate in bytes per second."""
        self.timer: Timer | None = None


class SharedLinks:
    """All transfers of a network. `exact` is True if their rates are max-min fair, which is decided once."""

    def __init__(self, clock: Clock, *, exact: bool | None = None) -> None:
        self._clock = clock
        self.exact = exact
        """True for max-min fair rates, False for equal shares; None until it is decided."""
        self._out: dict[str, dict[Transfer, None]] = {}
        self._in: dict[str, dict[Transfer, None]] = {}
        self._changed: list[Transfer] = []

    def num_out(self, name: str) -> int:
        """Return how many transfers this machine sends now."""
        return len(self._out.get(name, ()))

    def begin(self, src: _End, dst: _End, num_bytes: float, after_s: float, done: Callable[[bool], None]) -> Transfer:
        """Begin a transfer whose bytes flow after `after_s`; `done(True)` at its end, `done(False)` if an end goes."""
        transfer = Transfer(src, dst, num_bytes, self._clock.now + after_s, done)
        out, come = self._out.setdefault(src.name, {}), self._in.setdefault(dst.name, {})
        out[transfer] = come[transfer] = None
        if len(out) == len(come) == 1:  # it shares neither end
            self._set(transfer, min(transfer.up_per_s, transfer.down_per_s))
        else:
            self._share(transfer)
        return transfer

    def gone(self, name: str) -> None:
        """Break all connections of this machine."""
        for transfer in dict.fromkeys([*self._out.get(name, ()), *self._in.get(name, ())]):
            self._end(transfer, False)

    def _end(self, transfer: Transfer, whole: bool) -> None:
        if transfer.timer is not None:
            transfer.timer.cancel()
        shares = False
        for ends, name in (self._out, transfer.src.name), (self._in, transfer.dst.name):
            of_end = ends[name]
            del of_end[transfer]
            if of_end:
                shares = True
            else:
                del ends[name]
        if shares:
            self._share(transfer)
        transfer.done(whole)

    def _share(self, changed: Transfer) -> None:
        """Recompute rates after `changed` has begun or ended. Fair rates are computed once for all changes of a
        moment."""
        if self.exact is not False:
            if not self._changed:
                self._clock.call_at(self._clock.now, self._share_fairly)
            self._changed.append(changed)
            return
        out, come = self._out.get(changed.src.name, {}), self._in.get(changed.dst.name, {})
        for transfer in {**out, **come}:
            up = transfer.up_per_s / len(self._out[transfer.src.name])
            down = transfer.down_per_s / len(self._in[transfer.dst.name])
            self._set(transfer, min(up, down))

    def _share_fairly(self) -> None:
        changed, self._changed = self._changed, []
        if len(changed) == 1 and (star := self._star(changed[0])) is not None:
            self._share_one(*star)
            return
        for transfer, rate in max_min_rates(self._joined(changed)).items():
            self._set(transfer, rate)

    def _star(self, changed: Transfer) -> tuple[float, Iterable[Transfer]] | None:
        """Return the rate of an end and its transfers, if they are all that a change concerns.

        This is the usual case: each transfer is alone at its other end. None otherwise.
        """
        ends = (self._out, changed.src.name, changed.up_per_s), (self._in, changed.dst.name, changed.down_per_s)
        for (of, name, per_s), (of_other, other, _) in ends, ends[::-1]:
            transfers, beside = of.get(name, {}), of_other.get(other, {})
            if len(transfers) < 1 or len(beside) > 1 or (beside and changed not in beside):
                continue
            for one in transfers:
                if len(of_other[one.dst.name if of is self._out else one.src.name]) > 1:
                    return None
            return per_s, transfers
        return None

    def _share_one(self, per_s: float, transfers: Iterable[Transfer]) -> None:
        """Share the rate of one end among its transfers, starting with the one that its other end limits most."""
        ascending = sorted((min(one.up_per_s, one.down_per_s), number, one) for number, one in enumerate(transfers))
        for number, (most, _, one) in enumerate(ascending):
            rate = min(most, per_s / (len(ascending) - number))
            per_s -= rate
            self._set(one, rate)

    def _joined(self, changed: Iterable[Transfer]) -> Iterable[Transfer]:
        """Return all transfers that share an end with one of them, directly or through others."""
        found, left = dict[Transfer, None](), list(changed)
        seen_out, seen_in = set[str](), set[str]()
        while left:
            one = left.pop()
            for ends, seen, name in (self._out, seen_out, one.src.name), (self._in, seen_in, one.dst.name):
                if name not in seen:
                    seen.add(name)
                    if sharing := ends.get(name):
                        found.update(sharing)
                        left.extend(sharing)
        return found

    def _set(self, transfer: Transfer, rate: float) -> None:
        """Set a transfer's rate from now on."""
        if rate == transfer.rate:
            return
        now = self._clock.now
        if now > transfer.begins_s:
            transfer.left_bytes -= transfer.rate * (now - transfer.begins_s)
            transfer.begins_s = now
        transfer.rate = rate
        if transfer.timer is not None:
            transfer.timer.cancel()
        ends_s = transfer.begins_s + max(0.0, transfer.left_bytes) / rate
        transfer.timer = self._clock.call_at(ends_s, self._end, transfer, True)


def max_min_rates(transfers: Iterable[Transfer]) -> dict[Transfer, float]:
    """Return max-min fair rates in bytes per second.

    The end that can give each of its transfers least fixes their rates; then the next end, with what is left.
    """
    uplinks, downlinks = dict[str, _Shared](), dict[str, _Shared]()
    ends_of = dict[Transfer, tuple[_Shared, _Shared]]()
    for transfer in transfers:
        src, dst = transfer.src.name, transfer.dst.name
        if (up := uplinks.get(src)) is None:
            up = uplinks[src] = _Shared(transfer.up_per_s)
        if (down := downlinks.get(dst)) is None:
            down = downlinks[dst] = _Shared(transfer.down_per_s)
        up.left[transfer] = down.left[transfer] = None
        ends_of[transfer] = up, down
    heap = [
        (end.per_s / len(end.left), key, end)
        for which, ends in (("up", uplinks), ("down", downlinks))
        for key, end in (((which, name), end) for name, end in ends.items())
    ]
    heapq.heapify(heap)
    rates: dict[Transfer, float] = {}
    while heap:
        share, key, end = heap[0]
        if not end.left:
            heapq.heappop(heap)
            continue
        if (now := end.per_s / len(end.left)) > share:  # shares only grow: what others could not use
            heapq.heapreplace(heap, (now, key, end))
            continue
        heapq.heappop(heap)
        for transfer in list(end.left):
            rates[transfer] = share
            for other in ends_of[transfer]:
                other.per_s -= share
                del other.left[transfer]
    return rates


class _Shared:
    """Uplink or downlink, and the rate of it that is still to be shared."""

    __slots__ = ("left", "per_s")

    def __init__(self, per_s: float) -> None:
        self.per_s = per_s
        self.left: dict[Transfer, None] = {}
