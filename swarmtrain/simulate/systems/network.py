"""Machines of a simulated swarm, the links between them, and the faults that strike real ones.

A call is answered, refused at once (the process is gone), or times out (a frozen process, a cut link, a lost message).
A transfer takes its latency plus bytes / rate, and stalls if one end is cut off meanwhile. Transfers share the links of
their ends if `SimulatedNetwork.shared` is set. This module does not know what the peers are or what they say to each
other.
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

NetworkFault = Literal["killed", "frozen", "thawed"]


class NetworkPlace(Protocol):
    """End of a link: a place in the simulated network."""

    name: str
    link: SimulatedLink


class End(NetworkPlace, Protocol):
    """Process at one end of a link."""

    def deliver(self, call: Callable[..., object], *args: Any) -> None:
        """Run a call in this process: now, after `thaw` if the process is frozen, or never if it has ended."""
        ...


class SimulatedMachine(End, Protocol):
    """Simulated process: alive or not, frozen or not, with a link."""

    alive: bool
    frozen: bool

    @property
    def running(self) -> bool:
        """True if the process is neither gone nor frozen."""
        ...

    def provide(self, what: Any) -> Any:
        """Return the thing that a pull asks for; None if it is not here."""
        ...

    def die(self) -> None:
        """End the process."""
        ...

    def leave(self) -> None:
        """Say goodbye, then end the process."""
        ...

    def freeze(self) -> None:
        """Stop the process, as SIGSTOP does."""
        ...

    def thaw(self) -> None:
        """Let the process continue."""
        ...


P = TypeVar("P", bound=SimulatedMachine)


@dataclass(frozen=True)
class PullRefusal:
    """Answer to a pull that carries no payload and comes at once, for example BUSY."""

    reason: str


class MessageFaults:
    """Clock of the world, and faults of its messages: late, lost, repeated or cut off."""

    def __init__(self, seed: int = 0, holds: Holds | None = None) -> None:
        self.clock = Clock(holds)
        self._drop = self._twice = self._late = 0.0
        self._random = random.Random(seed)
        self._side: dict[str, int] = {}
        self._cut: set[str] = set()

    def at(self, when_s: float, call: Callable[..., object], *args: Any) -> None:
        """Schedule a change of the world, for example `world.at(30, world.kill, "p001")`."""
        self.clock.call_at(when_s, call, *args)

    def partition(self, *sides: Iterable[str]) -> None:
        """Cut the links between `sides`. Peers in none of them form one more side."""
        self._side = {name: i for i, side in enumerate(sides, start=1) for name in side}

    def cut_off(self, name: str) -> None:
        """Cut every link of one peer. The DHT still carries its presence."""
        self._cut.add(name)

    def heal(self) -> None:
        """Let all links work again."""
        self._side = {}
        self._cut.clear()

    def lose_messages(self, drop: float) -> None:
        """Lose each message and transfer with probability `drop` from now on."""
        self._drop = drop

    def repeat_messages(self, share: float) -> None:
        """Deliver this share of the messages and publications twice, the second time up to 2 s later."""
        self._twice = share

    def hold_up_messages(self, share: float) -> None:
        """Delay this share of the messages and transfers by up to 8 s, so that others overtake them."""
        self._late = share

    def side(self, peer: NetworkPlace) -> int:
        """Return which side of the partition a peer is on; 0 without a partition."""
        return self._side.get(peer.name, -1) if self._side else 0

    def connected(self, a: NetworkPlace, b: NetworkPlace) -> bool:
        """Return whether packets pass between two machines."""
        if self._cut and (a.name in self._cut or b.name in self._cut):
            return a is b
        return not self._side or self.side(a) == self.side(b)

    def passes(self, src: NetworkPlace, dst: NetworkPlace) -> bool:
        """Draw whether one message from `src` to `dst` arrives."""
        if (self._cut or self._side) and not self.connected(src, dst):
            return False
        drop = max(self._drop, src.link.drop, dst.link.drop)
        return drop == 0 or src is dst or self._random.random() >= drop

    def latency_s(self, a: NetworkPlace, b: NetworkPlace) -> float:
        """Return the one-way latency in seconds."""
        return a.link.latency_s + b.link.latency_s

    def send(
        self, src: NetworkPlace, dst: NetworkPlace, call: Callable[..., object], *args: Any, after_s: float = 0.0
    ) -> None:
        """Send one message: `call(*args)` runs when it arrives, `after_s` later than a short one; maybe never, or
        twice."""
        if self.passes(src, dst):
            takes_s = self.latency_s(src, dst) + after_s
            self.clock.call_later(takes_s + self.held_up_s(), call, *args)
            if self.comes_twice():
                self.clock.call_later(takes_s + 2 * self._random.random(), call, *args)

    def comes_twice(self) -> bool:
        """Draw whether the message that arrives now arrives a second time."""
        return self._twice > 0 and self._random.random() < self._twice

    def held_up_s(self) -> float:
        """Draw by how many seconds a message that is sent now is delayed."""
        return 8 * self._random.random() if self._late and self._random.random() < self._late else 0.0


_T = TypeVar("_T")


def kept_until(checkpoints: Sequence[_T], checkpoint: int) -> Sequence[_T]:
    """Return the checkpoints up to number `checkpoint` (-1 is the newest; a number before the oldest means the oldest).

    A peer that restarts from a checkpoint has these and none of the later ones.
    """
    return checkpoints[: max(checkpoint, -len(checkpoints)) % len(checkpoints) + 1]


class SimulatedNetwork(MessageFaults, Generic[P]):
    """Machines, the links between them, and the faults."""

    shared = True
    """True if transfers share links; otherwise each transfer has the whole link of both ends."""

    def __init__(self, link: SimulatedLink, stall_limit_s: float, seed: int = 0) -> None:
        super().__init__(seed)
        self.peers: dict[str, P] = {}
        self.links = SharedLinks(self.clock)
        self._link = link
        self._stall_limit_s = stall_limit_s

    def fault(self, kind: NetworkFault, peer: P) -> None:
        """Hook, called before a fault strikes `peer`: for the log."""

    def serving(self, peer: P) -> None:
        """Hook, called when a pull from `peer` begins."""

    # ------------------------------------------------------------------ faults

    def kill(self, name: str) -> None:
        """Kill a peer as SIGKILL does: its connections break at once."""
        peer = self.peers[name]
        if peer.alive:
            self.fault("killed", peer)
            peer.die()
            self.links.gone(name)

    def leave(self, name: str) -> None:
        """Let a peer say goodbye and go."""
        if self.peers[name].running:
            self.peers[name].leave()
            self.links.gone(name)

    def freeze(self, name: str) -> None:
        """Freeze a peer as SIGSTOP does: everything that reaches it waits until `thaw`."""
        if self.peers[name].running:
            self.fault("frozen", self.peers[name])
            self.peers[name].freeze()

    def thaw(self, name: str) -> None:
        """Let a frozen peer continue, as SIGCONT does."""
        if self.peers[name].frozen:
            self.fault("thawed", self.peers[name])
            self.peers[name].thaw()

    def delay(self, name: str, latency_s: float | None = None) -> None:
        """Set the one-way latency of a peer's link from now on; None restores the original one."""
        latency_s = self._link.latency_s if latency_s is None else latency_s
        self.peers[name].link = replace(self.peers[name].link, latency_s=latency_s)

    # ------------------------------------------------------------------ links

    def tell(self, src: End, dst: SimulatedMachine, call: Callable[..., object], *args: Any) -> None:
        """Send a message that has no answer."""
        if dst.alive:
            self.send(src, dst, dst.deliver, call, *args)

    def pull(
        self,
        dst: End,
        src_name: str,
        what: Any,
        num_bytes: float,
        done: Callable[[Any], None],
        *,
        goes_on: bool = False,
    ) -> None:
        """Transfer `what` from a peer, then call `done`.

        `done` gets the payload, None if it did not come, or a `PullRefusal` if the peer refused. With `goes_on` it
        follows the last transfer in the same stream, so that nothing is asked for.
        """
        src = self.peers.get(src_name)
        if src is None:  # it is long gone, and forgotten
            self.clock.call_later(4 * dst.link.latency_s, dst.deliver, done, None)
            return
        round_trip_s = 0.0 if goes_on else 2 * self.latency_s(src, dst)
        # Nothing comes back from these: the reader gives up when it has waited for its stall limit.
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
        """Run the swarm until `end_s`, in virtual seconds."""
        self.clock.run_until(end_s)

    def running(self) -> list[P]:
        """Return the peers that are neither gone nor frozen, by PeerID."""
        return [self.peers[name] for name in sorted(self.peers) if self.peers[name].running]
