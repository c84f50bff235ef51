"""A swarm in memory: links with latency, bandwidth and loss, and the faults that happen to real ones.

The peers (`simulate/volunteer.py`) run the product's own decisions; this file moves messages between them on a
virtual clock. Tests declare faults, run, and look at `World.log`, `World.waits_s` and the peers' digests.

What is modelled: a call is answered, refused at once (a process that is gone), or times out (a frozen process, a
cut link, a lost message). A transfer takes its latency and bytes / rate, and stalls if an end is cut off meanwhile.
Uplinks are not shared between transfers. The DHT loses nothing within a partition.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from swarmtrain.membership.lifecycle import PeerInfo
from swarmtrain.membership.rosters import Roster
from swarmtrain.simulate.clock import Clock, Timer
from swarmtrain.simulate.messages import Link, RoundRequest, Settings
from swarmtrain.simulate.transfers import Transfers
from swarmtrain.simulate.volunteer import Volunteer

__all__ = ["Event", "Link", "Moment", "Settings", "Volunteer", "World"]

Moment = Literal["started", "ended", "signed", "told_one", "serving"]
"""When a declared fault strikes: its round's training started or ended, it signed a roster and told nobody, it told
one peer, somebody began to pull from it."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something a test may want to look at."""

    time_s: float
    peer: str
    kind: Literal["signed", "applied", "adopted", "killed", "frozen", "thawed", "joined"]
    round: int
    roster: Roster | None = None
    digest: str = ""


class _Call:
    """One question from `src` to `dst`: answered once, or failed once."""

    __slots__ = ("_done", "_dst", "_open", "_src", "_timer", "_world")

    def __init__(self, world: World, src: Volunteer, dst: Volunteer, done: Callable[[Any], None]) -> None:
        self._world, self._src, self._dst, self._done = world, src, dst, done
        self._open = True
        limit_s = world.settings.call_limit_s + world.settings.hold_s
        self._timer: Timer = world.clock.call_later(limit_s, src.deliver, self._finish, None)

    def answer(self, reply: Any) -> None:
        """`dst` answers; the reply may be lost on the way."""
        if self._world.passes(self._dst, self._src):
            delay_s = self._world.latency_s(self._src, self._dst)
            self._world.clock.call_later(delay_s, self._src.deliver, self._finish, reply)

    def refuse(self) -> None:
        """`dst` is gone: its machine, or a broken connection, says so."""
        if self._world.connected(self._src, self._dst):
            delay_s = self._world.latency_s(self._src, self._dst)
            self._world.clock.call_later(delay_s, self._src.deliver, self._finish, None)

    def _finish(self, reply: Any) -> None:
        if self._open:
            self.give_up()
            self._done(reply)

    def give_up(self) -> None:
        """`src` does not want to know any more."""
        self._open = False
        self._timer.cancel()


