"""Driving microbatches through the stages: who computes each part, and what happens when one of them does not.

A driver keeps the input of every stage until the microbatch has come all the way back, so that any peer of a stage can
take over from there. A forward that fails is asked of another peer. A backward is asked again of the peer that has the
forward, which answers it as it did; if that peer is gone, the microbatch begins again at that stage, and with it all
later ones, whose gradients are dropped. When it is back, everyone who has a part in it is told, until they know.

Runs in the network thread. What travels is opaque here.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from swarmtrain.errors import BadBytesError, BusyError, GoneError, PeerError, UnreachableError
from swarmtrain.network.tasks import end_tasks, logged
from swarmtrain.protocol.microbatches import Acknowledged, Key, Kind, Settlement
from swarmtrain.protocol.routing import WORK_SHARES, Router

__all__ = ["Answered", "Driven", "Driver", "Part", "StageCalls", "Tail", "Told"]

_log = logging.getLogger(__name__)
_BACKWARD_ATTEMPTS = 3
_ALL_FAILED_S = 2.0
_LOOK_S = 0.5
"""So often a driver looks whether a stage has somebody again."""
_AGAIN_S, _MOST_AGAIN_S = 0.5, 5.0
_SETTLE_LIMIT_S = 5.0
_MOST_SETTLED = 1024
_GIVE_UP_S = 60.0
"""A peer that does not answer for so long is not told any more what was acknowledged: it is dead, or takes it out."""


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """Some sequences of a driver's data: what the first stage takes, what the last one compares with."""

    sequence: int
    tokens: int
    x: Any
    targets: Any


@dataclass(frozen=True)
class Tail:
    """What the last stage answers: the loss, mean nats per token, and the gradient of its input."""

    loss: float
    gradient: Any


@dataclass(frozen=True)
class Part:
    """A microbatch's attempt at a stage."""

    stage: int
    key: Key
    tokens: int


@dataclass(frozen=True)
class Answered:
    """What a stage's peer computed, and in which of its lives."""

    value: Any
    life: int


class StageCalls(Protocol):
    """How stages are asked. Every call may raise a PeerError: BusyError, GoneError, UnreachableError, BadBytesError."""

    async def forward(self, peer: str, part: Part, x: Any) -> Answered:
        """What the next stage takes."""

    async def backward(self, peer: str, part: Part, gradient: Any) -> Answered:
        """The gradient of the stage's input, given that of its output; None of the first stage."""

    async def tail(self, peer: str, part: Part, x: Any, targets: Any) -> Answered:
        """Forward, loss and backward of the last stage: a `Tail`."""

    async def settle(self, peer: str, stage: int, settlement: Settlement) -> set[Key]:
        """Tell what counts and what does not; those acknowledged for which it is too late."""


class Told(Protocol):
    """What a driver tells."""

    def retried(self, sequence: int, stage: int, peer: str, reason: str) -> None:
        """A part of a microbatch is asked again, or of another."""

    def refused(self, peer: str, error: PeerError) -> None:
        """A peer answered what it must not."""

    def lost(self, stage: int, peer: str, key: Key, reason: str) -> None:
        """The gradient of a microbatch does not count at this stage, though it was computed."""


@dataclass(frozen=True)
class Driven:
    """A microbatch that is back: its number and its loss, mean nats per token."""

    sequence: int
    loss: float


class _BeginAgainError(Exception):
    """From the input of this stage."""

    def __init__(self, stage: int) -> None:
        super().__init__(stage)
        self.stage = stage


@dataclass
class _Way:
    """A microbatch on its way: by stage its input, and who computed it."""

    microbatch: Microbatch
    inputs: list[Any]
    places: list[tuple[str, Key] | None]
    attempts: list[int]
    lives: list[int]
    """Of those who computed the gradients."""


class _Whom(NamedTuple):
    peer: str
    stage: int
    life: int


_ANY_LIFE = 0


@dataclass
class _Settling:
    """What one life of a peer is to be told of one stage."""

    acknowledged: dict[Key, float] = field(default_factory=dict)
    """With the loss."""
    dropped: set[Key] = field(default_factory=set)
    task: asyncio.Task[None] | None = None


@dataclass(eq=False)
class _Wait:
    """For an answer of a later stage."""

    stage: int
    peer: str
    began_s: float
    """In the event loop's time."""
    limit: asyncio.Timeout


