"""Serve publications of hidden peers: a host pulls them, and readers pull them from the host.

A hidden peer keeps connections open to its hosts. When a reader asks a host for one of its guests, the host asks the
guest over that connection, pulls what is new (one pull per guest at a time, however many wait for it) and serves it
like its own. It is the same signed, content-addressed snapshot, so a host that lies is found out.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from swarmtrain.errors import BadBytesError, PeerError
from swarmtrain.network.asynchronous.publications import (
    PublicationRules,
    group_untrusted,
    publication_untrusted,
    request_of,
)
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.records import open_presence_untrusted
from swarmtrain.network.identity import peer_id_from_bytes_untrusted
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.snapshots.download import download_snapshot
from swarmtrain.network.snapshots.store import HeldSnapshot, SnapshotStore
from swarmtrain.network.tasks import end_tasks
from swarmtrain.protocol.gossip.partners import PublicationVersion
from swarmtrain.protocol.gossip.pulls import GroupName
from swarmtrain.protocol.membership.hosts import KEPT_OF_A_GUEST, Guests, most_guests
from swarmtrain.v1 import snapshot_pb2 as pb

_log = logging.getLogger(__name__)
_ASK_AGAIN_S = 1.0  # between two questions to a guest about one tensor group
_WAIT_S = 20.0  # for a guest's answer; then a reader gets what is here
_MAX_WAITING_CALLERS = 4  # callers that may all wait for as many replies as they are allowed
_Which: TypeAlias = tuple[str, GroupName, int]
"""(guest, tensor group, fragment of the model)"""


@dataclass
class _Kept:
    """Latest publications of one tensor group of a guest, newest last, and its signed presence."""

    held: list[HeldSnapshot] = field(default_factory=list)
    presence: pb.Signed = field(default_factory=pb.Signed)
    asked_s: float = float("-inf")
    downloading: asyncio.Task[None] | None = None


@dataclass
class HostedPublications:
    """Publications that this host pulls from its guests and serves."""

    calls: PeerCalls
    store: SnapshotStore
    rules: Sequence[Mapping[GroupName, PublicationRules]]
    """Rules of each tensor group, by fragment of the model."""
    presence: Callable[[], pb.Signed]
    refused: Callable[[str, PeerError], None]
    waits_a_caller: int
    """Replies that one caller may wait for at once: as many as it pulls in a round of gossip, since all its partners
    may be guests of this host."""
    guests: Guests = field(init=False)
    _kept: dict[_Which, _Kept] = field(default_factory=dict)
    _waiting: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.guests = Guests(most=most_guests(sum(one.most_bytes for each in self.rules for one in each.values())))

    def ask(self, peer: str) -> bool:
        """Return whether `peer`, which asks for a host, is served by this one from now on."""
        is_guest, reason = self.guests.ask(peer, swarm_time())
        if not is_guest:
            _log.debug("not hosting %s: %s", peer, reason)
        return is_guest

    async def answer(self, request: pb.PublicationRequest, caller: str = "") -> pb.PublicationReply:
        """Return a guest's newest publication for `caller`, or an older one if a newer takes long to come."""
        try:
            author = peer_id_from_bytes_untrusted(request.author)
        except BadBytesError:
            return pb.PublicationReply(away=True)
        here = self.guests.current(swarm_time())
        for gone in {guest for guest, *_ in self._kept} - set(here):
            self._forget(gone)
        if author not in here or request.fragment >= len(self.rules):
            return pb.PublicationReply(away=True)
        try:
            group = group_untrusted(request, self.rules[request.fragment])
        except BadBytesError as error:
            self.refused(caller, error)
            return pb.PublicationReply(away=True)
        if not self.store.has_room_for(caller) or not self._may_wait(caller):
            return pb.PublicationReply(busy=True)
        which = author, group, request.fragment
        kept = self._kept.setdefault(which, _Kept())
        if kept.downloading is None and swarm_time() >= kept.asked_s + _ASK_AGAIN_S:
            kept.downloading = asyncio.create_task(self._download(which, kept))
        if kept.downloading is not None:
            self._waiting[caller] += 1
            try:
                await asyncio.wait({kept.downloading}, timeout=_WAIT_S)
            finally:
                self._waiting[caller] -= 1
                if not self._waiting[caller]:
                    del self._waiting[caller]
        if not kept.held:
            return pb.PublicationReply(busy=True)
        reply, newest = pb.PublicationReply(presence=kept.presence), kept.held[-1]
        manifest = newest.snapshot.manifest
        if not request.has_any or (manifest.round, manifest.part) != (request.round, request.part):
            # Again: the store may have dropped it, since a slower guest's round is older than this peer's own.
            self.store.add(newest)
            reply.manifest.CopyFrom(newest.snapshot.signed)
        return reply

    def _may_wait(self, caller: str) -> bool:
        """Return whether `caller` (empty: an unknown one) may wait for a guest."""
        if caller and self._waiting[caller] >= self.waits_a_caller:
            return False
        return self._waiting.total() < _MAX_WAITING_CALLERS * self.waits_a_caller

    async def _download(self, which: _Which, kept: _Kept) -> None:
        """Ask a guest for a newer publication, and pull it."""
        guest = which[0]
        try:
            await self._download_untrusted(which, kept)
        except PeerError as error:
            _log.debug("hidden peer %s: %s", guest, error)
            if error.is_incident:
                self.refused(guest, error)
        finally:
            kept.asked_s, kept.downloading = swarm_time(), None

    async def _download_untrusted(self, which: _Which, kept: _Kept) -> None:
        """Pull a guest's newest publication of a tensor group, unless this host has it already. Raises PeerError."""
        guest, group, fragment = which
        rules = self.rules[fragment][group]
        known = None
        if kept.held:
            newest = kept.held[-1].snapshot.manifest
            known = PublicationVersion(newest.round, newest.part, newest.tokens)
        request = request_of(group, fragment, known, self.presence())
        reply = await self.calls.publication(guest, request)
        reply.DiscardUnknownFields()  # else the readers that get it would have to accept them too
        if reply.presence.payload:
            author, _ = open_presence_untrusted(reply.presence, rules.run_sha256)
            if author != guest:
                raise BadBytesError("a presence of another peer than the one that sent it", code="bad-presence")
            kept.presence = reply.presence
        if not reply.HasField("manifest"):
            return
        held, _ = publication_untrusted(rules, guest, reply.manifest)
        await download_snapshot(self.calls, guest, held, rules.pull)
        if self._kept.get(which) is not kept or guest not in self.guests.current(swarm_time()):
            return  # it left; as a guest again it begins anew
        self.store.add(held)
        kept.held.append(held)
        while len(kept.held) > KEPT_OF_A_GUEST:
            self.store.drop(kept.held.pop(0).snapshot.sha256)

    def left(self, peer: str) -> None:
        """Stop serving `peer`, which said goodbye."""
        self.guests.left(peer)
        self._forget(peer)

    def _forget(self, guest: str) -> None:
        for which in [which for which in self._kept if which[0] == guest]:
            kept = self._kept.pop(which)
            if kept.downloading is not None:
                kept.downloading.cancel()
            while kept.held:  # tasks that wait for `kept` then find nothing
                self.store.drop(kept.held.pop().snapshot.sha256)

    async def stop(self) -> None:
        """Cancel pulls under way."""
        await end_tasks(kept.downloading for kept in self._kept.values() if kept.downloading is not None)