class World:
    """The clock, the peers, the links between them, and the faults."""

    def __init__(self, settings: Settings | None = None, *, link: Link | None = None, seed: int = 0) -> None:
        self.settings = settings or Settings()
        self.clock = Clock()
        self.peers: dict[str, Volunteer] = {}
        self.log: list[Event] = []
        self.waits_s: list[tuple[str, int, float]] = []
        """(peer, round, seconds from the end of its own inner steps to the start of the next round, less the time
        in which its process stood still)."""
        self.presences: list[tuple[PeerInfo, float, int]] = []
        """What the DHT was given: (record, when it expires, side of the partition)."""
        self._link = link or Link()
        self._drop = 0.0
        self._random = random.Random(seed)
        self._side: dict[str, int] = {}
        self._cut: set[str] = set()
        self._faults: dict[tuple[str, int, Moment], Callable[[str], None]] = {}

    # ------------------------------------------------------------------ peers and faults

    def join(self, name: str, *, steps_per_s: float = 10.0, link: Link | None = None) -> Volunteer:
        """A volunteer comes now. Names sort as PeerIDs do."""
        assert name not in self.peers, f"{name} has been here already: a process that returns is a new peer"
        peer = Volunteer(self, name, steps_per_s, link or self._link)
        self.peers[name] = peer
        self.record("joined", peer)
        peer.deliver(peer.begin)
        return peer

    def join_many(self, num_peers: int, *, steps_per_s: float = 10.0) -> list[Volunteer]:
        """`num_peers` volunteers come at the same moment, named p000, p001, ... in PeerID order."""
        return [self.join(f"p{i:03d}", steps_per_s=steps_per_s) for i in range(num_peers)]

    def at(self, when_s: float, call: Callable[..., object], *args: Any) -> None:
        """Do something to the world at `when_s`, for example `world.at(30, world.kill, "p001")`."""
        self.clock.call_at(when_s, call, *args)

    def fail_at(self, peer: str, round: int, moment: Moment, fault: Callable[[str], None] | None = None) -> None:
        """Declare a fault: `fault(peer)` (default: kill) when `peer` reaches `moment` of `round`."""
        self._faults[peer, round, moment] = fault or self.kill

    def reached(self, peer: Volunteer, moment: Moment) -> None:
        """Called by peers: strike if a fault was declared for this moment."""
        if self._faults and (fault := self._faults.pop((peer.name, peer.round, moment), None)) is not None:
            fault(peer.name)

    def kill(self, name: str) -> None:
        """SIGKILL: its connections break at once."""
        peer = self.peers[name]
        if peer.alive:
            self.record("killed", peer)
            peer.die()

    def leave(self, name: str) -> None:
        """It says goodbye and goes."""
        if self.peers[name].running:
            self.peers[name].leave()

    def freeze(self, name: str) -> None:
        """SIGSTOP: everything that reaches it waits until `thaw`."""
        if self.peers[name].running:
            self.record("frozen", self.peers[name])
            self.peers[name].freeze()

    def thaw(self, name: str) -> None:
        """SIGCONT."""
        if self.peers[name].frozen:
            self.record("thawed", self.peers[name])
            self.peers[name].thaw()

    def idle(self, name: str) -> None:
        """From now on it publishes and answers, and signs no roster when it is its turn."""
        self.peers[name].signs = False

    def sign_again(self, name: str) -> None:
        """It signs again."""
        self.peers[name].signs = True

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

    # ------------------------------------------------------------------ the network

    def side(self, peer: Transfers) -> int:
        """Which side of the partition it is on; 0 if there is none."""
        return self._side.get(peer.name, -1) if self._side else 0

    def connected(self, a: Transfers, b: Transfers) -> bool:
        """Whether packets pass between the two machines."""
        if self._cut and (a.name in self._cut or b.name in self._cut):
            return a is b
        return not self._side or self.side(a) == self.side(b)

    def passes(self, src: Transfers, dst: Transfers) -> bool:
        """Whether this one message arrives."""
        drop = max(self._drop, src.link.drop, dst.link.drop)
        return self.connected(src, dst) and (drop == 0 or self._random.random() >= drop)

    def latency_s(self, a: Transfers, b: Transfers) -> float:
        """One way, in seconds."""
        return a.link.latency_s + b.link.latency_s

    def call(self, src: Volunteer, dst_name: str, request: RoundRequest, done: Callable[[Any], None]) -> _Call:
        """Ask; `done(reply)` comes once, with None if the call failed."""
        dst = self.peers[dst_name]
        call = _Call(self, src, dst, done)
        if self.passes(src, dst):
            self.clock.call_later(self.latency_s(src, dst), self._arrive, dst, call, request)
        return call

    def _arrive(self, dst: Volunteer, call: _Call, request: RoundRequest) -> None:
        if dst.alive:
            dst.deliver(dst.asked, request, call)
        else:
            call.refuse()

    def tell(self, src: Volunteer, dst: Volunteer, call: Callable[..., object], *args: Any) -> None:
        """A message without an answer."""
        if dst.alive and self.passes(src, dst):
            self.clock.call_later(self.latency_s(src, dst), dst.deliver, call, *args)

    def pull(self, dst: Transfers, src_name: str, what: str, num_bytes: float, done: Callable[[Any], None]) -> None:
        """Transfer `what` from a peer; `done(payload)`, None if it did not come."""
        src = self.peers[src_name]
        round_trip_s = 2 * self.latency_s(src, dst)
        if not self.passes(src, dst) or src.frozen:
            self.clock.call_later(self.settings.stall_limit_s, dst.deliver, done, None)
            return
        payload = src.provide(what) if src.alive else None
        if payload is None:
            self.clock.call_later(round_trip_s, dst.deliver, done, None)
            return
        seconds = round_trip_s + num_bytes / min(src.link.bytes_per_s, dst.link.bytes_per_s)
        self.clock.call_later(seconds, self._pulled, dst, src, payload, done)
        self.reached(src, "serving")

    def _pulled(self, dst: Transfers, src: Volunteer, payload: Any, done: Callable[[Any], None]) -> None:
        if src.running and self.connected(src, dst):
            dst.deliver(done, payload)
        elif not src.alive:
            dst.deliver(done, None)
        else:
            self.clock.call_later(self.settings.stall_limit_s, dst.deliver, done, None)

    # ------------------------------------------------------------------ running and looking

    def record(self, kind: Any, peer: Volunteer, roster: Roster | None = None) -> None:
        """Add to the log."""
        self.log.append(
            Event(time_s=self.clock.now, peer=peer.name, kind=kind, round=peer.round, roster=roster, digest=peer.digest)
        )

    def run_until(self, end_s: float) -> None:
        """Let the swarm live until `end_s`, in virtual seconds."""
        self.clock.run_until(end_s)

    def run_rounds(self, round: int, limit_s: float) -> bool:
        """Let it live until every running peer has reached `round`; False if `limit_s` comes first."""
        while any(peer.round < round for peer in self.running()):
            for _ in range(1 + len(self.peers)):
                next_s = self.clock.next_s()
                if next_s is None or next_s > limit_s:
                    return all(peer.round >= round for peer in self.running())
                self.clock.step()
        return True

    def running(self) -> list[Volunteer]:
        """The peers that are neither gone nor frozen, by PeerID."""
        return [self.peers[name] for name in sorted(self.peers) if self.peers[name].running]

    def events(self, kind: str) -> list[Event]:
        """The log's events of one kind."""
        return [event for event in self.log if event.kind == kind]

    def digests(self, round: int) -> dict[str, str]:
        """Each running peer's weights at the start of `round`, as a digest, for those who got there."""
        return {peer.name: peer.digest_at[round] for peer in self.running() if round in peer.digest_at}
