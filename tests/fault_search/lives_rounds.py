"""Peers of the world "lives" in synchronous rounds: all have the same weights, and a roster behind them.

Each peer's `RoundRunner` is the product's own: what it tells of itself, the chains of rosters, which of them holds, and
which state it takes. Modelled is that a round's merge happens at once for all peers on one roster. How they agree on
that, with faults in its midst, is searched in `rounds.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from fault_search.lives_peers import (
    RUN,
    SHA256,
    SPECS,
    Behind,
    Bootstrap,
    DiskCheckpoint,
    Folder,
    LivesWorld,
    Process,
    Round,
    SearchedVolunteer,
    behind_mean,
    identity_of,
    state_that_came,
)
from swarmtrain.errors import PeerError, UnreachableError
from swarmtrain.network.rounds.downloads import Downloads
from swarmtrain.network.rounds.merger import RoundSettings
from swarmtrain.network.rounds.roster import publication_of, sign_roster
from swarmtrain.network.rounds.runner import RoundRunner
from swarmtrain.network.rounds.state_fetch import NewState
from swarmtrain.network.snapshots.state_provider import state_specs
from swarmtrain.network.snapshots.store import Body, PullLimits, Snapshot, SnapshotStore, build_snapshot
from swarmtrain.peer.merging.consensus_state import fetch_consensus_state
from swarmtrain.peer.merging.roster_exchange import RosterExchange
from swarmtrain.peer.merging.updates import Replaced
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.rounds.chains import chain_view
from swarmtrain.protocol.rounds.messages import ProcessSuspended
from swarmtrain.protocol.rounds.rosters import Roster
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.v1 import snapshot_pb2 as pb

ROUNDS_RUN = RUN.model_copy(update={"merge": RUN.merge.model_copy(update={"method": "diloco"})})
_SILENCE_S = 5.0
_LOOKS_S = 0.3
_SLOWER = 2
"""Factor by which volunteers are slower in this world: the signatures of rounds are real, and take most of a play's
time."""
_SETTINGS = RoundSettings(
    run_sha256=SHA256,
    specs=SPECS,
    state_specs=state_specs(SPECS),
    max_tokens=RUN.max_round_tokens,
    share_above=5,
    round_limit_s=600.0,
    silence_s=_SILENCE_S,
    pull=PullLimits(),
)


class _Membership:
    """Membership of a process that uses the world's clock."""

    def __init__(self, process: Process) -> None:
        self._of, self._clock = process.membership, process.world.clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)

    def heard(self, peer: str, now: float, **advertised: int) -> None:
        """Record that `peer` answered a call: it is alive, and may have said how far it is. See `Membership`."""
        self._of.heard(peer, self._clock.now, **advertised)


class _Calls:
    """Calls to those processes that answer."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def round(self, peer: str, request: pb.RoundRequest) -> pb.RoundReply:
        """Ask a peer for its round, and for the chain of rosters that led to it."""
        there, asker = self._process.world.by_id(peer), self._process
        if there not in asker.neighbours():
            asker.membership.call_failed(peer, asker.world.clock.now, "unreachable")
            raise UnreachableError("it does not answer")
        rounds: RoundRunner = there.swarm.rounds
        return await rounds.answer(request, asker.me)


class _States:
    """Source of other processes' states in the simulated world."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def offered_untrusted(self, source: str, min_round: int) -> NewState | None:
        """Ask a peer for its state; pull none of its bytes yet. See `StateSource`."""
        there = self._process.world.by_id(source)
        if there not in self._process.neighbours() or there.offered is None:
            return None
        last = there.swarm.rounds.last
        if last is None or there.offered[0].round < min_round:
            return None
        pulled = state_that_came(source, *there.offered)
        pulled.held.snapshot.manifest.roster_sha256 = bytes.fromhex(last[0].digest)
        self._process.world.pulled = [pulled]
        return NewState(held=pulled.held, roster=last[0], signed_roster=last[1], from_peer=source)

    async def take(self, state: NewState) -> None:
        """Do nothing, because the bytes are here already."""

    def blame(self, peer: str, error: PeerError) -> None:
        """Do nothing: no test uses the report."""


def _rounds_of(process: Process) -> RoundRunner:
    """Return a `RoundRunner` of the product for a process."""
    membership: Any = _Membership(process)
    calls: Any = _Calls(process)
    averages: Any = None
    identity = identity_of(process.folder.key)
    downloads = Downloads(identity.peer_id, calls, SnapshotStore(), _SETTINGS.pull, lambda peer, error: None)
    trains, states = not process.is_bootstrap, _States(process)
    return RoundRunner(identity, downloads, membership, _SETTINGS, averages, trains=trains, states=states)


