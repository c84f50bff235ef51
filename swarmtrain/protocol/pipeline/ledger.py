"""Rules by which each microbatch's gradient enters one step of a stage, once, whatever happens to peers and calls.

A driver asks for a forward and later for its backward; of the last stage it asks for both in one, the *tail*. It
acknowledges when the microbatch has come all the way back. Calls are lost, repeated and late; drivers die, or start a
microbatch again elsewhere. So:

- A repeated question is answered with what was computed the first time.
- A gradient enters the batch that is being filled when it is computed. A full batch is closed, and the next one is
  filled at the same weights meanwhile. The step is taken when everything in the closed batch is acknowledged. Nobody
  waits for that.
- What is not acknowledged in time, or is dropped by its driver, is taken out again: its gradient is computed once more,
  from the same input and the same weights, and subtracted. An acknowledgement that comes after that adds it to the
  batch that is filled then. What is acknowledged is never taken out, so nothing is kept for it.
- A newer attempt at a microbatch replaces the older one, which is dropped.
- A backward is computed by the weights of its forward, which may be one step older than the present ones.

Everything here is pure, without tensors or a clock. The peer does what `due` returns, in that order, between two parts
of its work. See decision 26.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

Kind: TypeAlias = Literal["forward", "backward", "tail"]
"""Part of a microbatch at one stage."""

_NONE = (-1, False)
"""(attempt, entered a step) of a microbatch that is not finished."""
_MOST_FILLED = 2
"""Size of the filling batch, in batches, up to which microbatches are accepted while a closed batch waits for
acknowledgements, which should take no longer than filling one."""
_MOST_KNOWN = 4096
"""Limit of microbatches without a step; almost nothing is kept of those that are acknowledged. It also limits the
finished microbatches that are remembered of each driver: above it, the driver is assumed to need nothing of the older
half."""
_MOST_DRIVERS = 1024
"""Limit of drivers that are remembered."""
_MOST_LAG = 1
"""Steps by which the weights of a forward may be older than the present ones when its backward comes."""


class Key(NamedTuple):
    """Attempt at a microbatch at this stage. A driver numbers its microbatches, and its attempts at each."""

    driver: str
    sequence: int
    attempt: int


@dataclass(frozen=True, kw_only=True)
class LedgerLimits:
    """Limits on how much a peer accepts, and for how long."""

    batch_tokens: int
    """Tokens at which a batch is closed."""
    ack_wait_s: float = 10.0
    """Seconds that a closed batch waits for acknowledgements."""
    hold_s: float = 120.0
    """Seconds of complete silence after which a driver's microbatches are forgotten."""
    max_open: int = 64
    """Limit of microbatches begun and not acknowledged, of all drivers; something is kept of each."""
    max_open_of_driver: int = 32


@dataclass(frozen=True)
class Verdict:
    """Answer to a question.

    - "work": compute it;
    - "repeat": it was or will be computed for an earlier question;
    - "busy": ask again later, or another peer;
    - "gone": start again from this stage's input.
    """

    answer: Literal["work", "repeat", "busy", "gone"]
    reason: str = ""


class Acknowledged(NamedTuple):
    """Microbatch that has come all the way back, and its loss in mean nats per token, so that every stage knows it."""

    key: Key
    loss: float


@dataclass(frozen=True)
class Settlement:
    """Message of a driver about its microbatches: which count, which do not, and the first of which it needs anything.

    `incarnation` is the incarnation of the peer that computed the acknowledged gradients. A peer that died and
    restarted since
    then does not have them, and must not count what it may have computed again for a call that was under way for long.
    """

    incarnation: int
    acknowledged: tuple[Acknowledged, ...]
    dropped: tuple[Key, ...]
    oldest_open: int


@dataclass(frozen=True)
class Work:
    """Weights by which a part is computed (`version`), and the batch that its gradient enters."""

    version: int
    batch: int


@dataclass(frozen=True)
class TakeStep:
    """Command to take an inner step with the gradient of `batch`. Gradient and loss are means over `tokens`."""

    batch: int
    tokens: int
    loss: float
    microbatches: tuple[Key, ...]


@dataclass(frozen=True)
class Subtract:
    """Command to compute the gradient of `key` again, by the same weights, and subtract it from `batch`."""

    key: Key
    batch: int
    reason: str


@dataclass(frozen=True)
class Add:
    """Command to compute the gradient of `key` again, by the present weights, and add it to `batch`."""

    key: Key
    batch: int


