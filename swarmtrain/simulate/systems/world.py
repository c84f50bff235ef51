"""A swarm in memory: links with latency, bandwidth and loss, and the faults that happen to real ones.

The peers (`simulate/systems/volunteer.py`) run the product's own decisions; this file moves their questions on the
links of `simulate/systems/network.py`, which says what is modelled. Tests declare faults, run, and look at
`SynchronousWorld.log`, `SynchronousWorld.waits_s` and the peers' digests. The DHT loses nothing within a partition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.rounds.messages import RoundQuestion
from swarmtrain.protocol.rounds.rosters import Roster
from swarmtrain.simulate.clock import Timer
from swarmtrain.simulate.systems.messages import Settings, SimulatedLink, WorldMoment
from swarmtrain.simulate.systems.network import NetworkFault, SimulatedNetwork, kept_until
from swarmtrain.simulate.systems.transfers import Owner
from swarmtrain.simulate.systems.volunteer import SimulatedVolunteer

__all__ = ["Settings", "SimulatedLink", "SimulatedVolunteer", "SynchronousWorld", "WorldEvent", "WorldMoment"]


@dataclass(frozen=True, kw_only=True)
class WorldEvent:
    """Something a test may want to look at."""

    time_s: float
    peer: str
    kind: Literal["signed", "applied", "adopted", "killed", "frozen", "thawed", "joined"]
    round: int
    roster: Roster | None = None
    digest: str = ""


class _Call:
    """One question from `src` to `dst`: answered once, or failed once."""

    __slots__ = ("_done", "_dst", "_open", "_src", "_timer", "_world", "asker")

    def __init__(
        self,
        world: SynchronousWorld,
        src: SimulatedVolunteer,
        dst: SimulatedVolunteer,
        hold_s: float,
        done: Callable[[Any], None],
    ) -> None:
        self._world, self._src, self._dst, self._done, self.asker = world, src, dst, done, src.name
        self._open = True
        limit_s = world.settings.call_limit_s + hold_s
        self._timer: Timer = world.clock.call_later(limit_s, src.deliver, self._finish, None)

    def answer(self, reply: Any) -> None:
        """`dst` answers; the reply may be lost on the way."""
        self._world.send(self._dst, self._src, self._src.deliver, self._finish, reply)

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


class SynchronousWorld(SimulatedNetwork[SimulatedVolunteer]):
    """The volunteers of a synchronous swarm, and what happened to them."""

    shared = False  # the shares of a round go by formulas of their own (transfers.py)

    def __init__(self, settings: Settings | None = None, *, link: SimulatedLink | None = None, seed: int = 0) -> None:
        self.settings = settings or Settings()
        super().__init__(link or SimulatedLink(), self.settings.stall_limit_s, seed)
        self.log: list[WorldEvent] = []
        self.waits_s: list[tuple[str, int, float]] = []
        """(peer, round, seconds from the end of its own inner steps to the start of the next round, less the time
        in which its process stood still)."""
        self.presences: list[tuple[PeerInfo, float, int]] = []
        """What the DHT was given: (record, when it expires, side of the partition)."""
        self._faults: dict[tuple[str, int, WorldMoment], Callable[[str], None]] = {}

    # ------------------------------------------------------------------ peers and faults

    def join(self, name: str, *, steps_per_s: float = 10.0, link: SimulatedLink | None = None) -> SimulatedVolunteer:
        """A volunteer comes now. Names sort as PeerIDs do."""
        assert name not in self.peers, f"{name} has been here already: a process that returns is a new peer"
        return self._begin(self._make(name, steps_per_s, link or self._link))

    def come_back(self, name: str, checkpoint: int = -1) -> SimulatedVolunteer:
        """One that died is started again, from one of the checkpoints of its last rounds: -1 is the newest."""
        old = self.peers[name]
        assert not old.alive, f"{name} has not died"
        peer = self._make(name, old.steps_per_s, old.link)
        if old.checkpoints:
            peer.checkpoints = tuple(kept_until(old.checkpoints, checkpoint))
            peer.restore(peer.checkpoints[-1])
        return self._begin(peer)

    def _make(self, name: str, steps_per_s: float, link: SimulatedLink) -> SimulatedVolunteer:
        return SimulatedVolunteer(self, name, steps_per_s, link)

    def _begin(self, peer: SimulatedVolunteer) -> SimulatedVolunteer:
        self.peers[peer.name] = peer
        self.record("joined", peer)
        peer.deliver(peer.begin)
        return peer

    def join_many(self, num_peers: int, *, steps_per_s: float = 10.0) -> list[SimulatedVolunteer]:
        """`num_peers` volunteers come at the same moment, named p000, p001, ... in PeerID order."""
        return [self.join(f"p{i:03d}", steps_per_s=steps_per_s) for i in range(num_peers)]

    def fail_at(self, peer: str, round: int, moment: WorldMoment, fault: Callable[[str], None] | None = None) -> None:
        """Declare a fault: `fault(peer)` (default: kill) when `peer` reaches `moment` of `round`."""
        self._faults[peer, round, moment] = fault or self.kill

    def declare_no_more(self) -> None:
        """What was declared and not reached yet strikes nobody."""
        self._faults.clear()

    def reached(self, peer: Owner, moment: WorldMoment) -> None:
        """Called by peers: strike if a fault was declared for this moment."""
        if self._faults and (fault := self._faults.pop((peer.name, peer.round, moment), None)) is not None:
            fault(peer.name)

    def fault(self, kind: NetworkFault, peer: SimulatedVolunteer) -> None:
        """For the log."""
        self.record(kind, peer)

    def serving(self, peer: SimulatedVolunteer) -> None:
        """A pull from it began."""
        self.reached(peer, "serving")

    def idle(self, name: str) -> None:
        """From now on it publishes and answers, and signs no roster when it is its turn."""
        self.peers[name].signs = False

    def sign_again(self, name: str) -> None:
        """It signs again."""
        self.peers[name].signs = True

    # ------------------------------------------------------------------ the network

    def call(
        self, src: SimulatedVolunteer, dst_name: str, question: RoundQuestion, done: Callable[[Any], None]
    ) -> _Call:
        """Ask; `done(reply)` comes once, with None if the call failed."""
        dst = self.peers[dst_name]
        call = _Call(self, src, dst, question.hold_s, done)
        self.send(src, dst, self._arrive, dst, call, question)
        return call

    def _arrive(self, dst: SimulatedVolunteer, call: _Call, question: RoundQuestion) -> None:
        if dst.alive:
            dst.deliver(dst.asked, question, call)
        else:
            call.refuse()

    # ------------------------------------------------------------------ running and looking

    def record(self, kind: Any, peer: SimulatedVolunteer, roster: Roster | None = None) -> None:
        """Add to the log."""
        self.log.append(
            WorldEvent(
                time_s=self.clock.now, peer=peer.name, kind=kind, round=peer.round, roster=roster, digest=peer.digest
            )
        )

    def run_rounds(self, round: int, limit_s: float) -> bool:
        """Let it live until every running peer has reached `round`; False if `limit_s` comes first."""
        while any(peer.round < round for peer in self.running()):
            for _ in range(1 + len(self.peers)):
                next_s = self.clock.next_s()
                if next_s is None or next_s > limit_s:
                    return all(peer.round >= round for peer in self.running())
                self.clock.step()
        return True

    def events(self, kind: str) -> list[WorldEvent]:
        """The log's events of one kind."""
        return [event for event in self.log if event.kind == kind]

    def digests(self, round: int) -> dict[str, str]:
        """Each running peer's weights at the start of `round`, as a digest, for those who got there."""
        return {peer.name: peer.digest_at[round] for peer in self.running() if round in peer.digest_at}