def _go_on(process: Process, kept: DiskCheckpoint) -> None:
    """Continue from a checkpoint, its roster and earlier rosters, as `CheckpointManager.restore` does."""
    rounds: RoundRunner = process.swarm.rounds
    if (last := kept.extra.get("last")) is not None:
        rounds.chains.restore_untrusted(kept.extra["chains"].kept(), _SETTINGS)
        rounds.know_roster(*last)


def _extra(process: Process) -> Mapping[str, Any]:
    rounds: RoundRunner = process.swarm.rounds
    return {"last": rounds.last, "chains": dataclasses.replace(rounds.chains, _shown={})}  # most are never read


class _Exchange(RosterExchange):
    """The product's exchange, of which only the decisions are used."""

    def __init__(self, volunteer: RoundsVolunteer) -> None:
        world: Any = volunteer.world
        stop: Any = SimpleNamespace(sleep=volunteer.sleep, check=lambda: None)
        super().__init__(world, volunteer.swarm, world.run_file, stop)

    def offer(self, state: Any, progress: Progress) -> None:
        """Do nothing: the volunteer offers its state."""


class RoundsVolunteer(SearchedVolunteer):
    """Volunteer that ends its rounds together with all that are on the same roster."""

    def __init__(
        self, world: LivesWorld, folder: Folder, address: int, invite: Mapping[str, int], speed: float
    ) -> None:
        super().__init__(world, folder, address, invite, speed / _SLOWER)
        self.swarm.asynchronous, self.swarm.rounds = False, _rounds_of(self)
        self.exchange, self.round_ended_s = _Exchange(self), None
        self.is_first = True

    round_ended_s: float | None
    """Time at which its inner steps of this round were done; None before."""

    @property
    def rounds(self) -> RoundRunner:
        """The product's runner of synchronous rounds."""
        found: RoundRunner = self.swarm.rounds
        return found

    def restore(self, kept: DiskCheckpoint) -> None:
        """Continue from a checkpoint, with the roster behind it."""
        _go_on(self, kept)
        super().restore(kept)

    def set_state(self) -> None:
        """Offer the state, and enter the next round."""
        super().set_state()
        self.rounds.advance(self.progress)

    def thaw(self) -> None:
        """Let the process continue; it notices the gap as `RoundRunner` does."""
        if self.frozen and self.alive:
            self.rounds.engine.receive(ProcessSuspended(), self.world.clock.now)
        super().thaw()

    def _start_round(self) -> None:
        self.round_ended_s = None
        if self.is_first:
            self.world.first_round(self)
        self.is_first = False
        self.exchange.archives.ask()
        super()._start_round()

    def _end_round(self) -> None:
        if self.leaves or self.round_ended_s is not None:
            return
        self.round_ended_s = self.world.clock.now
        self._agree()

    def _agree(self) -> None:
        """Ask the others for their rounds; take their state if it holds, else merge with those that are in the same
        round."""
        if self.leaves or self.round_ended_s is None:
            return
        others = [one for one in self.neighbours() if isinstance(one, RoundsVolunteer) and not (one.away or one.leaves)]
        waits = any(one.round_ended_s is None for one in others) or self._may_be_silent(others)
        waits &= self.world.clock.now < self.round_ended_s + _SILENCE_S
        if waits and all(self._is_with_us(one) for one in others):  # it would hear that
            self.later(_LOOKS_S, self._agree)
            return
        if (archived := self.exchange.archives.state_that_holds()) is not None:
            self._take(archived)
            return
        advertised = self.world.run(self.rounds.search.ask_now([one.me for one in others]))
        self.world.run(self.rounds.search.holds(advertised))
        chains, heard = self.rounds.chains, {peer: (0.0, one) for peer, one in advertised.items()}
        view = chain_view(chains.chain, chains.shown, heard, since_s=0.0, me=self.me, is_away=False)
        if view.best is not None:
            new = self.world.run(self.rounds.search.fetch_advertised_state(advertised, "others are further"))
            if new is not None:
                self._take(new)
                return
        with_us = [one for one in others if self._is_with_us(one)]
        if waits and any(one.round_ended_s is None for one in with_us):
            self.later(_LOOKS_S, self._agree)
            return
        merge([self, *(one for one in with_us if one.round_ended_s is not None)])

    def _take(self, new: NewState) -> None:
        self._adopt(self.exchange._adopted(new))
        self.set_state()
        self._start_round()

    def _is_with_us(self, other: RoundsVolunteer) -> bool:
        return other.progress.roster_sha256 == self.progress.roster_sha256

    def _may_be_silent(self, others: Sequence[RoundsVolunteer]) -> bool:
        """Return whether one of the other peers is believed alive and does not answer."""
        answer = {one.me for one in others}
        return any(info.peer not in answer for info in self.membership.volunteers())

    def _adopt(self, new: Replaced) -> None:
        super()._adopt(new)
        self.own_tokens = max(self.own_tokens, new.progress.peer_tokens.get(self.me, 0))

    def applied(self, roster: Roster, signed: pb.Signed, manifests: Sequence[pb.Signed], behind: Behind) -> None:
        """Take the outer step of a roster."""
        self.rounds.chains.move_to(roster, signed, manifests)
        self.rounds.know_roster(roster, signed)
        tokens = [entry.tokens for entry in roster.entries]
        self.progress, self.behind = self.progress.after(roster.peers, tokens, roster.digest), behind
        self.own_tokens += RUN.round_tokens
        self.set_state()
        now = self.world.clock.now
        kept = DiskCheckpoint(
            self.progress, behind, self.accounting.kept(), self.own_tokens, at_s=now, extra=_extra(self)
        )
        self.later(_LOOKS_S, self.folder.write, kept)
        self._start_round()