@dataclass(frozen=True)
class Discard:
    """Command to discard `batch`: none of it counts."""

    batch: int


@dataclass(frozen=True)
class Forget:
    """Command to drop everything that is kept for `key`."""

    key: Key


Due: TypeAlias = TakeStep | Subtract | Add | Discard | Forget
"""Work that the ledger asks the peer to do, besides the forwards, backwards and tails that drivers ask for."""


@dataclass
class _Microbatch:
    """State of one attempt at a microbatch."""

    tokens: int
    version: int
    heard_s: float
    """Time when the microbatch's driver last said anything about it."""
    asked: set[Kind]
    running: bool = False
    has_forward: bool = False
    has_gradient: bool = False
    """True if the gradient was computed; it is in a batch, or was taken out again."""
    acknowledged: bool = False
    loss: float = 0.0
    taken_out: bool = False
    dropped: bool = False


@dataclass
class _Batch:
    """Batch of gradients, and the number of its members that wait for an acknowledgement."""

    number: int
    tokens: int = 0
    members: dict[Key, None] = field(default_factory=dict)
    num_waiting: int = 0
    """Members that are not acknowledged."""
    closed_s: float = 0.0


@dataclass
class _Driver:
    """State of one driver."""

    oldest_open: int = 0
    """First microbatch of which the driver still needs anything."""
    finished: dict[int, tuple[int, bool]] = field(default_factory=dict)
    """Last finished attempt by sequence, and whether it entered a step."""
    heard_s: float = 0.0
    places: dict[Key, None] = field(default_factory=dict)
    """Microbatches of this driver that are open and not acknowledged."""
    strikes: int = 0
    """Microbatches in a row that were not acknowledged in time; each halves the driver's number of places."""

    def let_go(self, sequence: int) -> None:
        """Forget finished microbatches before `sequence`."""
        if sequence > self.oldest_open:
            self.oldest_open = sequence
            self.finished = {n: attempt for n, attempt in self.finished.items() if n >= sequence}


