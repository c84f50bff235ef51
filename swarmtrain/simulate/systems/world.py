"""A synchronous swarm in memory: links with latency, bandwidth and loss, and the faults that strike real ones.

The peers (`simulate/systems/volunteer.py`) run the product's own decisions. This module moves their questions on the
links of `simulate/systems/network.py`, which says what is modelled. Tests declare faults, run, and look at
`SynchronousWorld.log`, `SynchronousWorld.waits_s` and the peers' digests. The DHT loses nothing within a partition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.rounds.messages import RoundQuestion
from swarmtrain.protocol.rounds.rosters import Roster
from swarmtrain.simulate.clock import Timer
from swarmtrain.simulate.systems.batch_volunteer import BatchVolunteer
from swarmtrain.simulate.systems.messages import Settings, SimulatedLink, WorldMoment
from swarmtrain.simulate.systems.network import NetworkFault, SimulatedNetwork, kept_until
from swarmtrain.simulate.systems.transfers import Owner
from swarmtrain.simulate.systems.volunteer import SimulatedVolunteer


@dataclass(frozen=True, kw_only=True)
class WorldEvent:
    """Event of the log, for tests."""

    time_s: float
    peer: str
    kind: Literal["signed", "applied", "adopted", "killed", "frozen", "thawed", "joined"]
    round: int
    roster: Roster | None = None
    digest: str = ""


class _Call:
    """One question from peer `src` to peer `dst`: answered once, or failed once."""

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
        # A call about a round may be held for `hold_s` until there is news, and is only late after that.
        limit_s = world.settings.call_limit_s + hold_s
        self._timer: Timer = world.clock.call_later(limit_s, src.deliver, self._finish, None)

    def answer(self, reply: Any) -> None:
        """Send the answer of `dst`. It may be lost on the way."""
        self._world.send(self._dst, self._src, self._src.deliver, self._finish, reply)

    def refuse(self) -> None:
        """Fail the call because `dst` is gone: its machine refuses it, or the connection breaks."""
        if self._world.connected(self._src, self._dst):
            delay_s = self._world.latency_s(self._src, self._dst)
            self._world.clock.call_later(delay_s, self._src.deliver, self._finish, None)

    def _finish(self, reply: Any) -> None:
        if self._open:
            self.give_up()
            self._done(reply)

    def give_up(self) -> None:
        """Drop the call: `src` no longer wants the answer."""
        self._open = False
        self._timer.cancel()


class SynchronousWorld(SimulatedNetwork[SimulatedVolunteer]):
    """Volunteers of a synchronous swarm, and the log of what happened to them."""

    def __init__(self, settings: Settings | None = None, *, link: SimulatedLink | None = None, seed: int = 0) -> None:
        self.settings = settings or Settings()
        super().__init__(link or SimulatedLink(), self.settings.stall_limit_s, seed)
        self.shared = self.settings.transfers_share_links
        self.log: list[WorldEvent] = []
        self.waits_s: list[tuple[str, int, float]] = []
        """Waits, as (peer, round, seconds).

        Seconds from the end of the peer's own inner steps to the start of the next round, less the time in which its
        process was frozen.
        """
        self.presences: list[tuple[PeerInfo, float, int]] = []
        """Records stored in the DHT: (record, time of expiry, side of the partition)."""
        self._faults: dict[tuple[str, int, WorldMoment], Callable[[str], None]] = {}

    # ------------------------------------------------------------------ peers and faults

    def join(self, name: str, *, steps_per_s: float = 10.0, link: SimulatedLink | None = None) -> SimulatedVolunteer:
        """Add a volunteer now. Names sort as PeerIDs do."""
        assert name not in self.peers, f"{name} has been here already: a process that returns is a new peer"
        return self._begin(self._make(name, steps_per_s, link or self._link))

    def join_together(self, steps_per_s: Mapping[str, float]) -> list[SimulatedVolunteer]:
        """Add volunteers of these names and speeds that begin the run at one moment and know each other, as those do
        that a bootstrap lets wait for each other."""
        peers = [self._make(name, speed, self._link) for name, speed in steps_per_s.items()]
        infos = [replace(peer.info(), training=True) for peer in peers]
        for peer in peers:
            self.peers[peer.name] = peer
            self.record("joined", peer)
        for peer in peers:
            peer.begin_with(info for info in infos if info.peer != peer.name)
        return peers

    def come_back(self, name: str, checkpoint: int = -1) -> SimulatedVolunteer:
        """Restart a dead peer from one of the checkpoints of its last rounds: -1 is the newest."""
        old = self.peers[name]
        assert not old.alive, f"{name} has not died"
        peer = self._make(name, old.steps_per_s, old.link)
        if old.checkpoints:
            peer.checkpoints = tuple(kept_until(old.checkpoints, checkpoint))
            peer.restore(peer.checkpoints[-1])
        return self._begin(peer)

    def _make(self, name: str, steps_per_s: float, link: SimulatedLink) -> SimulatedVolunteer:
        kind = SimulatedVolunteer if self.settings.target is None else BatchVolunteer
        return kind(self, name, steps_per_s, link)

    def _begin(self, peer: SimulatedVolunteer) -> SimulatedVolunteer:
        self.peers[peer.name] = peer
        self.record("joined", peer)
        peer.deliver(peer.begin)
        return peer

    def join_many(self, num_peers: int, *, steps_per_s: float = 10.0) -> list[SimulatedVolunteer]:
        """Add `num_peers` volunteers at the same moment, named p000, p001, ... in PeerID order."""
        return [self.join(f"p{i:03d}", steps_per_s=steps_per_s) for i in range(num_peers)]

    def fail_at(self, peer: str, round: int, moment: WorldMoment, fault: Callable[[str], None] | None = None) -> None:
        """Declare a fault: call `fault(peer)` (default: kill) when `peer` reaches `moment` of `round`."""
        self._faults[peer, round, moment] = fault or self.kill

    def declare_no_more(self) -> None:
        """Withdraw the declared faults that have not struck yet."""
        self._faults.clear()

    def reached(self, peer: Owner, moment: WorldMoment) -> None:
        """Let the fault strike that was declared for this moment of the peer's round, if any. Called by peers."""
        if self._faults and (fault := self._faults.pop((peer.name, peer.round, moment), None)) is not None:
            fault(peer.name)

    def fault(self, kind: NetworkFault, peer: SimulatedVolunteer) -> None:
        """Record the fault in the log."""
        self.record(kind, peer)

    def serving(self, peer: SimulatedVolunteer) -> None:
        """Note that a pull from the peer began."""
        self.reached(peer, "serving")

    def idle(self, name: str) -> None:
        """Let the peer publish and answer, but sign no roster when it is its turn."""
        self.peers[name].signs = False

    def sign_again(self, name: str) -> None:
        """Let the peer sign again."""
        self.peers[name].signs = True

    # ------------------------------------------------------------------ the network

    def call(
        self, src: SimulatedVolunteer, dst_name: str, question: RoundQuestion, done: Callable[[Any], None]
    ) -> _Call:
        """Ask a peer; `done(reply)` is called once, with None if the call failed."""
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
        """Add an event to the log."""
        self.log.append(
            WorldEvent(
                time_s=self.clock.now, peer=peer.name, kind=kind, round=peer.round, roster=roster, digest=peer.digest
            )
        )

    def run_rounds(self, round: int, limit_s: float, most_ahead: int | None = None) -> bool:
        """Run until every running peer has reached `round`; return False if `limit_s` comes first, or if one is
        `most_ahead` rounds beyond another: it goes on alone."""
        while any(peer.round < round for peer in self.running()):
            rounds = [peer.round for peer in self.running()]
            if most_ahead is not None and max(rounds) - min(rounds) > most_ahead:
                return False
            for _ in range(1 + len(self.peers)):
                next_s = self.clock.next_s()
                if next_s is None or next_s > limit_s:
                    return all(peer.round >= round for peer in self.running())
                self.clock.step()
        return True

    def events(self, kind: str) -> list[WorldEvent]:
        """Return the log's events of one kind."""
        return [event for event in self.log if event.kind == kind]

    def digests(self, round: int) -> dict[str, str]:
        """Return the weights' digests at the start of `round`, of the running peers that got there."""
        return {peer.name: peer.digest_at[round] for peer in self.running() if round in peer.digest_at}
