"""Volunteer that follows the protocol and publishes what must not be used: it is reported and refused.

Mallory lives in the test's process and is a `Swarm` like any other, but for what it publishes.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from swarm import Child, Swarm, assert_same_states, wait_until, write_run

from swarmtrain.events import PeerJoinedEvent, RefusedEvent, RoundEvent
from swarmtrain.model.gpt import build_model
from swarmtrain.network.codec import average_bytes_untrusted, tensor_specs
from swarmtrain.network.discovery.invite import Invite, parse_invite
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.identity import Identity, new_identity
from swarmtrain.network.node import NetworkThread, Node, NodeSettings
from swarmtrain.network.rounds.roster import roster_untrusted
from swarmtrain.network.snapshots.store import Body, HeldSnapshot, SnapshotStore, TensorSpec, build_snapshot
from swarmtrain.network.swarm import Swarm as Membership
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.v1 import snapshot_pb2 as pb

pytestmark = pytest.mark.processes

ROUND_LIMIT_S = 3.0
SILENCE_S = 1.0
ENTERS_S, LEAVES_S = 60.0, 20.0
"""Time limits to start a daemon and be announced, and to withdraw, on a busy machine."""
GROWTH_BYTES = 64_000_000
"""Memory that a volunteer may keep of four kinds of refused publications; nothing of an endless one."""
COSTS_S = ROUND_LIMIT_S + 3 * SILENCE_S + 9.0
"""Time limit of a round, mallory's silences and stalls included; the rest is for a busy machine."""


class EndlessStore(SnapshotStore):
    """Serves what it is asked for, and then the same again for ever, while `endless`."""

    endless = False

    async def serve(
        self, request: pb.PullRequest, count_sent: Callable[[int], None] = lambda size_bytes: None, peer: str = ""
    ) -> AsyncGenerator[pb.PullReply, None]:
        async with contextlib.aclosing(super().serve(request, count_sent, peer)) as replies:
            async for reply in replies:
                if reply.end and self.endless:
                    while True:
                        yield pb.PullReply(chunk=0, data=bytes(1000))
                yield reply