@dataclass
class Driver:
    """The microbatches of one driver."""

    me: str
    routers: Sequence[Router]
    """Of each stage but the first, which is this peer's own."""
    calls: StageCalls
    told: Told
    now: Callable[[], float]
    next_sequence: int
    """Above all that this peer has given in its lives before: others remember those."""
    _ways: dict[int, _Way] = field(default_factory=dict)
    _waits: set[_Wait] = field(default_factory=set)
    _settling: dict[_Whom, _Settling] = field(default_factory=dict)

    @property
    def num_stages(self) -> int:
        """The first one included."""
        return len(self.routers) + 1

    @property
    def oldest_open(self) -> int:
        """Nothing is needed any more of microbatches before this one."""
        return min(self._ways, default=self.next_sequence)

    def see(self, peers: Mapping[int, Collection[str]]) -> None:
        """Who holds each stage now. A peer that has left, or was lost, has no more than the least time for what it was
        asked: one that has not answered yet, or was slow, would have minutes."""
        for stage, router in enumerate(self.routers, start=1):
            router.set_peers(peers[stage])
        for wait in self._waits:
            router = self.routers[wait.stage - 1]
            end_s, least_s = wait.limit.when(), wait.began_s + router.least_limit_s
            if not router.has(wait.peer) and end_s is not None and end_s > least_s:
                wait.limit.reschedule(least_s)

    async def drive(self, tokens: int, x: Any, targets: Any) -> Driven:
        """Some sequences all the way there and back. If it is cancelled, nothing of them counts.

        Raises the GoneError of this peer's own stage, which trains no more then.
        """
        stages, sequence = self.num_stages, self.next_sequence
        self.next_sequence += 1
        microbatch = Microbatch(sequence=sequence, tokens=tokens, x=x, targets=targets)
        way = _Way(microbatch, [x, *[None] * (stages - 1)], [None] * stages, [0] * stages, [0] * stages)
        self._ways[sequence] = way
        try:
            tail = await self._there_and_back(way)
        except BaseException:
            self._drop(way, 0)
            raise
        finally:
            del self._ways[sequence]
        for stage, place in enumerate(way.places):
            assert place is not None
            peer, key = place
            whom = _Whom(peer, stage, way.lives[stage])
            self._settling_of(whom).acknowledged[key] = tail.loss
            self._settle(whom)
        return Driven(sequence, tail.loss)

    async def _there_and_back(self, way: _Way) -> Tail:
        """As often as it takes."""
        stage = 0
        while True:
            try:
                tail = await self._there(way, stage)
                await self._back(way, tail)
                return tail
            except _BeginAgainError as error:
                stage = error.stage
                self._drop(way, stage)

    async def settled(self) -> None:
        """Wait until everyone knows what counts, or is given up."""
        while tasks := [task for each in self._settling.values() if (task := each.task) is not None]:
            await asyncio.wait(tasks)

    async def stop(self) -> None:
        """Tell nobody anything any more."""
        await end_tasks([task for each in self._settling.values() if (task := each.task) is not None])

    # ------------------------------------------------------------- there

    async def _there(self, way: _Way, first: int) -> Tail:
        """From the input of stage `first` to the end."""
        for stage in range(first, self.num_stages - 1):
            way.inputs[stage + 1] = (await self._ask(way, stage, "forward")).value
        answered = await self._ask(way, self.num_stages - 1, "tail")
        assert isinstance(answered.value, Tail)
        way.lives[-1] = answered.life
        return answered.value

    async def _ask(self, way: _Way, stage: int, kind: Kind) -> Answered:
        """One stage's answer, of whoever gives it."""
        asked: set[str] = set()
        tokens, work_tokens = way.microbatch.tokens, way.microbatch.tokens * WORK_SHARES[kind]
        while True:
            peer = await self._choose(stage, work_tokens, asked)
            key = Key(self.me, way.microbatch.sequence, way.attempts[stage])
            way.attempts[stage] += 1
            way.places[stage] = peer, key
            x = way.inputs[stage]
            part = Part(stage, key, tokens)
            if kind == "forward":
                call = self.calls.forward(peer, part, x)
            else:
                call = self.calls.tail(peer, part, x, way.microbatch.targets)
            try:
                return await self._timed(stage, peer, work_tokens, call)
            except BusyError:
                way.places[stage] = None
                if stage == 0:
                    await asyncio.sleep(_LOOK_S)
            except PeerError as error:
                self._drop_place(way, stage)
                if stage == 0 and isinstance(error, GoneError):
                    raise
                asked.add(peer)
                self.told.retried(way.microbatch.sequence, stage, peer, str(error))
                if stage == 0:
                    await asyncio.sleep(_AGAIN_S)

    async def _choose(self, stage: int, tokens: float, asked: set[str]) -> str:
        """A peer of the stage; waits for one. When all of them have failed with this input, the input may be what is
        wrong: the microbatch begins again a stage earlier, after a while."""
        if stage == 0:
            return self.me
        router = self.routers[stage - 1]
        while True:
            if asked.issuperset(router.peers) and router.peers:
                await asyncio.sleep(_ALL_FAILED_S)
                raise _BeginAgainError(stage - 1)
            peer, reason = router.choose(self.now(), tokens, asked)
            if peer is not None:
                return peer
            _log.debug("stage %d: %s", stage, reason)
            next_s = router.next_s(self.now())
            await asyncio.sleep(_LOOK_S if next_s is None else min(_LOOK_S, max(0.0, next_s - self.now())))

    async def _timed(self, stage: int, peer: str, tokens: float, call: Coroutine[Any, Any, Answered]) -> Answered:
        """The answer within its time, and what becomes of it told to the router."""
        if stage == 0:
            return await call
        router, began_s = self.routers[stage - 1], self.now()
        limit_s = router.limit_s(peer, tokens)
        router.begun(peer, tokens)
        try:
            async with asyncio.timeout(limit_s) as limit:
                wait = _Wait(stage, peer, asyncio.get_running_loop().time(), limit)
                self._waits.add(wait)
                try:
                    answer = await call
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            took_s = self.now() - began_s
            router.timed_out(peer, self.now(), took_s, tokens)
            raise UnreachableError(f"no answer within {min(took_s, limit_s):.1f} s") from None
        except BusyError:
            router.refused_busy(peer, self.now(), tokens)
            raise
        except GoneError:  # no fault: it has moved, or its weights have
            router.given_up(peer, tokens)
            raise
        except PeerError as error:
            router.failed(peer, self.now(), self.now() - began_s, tokens, str(error))
            if isinstance(error, BadBytesError):
                self.told.refused(peer, error)
            raise
        except BaseException:
            router.given_up(peer, tokens)
            raise
        router.finished(peer, self.now(), self.now() - began_s, tokens)
        return answer

    # ------------------------------------------------------------- back

    async def _back(self, way: _Way, tail: Tail) -> None:
        gradient = tail.gradient
        for stage in reversed(range(self.num_stages - 1)):
            gradient = await self._backward(way, stage, gradient)

    async def _backward(self, way: _Way, stage: int, gradient: Any) -> Any:
        """Of the peer that has the forward; it is asked again, while it is here, before the microbatch begins again at
        this stage."""
        place = way.places[stage]
        assert place is not None
        peer, key = place
        part, tokens = Part(stage, key, way.microbatch.tokens), way.microbatch.tokens * WORK_SHARES["backward"]
        attempts_left = _BACKWARD_ATTEMPTS
        while True:
            try:
                answered = await self._timed(stage, peer, tokens, self.calls.backward(peer, part, gradient))
                way.lives[stage] = answered.life
                return answered.value
            except BusyError:
                pass
            except PeerError as error:
                attempts_left -= 1
                self.told.retried(way.microbatch.sequence, stage, peer, str(error))
                is_here = stage == 0 or self.routers[stage - 1].has(peer)
                if not attempts_left or not is_here or isinstance(error, GoneError | BadBytesError):
                    raise _BeginAgainError(stage) from None
            await asyncio.sleep(_AGAIN_S)

    # ------------------------------------------------------------- what counts

    def _drop(self, way: _Way, first: int) -> None:
        """What was computed from stage `first` on must not count."""
        for stage in range(first, self.num_stages):
            self._drop_place(way, stage)

    def _drop_place(self, way: _Way, stage: int) -> None:
        place, way.places[stage] = way.places[stage], None
        if place is not None:
            peer, key = place
            whom = _Whom(peer, stage, _ANY_LIFE)
            self._settling_of(whom).dropped.add(key)
            self._settle(whom)

    def _settling_of(self, whom: _Whom) -> _Settling:
        return self._settling.setdefault(whom, _Settling())

    def _settle(self, whom: _Whom) -> None:
        each = self._settling_of(whom)
        if each.task is None:
            each.task = logged(asyncio.create_task(self._tell(whom, each)), "telling what counts")

    async def _tell(self, whom: _Whom, settling: _Settling) -> None:
        """Tell a peer what counts and what does not, until it knows, or is given up."""
        give_up_s, again_s = self.now() + _GIVE_UP_S, _AGAIN_S
        try:
            while settling.acknowledged or settling.dropped:
                acknowledged = dict(itertools.islice(settling.acknowledged.items(), _MOST_SETTLED))
                dropped = tuple(itertools.islice(settling.dropped, _MOST_SETTLED))
                said = tuple(Acknowledged(key, loss) for key, loss in acknowledged.items())
                settlement = Settlement(whom.life, said, dropped, self._settled_before(whom))
                try:
                    async with asyncio.timeout(_SETTLE_LIMIT_S):
                        late = await self.calls.settle(whom.peer, whom.stage, settlement)
                except (PeerError, TimeoutError) as error:
                    if self.now() < give_up_s:
                        await asyncio.sleep(again_s)
                        again_s = min(2 * again_s, _MOST_AGAIN_S)
                        continue
                    late, reason = set(acknowledged), f"it does not answer ({error})"
                else:
                    reason = "it was told too late, or began anew"
                give_up_s, again_s = self.now() + _GIVE_UP_S, _AGAIN_S
                for key in late.intersection(acknowledged):
                    self.told.lost(whom.stage, whom.peer, key, reason)
                for key in acknowledged:
                    del settling.acknowledged[key]
                settling.dropped -= set(dropped)
        finally:
            settling.task = None
            if not settling.acknowledged and not settling.dropped:
                self._settling.pop(whom, None)

    def _settled_before(self, whom: _Whom) -> int:
        """Nothing is needed of what is before this sequence by that peer. What is acknowledged is let go of when it is
        known to have been told: until then it may have to be said again."""
        telling = [each for other, each in self._settling.items() if other[:2] == whom[:2]]
        return min([self.oldest_open, *(key.sequence for each in telling for key in each.acknowledged)])
