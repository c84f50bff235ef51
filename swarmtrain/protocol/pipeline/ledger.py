"""What a peer of a stage owes its drivers: each microbatch's gradient enters one step, once, whatever happens.

A driver asks for a forward, later for its backward (of the last stage for both in one, the tail), and acknowledges
when the microbatch has come all the way back to it. Calls are lost, repeated, and come late; drivers die, or start
again elsewhere. So:

- A question asked again is answered from what was computed the first time.
- A gradient enters the batch that is being filled when it is computed. A full batch is closed, the next one is
  filled at the same weights meanwhile, and the step is taken when everything in the closed one is acknowledged. Nobody
  stands still for that.
- What is not acknowledged in time, or is dropped by its driver, is taken out again: its gradient is computed once
  more, from the same input and the same weights, and subtracted. An acknowledgement that comes after that puts it into
  the batch that is filled then. What is acknowledged is not taken out any more, so that nothing is kept for it.
- An attempt that a newer one of the same microbatch replaces is dropped.
- A backward is answered by the weights of its forward, which may be one step older than the present ones.

Pure: no tensors, no clock. The peer does what `due` says, in that order, between two pieces of work.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

__all__ = [
    "Acknowledged",
    "Add",
    "Discard",
    "Due",
    "Forget",
    "Key",
    "Kind",
    "LedgerLimits",
    "Settlement",
    "StageLedger",
    "Subtract",
    "TakeStep",
    "Verdict",
    "Work",
]

Kind: TypeAlias = Literal["forward", "backward", "tail"]

_NONE = (-1, False)
_MOST_FILLED = 2
"""So many batches are filled while a closed one waits to be acknowledged: it should not take longer than one."""
_MOST_KNOWN = 4096
"""Microbatches of which no step was taken yet: of what is acknowledged nothing is kept but that. So many that are
finished are remembered of each driver too: it is taken to need nothing of the older half when they are more."""
_MOST_DRIVERS = 1024
_MOST_LAG = 1
"""How many steps older than the present weights those of a forward may be when its backward comes."""


class Key(NamedTuple):
    """A microbatch's attempt at this stage: a driver counts its microbatches, and its attempts at each."""

    driver: str
    sequence: int
    attempt: int


@dataclass(frozen=True, kw_only=True)
class LedgerLimits:
    """What a peer takes on, and for how long."""

    batch_tokens: int
    """A batch is closed when so many have entered it."""
    ack_wait_s: float = 10.0
    """A closed batch waits so long for what is not acknowledged."""
    hold_s: float = 120.0
    """What a driver has asked is forgotten when it says nothing at all for so long."""
    max_open: int = 64
    """Microbatches begun and not acknowledged, of all drivers: those of which something is kept."""
    max_open_of_driver: int = 32


@dataclass(frozen=True)
class Verdict:
    """What to do with a question: "work" (compute it), "repeat" (as it was answered before, or will be), "busy" (ask
    again a little later, or another), "gone" (start again from this stage's input)."""

    answer: Literal["work", "repeat", "busy", "gone"]
    reason: str = ""


class Acknowledged(NamedTuple):
    """A microbatch that is all the way back, and its loss, mean nats per token: so that every stage knows it."""

    key: Key
    loss: float


@dataclass(frozen=True)
class Settlement:
    """What a driver says of its microbatches: which count, which do not, and the first that it needs anything of.

    `life` is that of the peer when it answered what is acknowledged: one that died since then knows nothing of it, and
    must not count what it may have computed again for a call that was on its way for long.
    """

    life: int
    acknowledged: tuple[Acknowledged, ...]
    dropped: tuple[Key, ...]
    oldest_open: int


@dataclass(frozen=True)
class Work:
    """What is computed by the weights of `version`; a gradient enters `batch`."""

    version: int
    batch: int


@dataclass(frozen=True)
class TakeStep:
    """Take an inner step with the gradient of `batch`, the mean over `tokens`, as is its loss."""

    batch: int
    tokens: int
    loss: float
    microbatches: tuple[Key, ...]


@dataclass(frozen=True)
class Subtract:
    """Compute the gradient of `key` again as it was, and take it out of `batch`."""

    key: Key
    batch: int
    reason: str


@dataclass(frozen=True)
class Add:
    """Compute the gradient of `key` again, by the present weights, and put it into `batch`."""

    key: Key
    batch: int


@dataclass(frozen=True)
class Discard:
    """Nothing of `batch` counts."""

    batch: int


@dataclass(frozen=True)
class Forget:
    """What is kept for `key` is needed no more."""

    key: Key


Due: TypeAlias = TakeStep | Subtract | Add | Discard | Forget