class Mallory(Membership):
    """Says in every round that it has published, what `mode` says."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.mode = "honest"
        self.store = EndlessStore()
        self.answers.round = self._round  # type: ignore[method-assign]
        self._published: dict[tuple[str, int], HeldSnapshot] = {}

    async def _round(self, request: pb.RoundRequest, caller: str) -> pb.RoundReply:
        """Answer with the caller's round, and our share of it."""
        asked = pb.RoundRequest(round=request.round, has_publication=True, has_share=True)
        theirs = await self.calls.round(caller, asked)
        reply = pb.RoundReply(current_round=theirs.current_round, participating=True)
        base = ""
        if theirs.HasField("last_roster"):
            reply.last_roster.CopyFrom(theirs.last_roster)
            base = roster_untrusted(theirs.last_roster, self.published.sha256, 2**40).digest
        if theirs.current_round == request.round and not request.has_publication:
            reply.publication.CopyFrom(self._publication(request.round, base).snapshot.signed)
        return reply

    def _publication(self, round: int, base: str) -> HeldSnapshot:
        key = (self.mode + base, round)
        if key not in self._published:
            self._published[key] = self._publish(round, base)
        return self._published[key]

    def _publish(self, round: int, base: str) -> HeldSnapshot:
        self.store.endless = self.mode == "endless"
        section = self.published.run
        manifest = pb.Manifest(
            run_sha256=bytes.fromhex(self.published.sha256),
            kind=pb.SNAPSHOT_KIND_PSEUDO_GRADIENT,
            round=round,
            part=1,
            tokens=section.merge.inner_steps * section.tokens_per_step,
            inner_steps=section.merge.inner_steps,
            roster_sha256=bytes.fromhex(base),
        )
        specs = (TensorSpec("wrong", (1000, 3)),) if self.mode == "shape" else self.specs
        size_bytes = sum(spec.size_bytes for spec in specs)
        data = b"\0\0\xc0\x7f" * (size_bytes // 4) if self.mode == "finite" else bytes(size_bytes)
        held = build_snapshot(self.identity, manifest, specs, Body([data]))
        if self.mode == "hash":
            held.body = Body([b"\1" * size_bytes])
        self.store.add(held)
        return held


async def enter(published: PublishedRun, invite: Invite, identity: Identity, folder: Path) -> Mallory:
    folder.mkdir()
    key_path = folder / "identity.key"
    key_path.write_bytes(identity.key_file())
    settings = NodeSettings(directory=folder, listen=("/ip4/127.0.0.1/tcp/0",))
    node = await Node.start(settings, identity, key_path)
    for peer in invite.peers:
        await node.connect(peer.peer, peer.addresses)
    model = build_model(published.run.model, published.run.run.seed)
    me = PeerInfo(peer=identity.peer_id, name="mallory", training=True)
    specs = tensor_specs(model.named_parameters())
    mallory = Mallory(node, published, specs, average_bytes_untrusted, lambda event: None, me)
    await mallory.start(invite.peers)
    await mallory.announce()
    return mallory


@contextlib.contextmanager
def mallory_among(bootstrap: Child, identity: Identity, folder: Path) -> Iterator[Mallory]:
    published = PeerFolder(bootstrap.folder).kept_run()
    assert published is not None
    network = NetworkThread()
    mallory = network.run(enter(published, parse_invite(bootstrap.invite.invite), identity, folder), ENTERS_S)
    try:
        yield mallory
    finally:
        network.run(mallory.leave(), LEAVES_S)
        network.stop()


def an_identity(fits: Callable[[str], bool]) -> Identity:
    """Return an identity whose PeerID `fits`."""
    return wait_until(lambda: identity if fits((identity := new_identity()).peer_id) else None, "a PeerID that fits")


@pytest.fixture
def honest(swarm: Swarm) -> tuple[Child, list[Child]]:
    """Start a bootstrap and two volunteers that train."""
    run_file = write_run(swarm.folder, merge={"round_limit_s": ROUND_LIMIT_S, "silence_s": SILENCE_S})
    bootstrap = swarm.bootstrap(run_file)
    return bootstrap, swarm.join_all(["anna", "ben"], bootstrap.invite.invite)


def rss_bytes(child: Child) -> int:
    status = Path(f"/proc/{child.process.pid}/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def test_what_it_publishes_is_refused_and_the_others_train_on(
    swarm: Swarm, honest: tuple[Child, list[Child]], tmp_path: Path
) -> None:
    bootstrap, children = honest
    lowest = min(child.id for child in children)
    for child in children:
        child.wait_round(3)
    before_bytes = [rss_bytes(child) for child in children]
    with mallory_among(bootstrap, an_identity(lambda peer: peer > lowest), tmp_path / "mallory") as mallory:
        me = mallory.identity.peer_id
        for child in children:
            child.wait_event(PeerJoinedEvent, lambda event: event.joined == me)
            child.wait_event(RoundEvent, lambda event: me in event.partners)
        for mode, rule in [("shape", "shape"), ("finite", "finite"), ("hash", "hash"), ("endless", "stream")]:
            mallory.mode = mode
            for child in children:
                refused = child.wait_event(RefusedEvent, lambda event, rule=rule: event.rule == rule)
                assert refused.from_peer == me, refused
                child.wait_more_rounds(3)
    for child, size_bytes in zip(children, before_bytes, strict=True):
        assert {event.from_peer for event in child.all(RefusedEvent)} == {me}
        assert max(event.seconds for event in child.rounds().values()) < COSTS_S
        assert rss_bytes(child) < size_bytes + GROWTH_BYTES
    assert_same_states(children)
    swarm.interrupt_all([bootstrap, *children])


def test_the_lowest_peer_id_that_never_signs_costs_no_more_than_the_time_limit(
    swarm: Swarm, honest: tuple[Child, list[Child]], tmp_path: Path
) -> None:
    bootstrap, children = honest
    lowest = min(child.id for child in children)
    with mallory_among(bootstrap, an_identity(lambda peer: peer < lowest), tmp_path / "mallory") as mallory:
        me = mallory.identity.peer_id
        for child in children:
            child.wait_event(RoundEvent, lambda event: me in event.partners)
            child.wait_more_rounds(1)
        for child in children:  # after two such rounds it is passed over, and still counted
            child.wait_event(RoundEvent, lambda event: me in event.partners and event.seconds < ROUND_LIMIT_S)
    for child in children:
        assert all(event.signer != me for event in child.rounds().values())
        assert max(event.seconds for event in child.rounds().values()) < COSTS_S
    assert_same_states(children)
    swarm.interrupt_all([bootstrap, *children])