class StageLedger:
    """Microbatches of one peer of a stage. Not thread-safe."""

    def __init__(self, limits: LedgerLimits, incarnation: int = 0) -> None:
        self.limits, self.incarnation = limits, incarnation
        self.version = 0
        """Version of the weights: the number of steps taken."""
        self.counted_tokens = 0
        """Tokens that have entered steps."""
        self._open: dict[Key, _Microbatch] = {}
        self._attempts: dict[tuple[str, int], list[Key]] = {}
        """Keys of open microbatches, by driver and sequence."""
        self._num_places = 0
        """Microbatches open and not acknowledged, of all drivers."""
        self._silent_s = float("-inf")
        """Time before which no driver can have been silent for too long."""
        self._drivers: dict[str, _Driver] = {}
        self._filling = _Batch(0)
        self._closed: _Batch | None = None
        self._due: deque[Due] = deque()
        self._pressed = False
        """True to close the filling batch before it is full. It occupies places without which it might never become
        full."""

    @property
    def num_open(self) -> int:
        """Microbatches begun that have neither entered a step nor been given up."""
        return len(self._open)

    # ------------------------------------------------------------- questions

    def ask(self, key: Key, kind: Kind, tokens: int, now: float) -> Verdict:
        """Decide about a driver's question for `kind`; `tokens` are the microbatch's."""
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
        """Accept a new microbatch, which replaces an older attempt at it; "busy" if there is no place."""
        # A driver makes a new attempt only after it gave up the older one. Calls may arrive in another order.
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
        """Return the reason why there is no place for a new microbatch `key`; None if there is one."""
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
        """Return whether a backward of `key` has a forward to go back through."""
        known = self._open.get(key)
        return known is not None and known.has_forward and not known.dropped

    def begin(self, key: Key, kind: Kind) -> Work | None:
        """Record that the peer begins to compute a part; None if it was dropped, or its weights are too old by now.

        A forward uses the weights of this moment. Call `computed` or `failed` before the next `due`.
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
        """Record that a part is computed. Except for a forward, its gradient is in the batch that `begin` named."""
        known = self._open[key]
        known.running, known.heard_s = False, now
        if kind == "forward":
            known.has_forward = True
        else:
            self._put_in(key, known)
        if known.dropped:
            self._drop(key, "dropped while it was computed")

    def failed(self, key: Key) -> None:
        """Give up a microbatch that could not be computed because of its driver; the driver gets fewer places."""
        self._open[key].running = False
        self._drivers[key.driver].strikes += 1
        self._drop(key, "it could not be computed")

    def stopped(self) -> None:
        """Give up every microbatch without a gradient, because this peer stops computing, which is no driver's
        fault."""
        for key in [key for key, known in self._open.items() if not known.has_gradient]:
            self._drop(key, "this peer stopped training")

    def _put_in(self, key: Key, known: _Microbatch) -> None:
        known.has_gradient = True
        self._filling.tokens += known.tokens
        self._filling.members[key] = None
        self._filling.num_waiting += 1

    # ------------------------------------------------------------- what drivers say

    def acknowledge(self, key: Key, loss: float, now: float) -> bool:
        """Record that the microbatch has passed all stages. Return False if its gradient cannot count."""
        if (driver := self._drivers.get(key.driver)) is not None:
            driver.heard_s = now
            if driver.finished.get(key.sequence) == (key.attempt, True):
                return True  # a repeated acknowledgement
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
        """Apply a driver's settlement. Return the acknowledged microbatches that cannot count any more."""
        mine = settlement.incarnation == self.incarnation
        late = {key for key, loss in settlement.acknowledged if not (mine and self.acknowledge(key, loss, now))}
        for key in settlement.dropped:
            self.drop(key)
        self.oldest_open(driver, settlement.oldest_open, now)
        return late

    def drop(self, key: Key) -> None:
        """Drop a microbatch that its driver has started again elsewhere, unless it is acknowledged."""
        if (known := self._open.get(key)) is not None and not known.acknowledged:
            self._drop(key, "dropped by its driver")

    def oldest_open(self, driver: str, sequence: int, now: float) -> None:
        """Record that the driver needs nothing of microbatches before `sequence`, and will not ask for them again."""
        known = self._driver(driver)
        known.heard_s = now
        if sequence <= known.oldest_open:
            return
        known.let_go(sequence)
        for key in [key for key in known.places if key.sequence < sequence]:
            self._drop(key, "given up by its driver")

    def _driver(self, name: str) -> _Driver:
        """Return the record of a driver. Above the limit, the idle driver that was heard from longest ago is
        forgotten."""
        driver = self._drivers.pop(name, None) or _Driver()
        self._drivers[name] = driver  # the last one heard of stands last
        if len(self._drivers) > _MOST_DRIVERS:
            busy = {key.driver for key in self._open} | {name}
            if (idle := next((other for other in self._drivers if other not in busy), None)) is not None:
                del self._drivers[idle]
        return driver

    # ------------------------------------------------------------- what is to be done

    def due(self, now: float) -> Due | None:
        """Return the next work for the peer besides the parts that drivers asked for; None: nothing at present."""
        if not self._due:
            if self._closed is None and self._filling.members:
                self._close(now)
            if self._closed is not None:
                self._step_if_acknowledged(self._closed, now)
            if now >= self._silent_s:
                self._forget_silent(now)
        return self._due.popleft() if self._due else None

    def close_batch(self) -> bool:
        """Close the filling batch with what it has, because no more will come. Return whether `due` does that next."""
        self._pressed = bool(self._filling.members)
        return self._pressed and self._closed is None

    @property
    def has_nothing_open(self) -> bool:
        """True if no batch has a gradient that may enter a step."""
        return self._closed is None and not self._filling.members

    def next_s(self) -> float | None:
        """Return the time at which `due` may have something although no event came; None: not before another event."""
        return None if self._closed is None else self._closed.closed_s + self.limits.ack_wait_s

    def _close(self, now: float) -> None:
        if self._filling.tokens >= self.limits.batch_tokens or self._pressed:
            self._pressed = False
            self._closed, self._filling = self._filling, _Batch(self._filling.number + 1)
            self._closed.closed_s = now

    def _step_if_acknowledged(self, closed: _Batch, now: float) -> None:
        """Take the step of the closed batch if all of it is acknowledged, or take out what is late and step
        without it."""
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
        """Drop forwards whose backward would come too late, so that their weights need not be kept."""
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
        """Exclude a microbatch's gradient; what is kept of it is forgotten as soon as nothing is computed of it."""
        known = self._open[key]
        known.dropped = True
        if (batch := self._batch_of(key)) is not None:
            self._take_out(key, batch, reason)
        if not known.running:
            self._finish(key, counted=False)

    def _finish(self, key: Key, *, counted: bool) -> None:
        """Close a microbatch that entered a step (`counted`) or was given up."""
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
        """Forget microbatches whose driver has been silent for too long, and drivers that are gone."""
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