@dataclass
class _Microbatch:
    tokens: int
    version: int
    heard_s: float
    """When its driver last said something of it."""
    asked: set[Kind]
    running: bool = False
    has_forward: bool = False
    has_gradient: bool = False
    """Computed: in a batch, or taken out again."""
    acknowledged: bool = False
    loss: float = 0.0
    taken_out: bool = False
    dropped: bool = False


@dataclass
class _Batch:
    number: int
    tokens: int = 0
    members: dict[Key, None] = field(default_factory=dict)
    num_waiting: int = 0
    """Of its members, those that are not acknowledged."""
    closed_s: float = 0.0


@dataclass
class _Driver:
    oldest_open: int = 0
    """It needs nothing of microbatches before this one any more."""
    finished: dict[int, tuple[int, bool]] = field(default_factory=dict)
    """By sequence, the last attempt that is finished, and whether a step has it."""
    heard_s: float = 0.0
    places: dict[Key, None] = field(default_factory=dict)
    """Its microbatches that are open and not acknowledged."""
    strikes: int = 0
    """So many of its microbatches in a row were not acknowledged in time: it is given half as many places each time."""

    def let_go(self, sequence: int) -> None:
        """It needs nothing of microbatches before `sequence` any more."""
        if sequence > self.oldest_open:
            self.oldest_open = sequence
            self.finished = {n: attempt for n, attempt in self.finished.items() if n >= sequence}