def merge(peers: Sequence[RoundsVolunteer]) -> None:
    """Merge the round of all `peers`, which are on one roster: the one with the lowest PeerID signs the next roster,
    and all apply it."""
    peers = sorted(peers, key=lambda one: one.me)
    rounds = peers[0].rounds
    base = bytes.fromhex(peers[0].progress.roster_sha256)
    held = [_published(one, base) for one in peers]
    last = rounds.last
    roster = Roster(
        round=peers[0].progress.round,
        signer=peers[0].me,
        entries=tuple(publication_of(each) for each in held),
        base=base.hex(),
        base_tokens=0 if last is None else last[0].total_tokens,
    )
    signed = sign_roster(identity_of(peers[0].folder.key), SHA256, roster)
    mine: frozenset[Round] = frozenset((one.folder.key, one.world.next_round(one.me)) for one in peers)
    before = peers[0].behind
    at_tokens = max(before.at_tokens, *(one.progress.run_tokens for one in peers))
    behind = dataclasses.replace(before, rounds=before.rounds | mine, at_tokens=at_tokens)
    for one in peers:
        one.applied(roster, signed, [each.signed for each in held], behind)


def _published(peer: RoundsVolunteer, base: bytes) -> Snapshot:
    manifest = pb.Manifest(
        run_sha256=bytes.fromhex(SHA256), kind=pb.SNAPSHOT_KIND_PSEUDO_GRADIENT, round=peer.progress.round, part=1,
        tokens=RUN.round_tokens, inner_steps=RUN.merge.inner_steps, roster_sha256=base,
    )  # fmt: skip
    return build_snapshot(identity_of(peer.folder.key), manifest, SPECS, Body([bytes(4)])).snapshot


class RoundsBootstrap(Bootstrap):
    """Bootstrap whose archive holds or not according to its roster."""

    def __init__(self, world: LivesWorld, folder: Folder, address: int, invite: Mapping[str, int]) -> None:
        super().__init__(world, folder, address, invite)
        self.swarm.asynchronous, self.swarm.rounds = False, _rounds_of(self)

    def restore(self, kept: DiskCheckpoint) -> None:
        """Continue from a checkpoint, with the roster behind it."""
        _go_on(self, kept)
        super().restore(kept)

    def set_state(self) -> None:
        """Offer the state, and enter the next round."""
        super().set_state()
        self.swarm.rounds.advance(self.progress)

    def keep_counts(self) -> None:
        """Do nothing, because rosters have the counts."""

    def _serve_counts(self) -> None:
        """Do nothing, because rosters have the counts."""

    def _is_new(self, infos: Sequence[PeerInfo]) -> bool:
        return max((info.run_tokens for info in infos), default=0) > self.progress.run_tokens

    def _take(self, volunteers: Sequence[PeerInfo], peers: Sequence[str]) -> bool:
        present = self.world.run(fetch_consensus_state(self.swarm, peers, "archive", self.progress.run_tokens))
        if present is None or present.roster is None or present.signed_roster is None:
            return False
        self.swarm.rounds.know_roster(present.roster, present.signed_roster)
        self.progress, self.behind = present.progress, behind_mean([one.behind for one in self.world.pulled])
        self.set_state()
        now, extra = self.world.clock.now, _extra(self)
        self.folder.write(DiskCheckpoint(self.progress, self.behind, self.accounting.kept(), at_s=now, extra=extra))
        self.world.archived(self)
        return True
