"""The machines of a simulated swarm, the links between them, and the faults that happen to real ones.

What is modelled: a call is answered, refused at once (a process that is gone), or times out (a frozen process, a
cut link, a lost message). A transfer takes its latency and bytes / rate, and stalls if an end is cut off meanwhile.
Transfers share the links of their ends where `shared` says so. What the peers are, and what they say to each other,
is not known here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Literal, Protocol, TypeVar

from swarmtrain.simulate.clock import Clock, Holds
from swarmtrain.simulate.links import EXACT_UP_TO, SharedLinks
from swarmtrain.simulate.systems.messages import SimulatedLink

__all__ = [
    "End",
    "MessageFaults",
    "NetworkFault",
    "NetworkPlace",
    "PullRefusal",
    "SimulatedMachine",
    "SimulatedNetwork",
    "kept_until",
]

NetworkFault = Literal["killed", "frozen", "thawed"]


class NetworkPlace(Protocol):
    """Where a link ends."""

    name: str
    link: SimulatedLink


class End(NetworkPlace, Protocol):
    """A process at the end of a link."""

    def deliver(self, call: Callable[..., object], *args: Any) -> None:
        """Run something in this process: now, or when it is thawed; never if it is gone."""
        ...


class SimulatedMachine(End, Protocol):
    """A process of the swarm as its network sees it: it lives or not, stands still or not, and has a link."""

    alive: bool
    frozen: bool

    @property
    def running(self) -> bool:
        """Neither gone nor frozen."""
        ...

    def provide(self, what: Any) -> Any:
        """What is asked for, for a pull; None if it is not here."""
        ...

    def die(self) -> None:
        """The process ends."""
        ...

    def leave(self) -> None:
        """Say goodbye, and end."""
        ...

    def freeze(self) -> None:
        """The process is stopped."""
        ...

    def thaw(self) -> None:
        """It goes on."""
        ...


P = TypeVar("P", bound=SimulatedMachine)


@dataclass(frozen=True)
class PullRefusal:
    """An answer to a pull that is no payload, and comes at once: BUSY, for one."""

    reason: str


class MessageFaults:
    """The clock, and what happens to messages: they are late, lost, repeated, or cut off."""

    def __init__(self, seed: int = 0, holds: Holds | None = None) -> None:
        self.clock = Clock(holds)
        self._drop = self._twice = self._late = 0.0
        self._random = random.Random(seed)
        self._side: dict[str, int] = {}
        self._cut: set[str] = set()

    def at(self, when_s: float, call: Callable[..., object], *args: Any) -> None:
        """Do something to the world at `when_s`, for example `world.at(30, world.kill, "p001")`."""
        self.clock.call_at(when_s, call, *args)

    def partition(self, *sides: Iterable[str]) -> None:
        """Cut the links between `sides`; who is in none of them is on one more side."""
        self._side = {name: i for i, side in enumerate(sides, start=1) for name in side}

    def cut_off(self, name: str) -> None:
        """No link to it works, though the DHT still carries its presence."""
        self._cut.add(name)

    def heal(self) -> None:
        """All links work again."""
        self._side = {}
        self._cut.clear()

    def lose_messages(self, drop: float) -> None:
        """From now on each message and transfer is lost with probability `drop`."""
        self._drop = drop

    def repeat_messages(self, share: float) -> None:
        """From now on this share of the messages and publications arrives twice, the second time up to 2 s later."""
        self._twice = share

    def hold_up_messages(self, share: float) -> None:
        """From now on this share of the messages and transfers arrives up to 8 s late, and others overtake it."""
        self._late = share

    def side(self, peer: NetworkPlace) -> int:
        """Which side of the partition it is on; 0 if there is none."""
        return self._side.get(peer.name, -1) if self._side else 0

    def connected(self, a: NetworkPlace, b: NetworkPlace) -> bool:
        """Whether packets pass between the two machines."""
        if self._cut and (a.name in self._cut or b.name in self._cut):
            return a is b
        return not self._side or self.side(a) == self.side(b)

    def passes(self, src: NetworkPlace, dst: NetworkPlace) -> bool:
        """Whether this one message arrives."""
        if (self._cut or self._side) and not self.connected(src, dst):
            return False
        drop = max(self._drop, src.link.drop, dst.link.drop)
        return drop == 0 or src is dst or self._random.random() >= drop

    def latency_s(self, a: NetworkPlace, b: NetworkPlace) -> float:
        """One way, in seconds."""
        return a.link.latency_s + b.link.latency_s

    def send(
        self, src: NetworkPlace, dst: NetworkPlace, call: Callable[..., object], *args: Any, after_s: float = 0.0
    ) -> None:
        """One message: `call(*args)` when it arrives, `after_s` later than a short one; maybe never, or twice."""
        if self.passes(src, dst):
            takes_s = self.latency_s(src, dst) + after_s
            self.clock.call_later(takes_s + self.held_up_s(), call, *args)
            if self.comes_twice():
                self.clock.call_later(takes_s + 2 * self._random.random(), call, *args)

    def comes_twice(self) -> bool:
        """Whether what arrives now does so once more."""
        return self._twice > 0 and self._random.random() < self._twice

    def held_up_s(self) -> float:
        """How much later what is sent now arrives."""
        return 8 * self._random.random() if self._late and self._random.random() < self._late else 0.0


_T = TypeVar("_T")


def kept_until(checkpoints: Sequence[_T], checkpoint: int) -> Sequence[_T]:
    """Those up to this one (-1 is the newest; or to the oldest that there is): what one has that goes on from it."""
    return checkpoints[: max(checkpoint, -len(checkpoints)) % len(checkpoints) + 1]


class SimulatedNetwork(MessageFaults, Generic[P]):
    """The machines, the links between them, and the faults."""

    shared = True
    """Whether transfers share links; else each has all of its ends'."""

    def __init__(self, link: SimulatedLink, stall_limit_s: float, seed: int = 0) -> None:
        super().__init__(seed)
        self.peers: dict[str, P] = {}
        self.links = SharedLinks(self.clock)
        self._link = link
        self._stall_limit_s = stall_limit_s

    def fault(self, kind: NetworkFault, peer: P) -> None:
        """A fault is about to strike `peer`: for the log."""

    def serving(self, peer: P) -> None:
        """Somebody began to pull from `peer`."""

    # ------------------------------------------------------------------ faults

    def kill(self, name: str) -> None:
        """SIGKILL: its connections break at once."""
        peer = self.peers[name]
        if peer.alive:
            self.fault("killed", peer)
            peer.die()
            self.links.gone(name)

    def leave(self, name: str) -> None:
        """It says goodbye and goes."""
        if self.peers[name].running:
            self.peers[name].leave()
            self.links.gone(name)

    def freeze(self, name: str) -> None:
        """SIGSTOP: everything that reaches it waits until `thaw`."""
        if self.peers[name].running:
            self.fault("frozen", self.peers[name])
            self.peers[name].freeze()

    def thaw(self, name: str) -> None:
        """SIGCONT."""
        if self.peers[name].frozen:
            self.fault("thawed", self.peers[name])
            self.peers[name].thaw()

    def delay(self, name: str, latency_s: float | None = None) -> None:
        """From now on its link takes so long, one way; None: as at first."""
        latency_s = self._link.latency_s if latency_s is None else latency_s
        self.peers[name].link = replace(self.peers[name].link, latency_s=latency_s)

    # ------------------------------------------------------------------ links

    def tell(self, src: End, dst: SimulatedMachine, call: Callable[..., object], *args: Any) -> None:
        """A message without an answer."""
        if dst.alive:
            self.send(src, dst, dst.deliver, call, *args)

    def pull(self, dst: End, src_name: str, what: Any, num_bytes: float, done: Callable[[Any], None]) -> None:
        """Transfer `what` from a peer; `done(payload)`, None if it did not come, `PullRefusal` if it was refused."""
        src = self.peers.get(src_name)
        if src is None:  # it is long gone, and forgotten
            self.clock.call_later(4 * dst.link.latency_s, dst.deliver, done, None)
            return
        round_trip_s = 2 * self.latency_s(src, dst)
        if not self.passes(src, dst) or src.frozen:
            self.clock.call_later(self._stall_limit_s, dst.deliver, done, None)
            return
        payload = src.provide(what) if src.alive else None
        if payload is None or isinstance(payload, PullRefusal):
            self.clock.call_later(round_trip_s, dst.deliver, done, payload)
            return
        self.serving(src)
        if not num_bytes or not src.alive or not self.shared:
            lasts_s = round_trip_s + num_bytes / min(src.link.bytes_per_s, dst.link.down_per_s)
            self.clock.call_later(lasts_s, self._pulled, dst, src, payload, done, True)
            return
        if self.links.exact is None:
            self.links.exact = len(self.peers) <= EXACT_UP_TO
        self.links.begin(src, dst, num_bytes, round_trip_s, partial(self._pulled, dst, src, payload, done))

    def _pulled(self, dst: End, src: P, payload: Any, done: Callable[[Any], None], whole: bool) -> None:
        if whole and src.running and self.connected(src, dst):
            if late_s := self.held_up_s():
                self.clock.call_later(late_s, dst.deliver, done, payload)
            else:
                dst.deliver(done, payload)
        elif not src.alive:
            dst.deliver(done, None)
        else:
            self.clock.call_later(self._stall_limit_s, dst.deliver, done, None)

    # ------------------------------------------------------------------ running

    def run_until(self, end_s: float) -> None:
        """Let the swarm live until `end_s`, in virtual seconds."""
        self.clock.run_until(end_s)

    def running(self) -> list[P]:
        """The peers that are neither gone nor frozen, by PeerID."""
        return [self.peers[name] for name in sorted(self.peers) if self.peers[name].running]