class StageLedger:
    """The microbatches of one peer of a stage. Not for several threads at once."""

    def __init__(self, limits: LedgerLimits, life: int = 0) -> None:
        self.limits, self.life = limits, life
        self.version = 0
        """Of the weights: how many steps were taken."""
        self.counted_tokens = 0
        """That have entered steps."""
        self._open: dict[Key, _Microbatch] = {}
        self._attempts: dict[tuple[str, int], list[Key]] = {}
        """Of what is open, by driver and sequence."""
        self._num_places = 0
        """Open and not acknowledged, of all drivers."""
        self._silent_s = float("-inf")
        """Before that no driver has been silent for too long."""
        self._drivers: dict[str, _Driver] = {}
        self._filling = _Batch(0)
        self._closed: _Batch | None = None
        self._due: deque[Due] = deque()
        self._pressed = False
        """There was no place for a microbatch, and what is in the batch has some: it is closed before it is full, or it
        might never be."""

    @property
    def num_open(self) -> int:
        """Microbatches begun of which no step was taken, and that are not given up."""
        return len(self._open)

    # ------------------------------------------------------------- questions

    def ask(self, key: Key, kind: Kind, tokens: int, now: float) -> Verdict:
        """A driver asks for `kind`; `tokens` are the microbatch's."""
        driver = self._driver(key.driver)
        driver.heard_s = now
        if key.sequence < driver.oldest_open or driver.finished.get(key.sequence, _NONE)[0] >= key.attempt:
            return Verdict("gone", "this microbatch is finished")
        known = self._open.get(key)
        if known is not None:
            known.heard_s = now
            if known.acknowledged:
                return Verdict("gone", "this microbatch is acknowledged")
            if kind in known.asked:
                return Verdict("repeat")
        if kind != "backward":
            if known is not None:
                return Verdict("gone", f"asked for a {kind} of a microbatch that had another question first")
            return self._admit(key, kind, tokens, now)
        if known is None or not self.has_forward(key):
            return Verdict("gone", "its forward is not known here")
        if self.version - known.version > _MOST_LAG:
            self._drop(key, "its weights are too old")
            return Verdict("gone", f"the weights have moved on by {self.version - known.version} steps since")
        known.asked.add(kind)
        return Verdict("work")

    def _admit(self, key: Key, kind: Kind, tokens: int, now: float) -> Verdict:
        same = list(self._attempts.get(key[:2], ()))
        if same and any(other.attempt > key.attempt or self._open[other].acknowledged for other in same):
            return Verdict("gone", "a newer attempt at this microbatch is known, or one that is acknowledged")
        for other in same:
            self._drop(other, "another attempt takes its place")
        if (reason := self.full(key)) is not None:
            self._pressed = self._pressed or self._filling.num_waiting > 0 or len(self._open) >= _MOST_KNOWN
            return Verdict("busy", reason)
        self._open[key] = _Microbatch(tokens=tokens, version=self.version, heard_s=now, asked={kind})
        self._attempts.setdefault(key[:2], []).append(key)
        self._drivers[key.driver].places[key] = None
        self._num_places += 1
        return Verdict("work")

    def _free_place(self, key: Key) -> None:
        self._num_places -= 1
        del self._drivers[key.driver].places[key]

    def full(self, key: Key) -> str | None:
        """Why no place is free for a new microbatch `key`; None if one is."""
        if key[:2] in self._attempts:
            return None  # it takes the place of an older attempt
        if self._closed is not None:
            coming = sum(each.tokens for each in self._open.values() if not each.has_gradient or each.taken_out)
            if self._filling.tokens + coming >= _MOST_FILLED * self.limits.batch_tokens:
                return "a batch waits for its drivers to acknowledge it, and the next one is full"
        if len(self._open) >= _MOST_KNOWN:
            return f"{_MOST_KNOWN} microbatches wait for a step here"
        if self._num_places >= self.limits.max_open:
            return f"{self._num_places} microbatches are open here"
        driver = self._drivers.get(key.driver)
        most = self.limits.max_open_of_driver >> min(driver.strikes if driver is not None else 0, 32)
        if driver is not None and len(driver.places) >= max(1, most):
            return "too many microbatches of this driver are open here"
        return None

    def has_forward(self, key: Key) -> bool:
        """Whether a backward of `key` has something to go back through."""
        known = self._open.get(key)
        return known is not None and known.has_forward and not known.dropped

    def begin(self, key: Key, kind: Kind) -> Work | None:
        """The peer begins to compute it; None: it was dropped, or its weights are too old by now.

        A forward has the version of the weights of this moment. Until `computed` says that it is done, nothing that
        is due is asked for.
        """
        known = self._open.get(key)
        if known is None:
            return None
        if kind != "backward":
            known.version = self.version
        elif self.version - known.version > _MOST_LAG:
            self._drop(key, "its weights are too old")
            return None
        known.running = True
        return Work(known.version, self._filling.number)

    def computed(self, key: Key, kind: Kind, now: float) -> None:
        """It is computed; what is not a forward has put a gradient into the batch that `begin` named."""
        known = self._open[key]
        known.running, known.heard_s = False, now
        if kind == "forward":
            known.has_forward = True
        else:
            self._put_in(key, known)
        if known.dropped:
            self._drop(key, "dropped while it was computed")

    def failed(self, key: Key) -> None:
        """It could not be computed, by its driver's fault: it is given up, and its driver given fewer places."""
        self._open[key].running = False
        self._drivers[key.driver].strikes += 1
        self._drop(key, "it could not be computed")

    def stopped(self) -> None:
        """Nobody computes any more: what has no gradient yet is given up, by no fault of its driver."""
        for key in [key for key, known in self._open.items() if not known.has_gradient]:
            self._drop(key, "this peer stopped training")

    def _put_in(self, key: Key, known: _Microbatch) -> None:
        known.has_gradient = True
        self._filling.tokens += known.tokens
        self._filling.members[key] = None
        self._filling.num_waiting += 1

    # ------------------------------------------------------------- what drivers say

    def acknowledge(self, key: Key, loss: float, now: float) -> bool:
        """Its driver has what it asked for: the gradient may count. False if it is too late for that, or never was."""
        if (driver := self._drivers.get(key.driver)) is not None:
            driver.heard_s = now
            if driver.finished.get(key.sequence) == (key.attempt, True):
                return True  # said again
        known = self._open.get(key)
        if known is None or not known.has_gradient or known.dropped:
            return False
        if known.taken_out:
            known.taken_out = False
            self._put_in(key, known)
            self._due.append(Add(key, self._filling.number))
        if not known.acknowledged:
            self._due.append(Forget(key))
            self._free_place(key)
            batch = self._batch_of(key)
            assert batch is not None
            batch.num_waiting -= 1
        known.acknowledged, known.loss, known.heard_s = True, loss, now
        self._drivers[key.driver].strikes = 0
        return True

    def settle(self, driver: str, settlement: Settlement, now: float) -> set[Key]:
        """What `driver` says of its own microbatches; those acknowledged that cannot count any more."""
        mine = settlement.life == self.life
        late = {key for key, loss in settlement.acknowledged if not (mine and self.acknowledge(key, loss, now))}
        for key in settlement.dropped:
            self.drop(key)
        self.oldest_open(driver, settlement.oldest_open, now)
        return late

    def drop(self, key: Key) -> None:
        """Its driver started again elsewhere: the gradient must not count. Not after it was acknowledged."""
        if (known := self._open.get(key)) is not None and not known.acknowledged:
            self._drop(key, "dropped by its driver")

    def oldest_open(self, driver: str, sequence: int, now: float) -> None:
        """The driver needs nothing of microbatches before `sequence` any more, and will not ask again."""
        known = self._driver(driver)
        known.heard_s = now
        if sequence <= known.oldest_open:
            return
        known.let_go(sequence)
        for key in [key for key in known.places if key.sequence < sequence]:
            self._drop(key, "given up by its driver")

    def _driver(self, name: str) -> _Driver:
        """What is known of it; of very many, those with nothing open that were heard of longest ago are forgotten."""
        driver = self._drivers.pop(name, None) or _Driver()
        self._drivers[name] = driver  # the last one heard of stands last
        if len(self._drivers) > _MOST_DRIVERS:
            busy = {key.driver for key in self._open} | {name}
            if (idle := next((other for other in self._drivers if other not in busy), None)) is not None:
                del self._drivers[idle]
        return driver

    # ------------------------------------------------------------- what is to be done

    def due(self, now: float) -> Due | None:
        """What the peer is to do next, besides the work that was asked for; None: nothing at present."""
        if not self._due:
            if self._closed is None and self._filling.members:
                self._close(now)
            if self._closed is not None:
                self._settle(self._closed, now)
            if now >= self._silent_s:
                self._forget_silent(now)
        return self._due.popleft() if self._due else None

    def close_batch(self) -> bool:
        """No more will come to fill it: the batch is closed with what it has. Whether `due` does so next."""
        self._pressed = bool(self._filling.members)
        return self._pressed and self._closed is None

    @property
    def has_settled(self) -> bool:
        """Whether no batch has a gradient that may enter a step."""
        return self._closed is None and not self._filling.members

    def next_s(self) -> float | None:
        """When `due` may have something though nobody said anything; None: not before somebody does."""
        return None if self._closed is None else self._closed.closed_s + self.limits.ack_wait_s

    def _close(self, now: float) -> None:
        if self._filling.tokens >= self.limits.batch_tokens or self._pressed:
            self._pressed = False
            self._closed, self._filling = self._filling, _Batch(self._filling.number + 1)
            self._closed.closed_s = now

    def _settle(self, closed: _Batch, now: float) -> None:
        """Step with the closed batch if all of it is acknowledged; take out what is not in time."""
        if closed.num_waiting and now < closed.closed_s + self.limits.ack_wait_s:
            return
        for key in [key for key in closed.members if not self._open[key].acknowledged] if closed.num_waiting else ():
            self._take_out(key, closed, "not acknowledged in time")
            self._drivers[key.driver].strikes += 1
        self._closed = None
        if not closed.members:
            self._due.append(Discard(closed.number))
            return
        keys = tuple(closed.members)
        loss = sum(self._open[key].loss * self._open[key].tokens for key in keys) / closed.tokens
        self._due.append(TakeStep(closed.number, closed.tokens, loss, keys))
        self.version += 1
        self.counted_tokens += closed.tokens
        for key in keys:
            self._finish(key, counted=True)
        self._drop_old()

    def _drop_old(self) -> None:
        """Forwards whose backward would come too late: their weights need not be kept."""
        for key, known in list(self._open.items()):
            waits = known.has_forward and not known.has_gradient and "backward" not in known.asked
            if waits and self.version - known.version > _MOST_LAG:
                self._drop(key, "its weights are too old")

    def _take_out(self, key: Key, batch: _Batch, reason: str) -> None:
        known = self._open[key]
        batch.members.pop(key)
        batch.num_waiting -= 1
        batch.tokens -= known.tokens
        self._silent_s = float("-inf")
        known.taken_out = True
        self._due.append(Subtract(key, batch.number, reason))

    def _batch_of(self, key: Key) -> _Batch | None:
        if key in self._filling.members:
            return self._filling
        return self._closed if self._closed is not None and key in self._closed.members else None

    def _drop(self, key: Key, reason: str) -> None:
        """Its gradient must not count; what is kept of it is forgotten as soon as that is settled."""
        known = self._open[key]
        known.dropped = True
        if (batch := self._batch_of(key)) is not None:
            self._take_out(key, batch, reason)
        if not known.running:
            self._finish(key, counted=False)

    def _finish(self, key: Key, *, counted: bool) -> None:
        acknowledged = self._open.pop(key).acknowledged
        self._attempts[key[:2]].remove(key)
        if not self._attempts[key[:2]]:
            del self._attempts[key[:2]]
        driver = self._driver(key.driver)
        if key.sequence >= driver.oldest_open:
            driver.finished[key.sequence] = max((key.attempt, counted), driver.finished.get(key.sequence, _NONE))
            if len(driver.finished) > _MOST_KNOWN:
                driver.let_go(sorted(driver.finished)[_MOST_KNOWN // 2])
        if not acknowledged:
            self._due.append(Forget(key))
            self._free_place(key)

    def _forget_silent(self, now: float) -> None:
        """Forget what no driver has said anything of for long, and drivers that are gone."""
        self._silent_s = now + self.limits.hold_s
        for key, known in list(self._open.items()):
            if self._batch_of(key) is not None:
                continue
            heard_s = max(known.heard_s, self._drivers[key.driver].heard_s)
            if now >= heard_s + self.limits.hold_s:
                self._drop(key, "its driver says nothing")
            else:
                self._silent_s = min(self._silent_s, heard_s + self.limits.hold_s)
        busy = {key.driver for key in self._open}
        for name, driver in list(self._drivers.items()):
            if now >= driver.heard_s + 10 * self.limits.hold_s and name not in busy:
                del self._drivers[name]
