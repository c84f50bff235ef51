"""Keep what this peer knows of the run's other peers, and emit events when that changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from swarmtrain.errors import BadBytesError, PeerError
from swarmtrain.events import Event, PeerJoinedEvent, PeerLeftEvent, PeerLostEvent
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.invite import InvitedPeer
from swarmtrain.network.discovery.records import PRESENCE, open_presence_untrusted, presence_from_proto_untrusted
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.discovery.token_accounting import TokenAccounting
from swarmtrain.network.node import Node
from swarmtrain.network.refusals import Refusals
from swarmtrain.protocol.membership.membership import Arrivals, Membership, MembershipChange, PeerState
from swarmtrain.protocol.membership.records import MAX_READ_BUCKETS, buckets_to_read
from swarmtrain.v1 import snapshot_pb2 as pb

_MAX_STAMP_SKEW_S = 120.0  # a presence may be stamped so far in the future


@dataclass
class KnownPeers:
    """Peers of the run as far as this peer knows. Makes no calls, but for reading the DHT."""

    node: Node
    published: PublishedRun
    membership: Membership
    accounting: TokenAccounting
    emit: Callable[[Event], None]
    changed: Callable[[], None]
    """Called when a peer has joined or gone."""
    through: tuple[InvitedPeer, ...] = field(default=(), init=False)
    """Peers that the user named."""
    arrivals: Arrivals = field(default_factory=Arrivals, init=False)
    greeted: set[str] = field(default_factory=set, init=False)
    """Peers that have received this peer's presence and have not gone since."""
    _signed: dict[str, pb.Signed] = field(default_factory=dict, init=False)
    """Newest signed presence of each peer, to pass on to others."""
    _untold: dict[str, float] = field(default_factory=dict, init=False)
    """Peers known only from records and from other peers, with the stamp of that information. They may have gone since,
    so no event has announced them yet."""
    _refusals: Refusals = field(init=False)

    def __post_init__(self) -> None:
        self._refusals = Refusals(self.emit, self.spares)

    def begin_with(self, through: Sequence[InvitedPeer]) -> list[str]:
        """Set the peers that the user named, without ourselves, and return their PeerIDs."""
        self.through = tuple(peer for peer in through if peer.peer != self.membership.me)
        for peer in self.through:
            self.node.remember_addresses(peer.peer, peer.addresses, peer.addresses)
        return [peer.peer for peer in self.through]

    def is_hidden(self, peer: str) -> bool:
        """Return whether `peer` advertises that nobody can dial it."""
        info = self.membership.info(peer)
        return info is not None and info.hidden

    def others_than(self, caller: str, most: int) -> list[pb.Signed]:
        """Return the presences of up to `most` live peers other than `caller`."""
        known = [info.peer for info in self.membership.live() if info.peer in self._signed and info.peer != caller]
        return [self._signed[peer] for peer in known[:most]]

    # ------------------------------------------------------------- what is said of them

    async def read_records(self) -> None:
        """Read the presence buckets, the root first, then those below full ones."""
        sizes: dict[str, int] = {}
        while wanted := list(buckets_to_read(sizes)):
            if len(sizes) + len(wanted) > MAX_READ_BUCKETS:
                break
            for prefix in wanted:
                found = await self.node.read_bucket(bytes.fromhex(self.published.sha256), PRESENCE, prefix)
                sizes[prefix] = len(found)
                for peer in filter(self.membership.has_room_for, found):
                    self.saw(peer, found[peer][0].presence)

    def receive_untrusted(
        self, signed: pb.Signed, expected_author: str | None, *, answered: bool = False, first_hand: bool = False
    ) -> None:
        """Take in a presence that somebody sent: `expected_author`'s own, or hearsay if that is None.

        Raises BadBytesError if it is invalid, or of another author than expected.
        """
        if not signed.payload:
            return
        author, message = open_presence_untrusted(signed, self.published.sha256)
        if author == self.membership.me:
            return
        if expected_author is not None and author != expected_author:
            raise BadBytesError("a presence of another peer than the one that sent it", code="bad-presence")
        if expected_author is None and not self.membership.has_room_for(author):
            return  # hearsay of strangers: anyone can invent any number of them
        self.saw(author, message, answered=answered, first_hand=first_hand)
        info = self.membership.info(author)
        if info is not None and info.stamp == message.stamp:
            self._signed[author] = signed

    def receive_reply_untrusted(self, peer: str, reply: pb.PublicationReply) -> None:
        """Record what a partner advertises of itself with its publication."""
        self.receive_untrusted(reply.presence, peer, answered=True)
        if reply.away:
            self.left(peer)

    def saw(self, peer: str, presence: pb.Presence, *, answered: bool = False, first_hand: bool = False) -> None:
        """Record a presence. `first_hand` is True if `peer` itself has just sent it, and so is alive."""
        try:
            given = next((known.addresses for known in self.through if known.peer == peer), ())
            info = presence_from_proto_untrusted(peer, presence, given)
            if info.stamp > swarm_time() + _MAX_STAMP_SKEW_S:
                raise BadBytesError("a presence from the future", code="bad-presence")
        except BadBytesError as error:
            self.refused(peer, error)
            return
        run = self.published.run
        # Synchronous rounds know no hidden peers.
        info = dataclasses.replace(info, hidden=info.hidden and run.merge.kind.asynchronous)
        expires_s = info.stamp + run.network.presence_ttl_s  # whatever its record says
        self.node.remember_addresses(peer, info.addresses, given)
        self.accounting.meet(peer)
        is_here = first_hand or info.hidden  # a hidden peer cannot be called, so its presence alone decides
        self.report(self.membership.saw_presence(info, expires_s, swarm_time(), answered=answered), is_here)
        if peer in self._untold and (is_here or info.stamp > self._untold[peer]):  # it has renewed its presence since
            del self._untold[peer]
            self.emit(PeerJoinedEvent(joined=peer, joined_name=info.name))

    # ------------------------------------------------------------- what becomes of them

    def answered(self, peer: str) -> None:
        """Record that a call to `peer` was answered."""
        self.membership.heard(peer, swarm_time())

    def call_failed(self, peer: str, error: PeerError) -> None:
        """Record that a call to `peer` failed."""
        self.report(self.membership.call_failed(peer, swarm_time(), str(error)))

    def left(self, peer: str) -> None:
        """Record that `peer` says it has left."""
        self.report(self.membership.left(peer, swarm_time()))

    def expire(self) -> None:
        """Drop the peers whose presence has expired."""
        for change in self.membership.expire(swarm_time()):
            self.report(change)

    def forget(self, before_s: float) -> list[str]:
        """Forget peers that went before `before_s`, and return their PeerIDs."""
        gone = list(self.membership.forget(before_s))
        for peer in gone:
            self._signed.pop(peer, None)
            self._untold.pop(peer, None)
            self.greeted.discard(peer)
        return gone

    def report(self, change: MembershipChange | None, is_here: bool = False) -> None:
        """Pass on a change of membership, and emit its event.

        An arrival is announced at once if `is_here` (the peer is certainly alive), else as soon as the peer is known to
        be alive.
        """
        if change is None:
            return
        self.changed()
        info = self.membership.info(change.peer)
        if change.state is PeerState.LIVE:
            self.arrivals.came(change.peer, swarm_time())
            if info is not None and info.training:
                if is_here:
                    self.emit(PeerJoinedEvent(joined=change.peer, joined_name=info.name))
                else:
                    self._untold[change.peer] = info.stamp
        else:
            self.greeted.discard(change.peer)
            if self._untold.pop(change.peer, None) is not None or info is None or not info.training:
                return
            if change.state is PeerState.LOST:
                self.emit(PeerLostEvent(lost=change.peer, lost_name=info.name, reason=change.reason))
            else:
                self.emit(PeerLeftEvent(left=change.peer, left_name=info.name))

    def spares(self, peer: str, rule: str, detail: str) -> bool:
        """Return whether a refusal is not announced yet, because this peer, `peer` or a peer that `detail` mentions has
        arrived recently."""
        return self.arrivals.spares(peer, rule, detail, swarm_time())

    def refused(self, peer: str, error: PeerError) -> None:
        """Report bad bytes of a peer."""
        self._refusals.tell(peer, error)
