"""Transfers share the links of their ends: whoever sends to four at once sends to each at a quarter of its rate.

Of few machines the rates are max-min fair, about as those of TCP connections with equal round trips: no transfer can
have more without one that has no more than it having less (Bertsekas and Gallager, Data Networks, section 6.5). Of
many, a transfer has the smaller of its equal shares of both ends: that is less where another one at an end is held
back at its other end, and a change concerns two machines instead of everybody.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias

from swarmtrain.simulate.clock import Clock, Timer
from swarmtrain.simulate.messages import Link

__all__ = ["EXACT_UP_TO", "SharedLinks", "Transfer", "max_min_rates"]

EXACT_UP_TO = 500
"""Machines, up to which rates are max-min fair."""


class _End(Protocol):
    name: str
    link: Link


class Transfer:
    """So many bytes on their way from one machine to another, from `begins_s` on."""

    __slots__ = ("begins_s", "done", "dst", "left_bytes", "rate", "src", "timer")

    def __init__(self, src: _End, dst: _End, num_bytes: float, begins_s: float, done: Callable[[bool], None]) -> None:
        self.src, self.dst, self.left_bytes, self.begins_s, self.done = src, dst, num_bytes, begins_s, done
        self.rate = 0.0
        """Bytes a second, now."""
        self.timer: Timer | None = None


class SharedLinks:
    """All transfers of a network; `exact`: whether their rates are max-min fair."""

    def __init__(self, clock: Clock, *, exact: bool = True) -> None:
        self._clock, self.exact = clock, exact
        self._out: dict[str, dict[Transfer, None]] = {}
        self._in: dict[str, dict[Transfer, None]] = {}
        self._changed: list[Transfer] = []

    def num_out(self, name: str) -> int:
        """How many transfers this machine sends."""
        return len(self._out.get(name, ()))

    def begin(self, src: _End, dst: _End, num_bytes: float, after_s: float, done: Callable[[bool], None]) -> Transfer:
        """Bytes that begin to come after `after_s`; `done(True)` when all are here, `done(False)` if an end goes."""
        transfer = Transfer(src, dst, num_bytes, self._clock.now + after_s, done)
        self._out.setdefault(src.name, {})[transfer] = None
        self._in.setdefault(dst.name, {})[transfer] = None
        self._share(transfer)
        return transfer

    def gone(self, name: str) -> None:
        """This machine's connections break."""
        for transfer in dict.fromkeys([*self._out.get(name, ()), *self._in.get(name, ())]):
            self._end(transfer, False)

    def _end(self, transfer: Transfer, whole: bool) -> None:
        if transfer.timer is not None:
            transfer.timer.cancel()
        for ends, name in (self._out, transfer.src.name), (self._in, transfer.dst.name):
            of_end = ends[name]
            del of_end[transfer]
            if not of_end:
                del ends[name]
        self._share(transfer)
        transfer.done(whole)

    def _share(self, changed: Transfer) -> None:
        """Rates anew, now that `changed` has come or gone; max-min fair ones once for all changes of a moment."""
        if self.exact:
            if not self._changed:
                self._clock.call_at(self._clock.now, self._share_fairly)
            self._changed.append(changed)
            return
        out, come = self._out.get(changed.src.name, {}), self._in.get(changed.dst.name, {})
        for transfer in {**out, **come}:
            up = transfer.src.link.bytes_per_s / len(self._out[transfer.src.name])
            down = transfer.dst.link.down_per_s / len(self._in[transfer.dst.name])
            self._set(transfer, min(up, down))

    def _share_fairly(self) -> None:
        changed, self._changed = self._changed, []
        for transfer, rate in max_min_rates(self._joined(changed)).items():
            self._set(transfer, rate)

    def _joined(self, changed: Iterable[Transfer]) -> Iterable[Transfer]:
        """All that share an end with one of them, or with one that does, and so on."""
        found: dict[Transfer, None] = {}
        out, come = dict.fromkeys(one.src.name for one in changed), dict.fromkeys(one.dst.name for one in changed)
        seen_out, seen_in = set[str](), set[str]()
        while out or come:
            new = [one for name in out for one in self._out.get(name, ())]
            new += [one for name in come for one in self._in.get(name, ())]
            seen_out.update(out)
            seen_in.update(come)
            found.update(dict.fromkeys(new))
            out = dict.fromkeys(one.src.name for one in new if one.src.name not in seen_out)
            come = dict.fromkeys(one.dst.name for one in new if one.dst.name not in seen_in)
        return found

    def _set(self, transfer: Transfer, rate: float) -> None:
        """It goes on at this rate."""
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
    """Max-min fair rates, in bytes a second: the end that can give each of its transfers least fixes theirs, and on."""
    ends: dict[_Key, _Shared] = {}
    for transfer in transfers:
        for key, per_s in _ends(transfer):
            if key not in ends:
                ends[key] = _Shared(per_s)
            ends[key].left[transfer] = None
    heap = [(end.share, key) for key, end in ends.items()]
    heapq.heapify(heap)
    rates: dict[Transfer, float] = {}
    while heap:
        share, key = heapq.heappop(heap)
        end = ends[key]
        if not end.left:
            continue
        if end.share > share:  # shares only grow: what others could not use
            heapq.heappush(heap, (end.share, key))
            continue
        for transfer in list(end.left):
            rates[transfer] = share
            for other, _ in _ends(transfer):
                ends[other].give(transfer, share)
    return rates


_Key: TypeAlias = tuple[str, str]


class _Shared:
    """An uplink or a downlink, less what was given."""

    __slots__ = ("left", "per_s")

    def __init__(self, per_s: float) -> None:
        self.per_s = per_s
        self.left: dict[Transfer, None] = {}

    @property
    def share(self) -> float:
        return self.per_s / len(self.left) if self.left else 0.0

    def give(self, transfer: Transfer, rate: float) -> None:
        self.per_s -= rate
        del self.left[transfer]


def _ends(transfer: Transfer) -> tuple[tuple[_Key, float], tuple[_Key, float]]:
    """The uplink and the downlink that it is on, with what they carry."""
    src, dst = transfer.src, transfer.dst
    return (("up", src.name), src.link.bytes_per_s), (("down", dst.name), dst.link.down_per_s)
