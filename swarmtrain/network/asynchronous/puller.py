"""Ask partners for publications and pull their bytes, as commanded by `protocol.gossip.engine`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from swarmtrain.errors import BadBytesError, BusyError, PeerError, UnreachableError
from swarmtrain.network.asynchronous.publications import (
    PublicationRules,
    is_signed_by_untrusted,
    publication_untrusted,
    request_of,
)
from swarmtrain.network.identity import peer_bytes
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.snapshots.download import download_snapshot
from swarmtrain.network.snapshots.store import HeldSnapshot
from swarmtrain.protocol.gossip.messages import (
    AdvertisedProgress,
    AskPartner,
    DownloadPublication,
    FindRoute,
    PartnerReplied,
    PublicationDownloaded,
    PullFailed,
    PullFailure,
    RouteFound,
)
from swarmtrain.protocol.gossip.pulls import GroupName
from swarmtrain.protocol.membership.membership import Membership
from swarmtrain.v1 import snapshot_pb2 as pb


def failure_of(
    error: PeerError, kind: Literal["busy", "away", "silent", "failed"] | None = None, *, is_authors: bool = False
) -> PullFailure:
    """Return the failure to report to the gossip engine for a peer's error."""
    found = kind or ("busy" if isinstance(error, BusyError) else "failed")
    return PullFailure(str(error), found, error.is_incident, is_authors, error.code)


@dataclass(frozen=True)
class Puller:
    """Carries out the gossip engine's commands over the network. Each method returns the event that ends
    its command."""

    calls: PeerCalls
    membership: Membership
    rules: Sequence[Mapping[GroupName, PublicationRules]]
    """Rules of each tensor group, by fragment."""
    presence: Callable[[], pb.Signed]
    heard_untrusted: Callable[[str, pb.PublicationReply], None]
    """Called with (peer, reply) before the reply is used for anything else."""

    async def route(self, command: FindRoute) -> RouteFound:
        """Find out whether this peer has a connection to a peer; a hidden peer may have opened one."""
        return RouteFound(command.pull, bool(await self.calls.node.seen_at(command.peer)))

    async def ask(self, command: AskPartner) -> PartnerReplied[HeldSnapshot] | PullFailed:
        """Ask the author, or one of its hosts, for something newer than the known version."""
        is_author, number = command.source == command.author, command.pull
        try:
            reply = await self._reply_untrusted(command)
        except PeerError as error:
            return PullFailed(number, failure_of(error))
        except _NoAnswerError as error:
            return PullFailed(number, PullFailure(str(error), "silent"))
        if reply.busy:
            return PullFailed(number, PullFailure("it serves as many readers as it may", "busy"))
        if reply.away and not is_author:
            return PullFailed(number, PullFailure("who should be its host is not", "away"))
        if not reply.HasField("manifest"):
            return PartnerReplied(number)
        try:
            rules = self.rules[command.fragment][command.group]
            held, version = publication_untrusted(rules, command.author, reply.manifest)
        except PeerError as error:
            return PullFailed(number, failure_of(error, is_authors=True))
        return PartnerReplied(number, version, held, self._told(command.author))

    async def _reply_untrusted(self, command: AskPartner) -> pb.PublicationReply:
        """Ask the author or a host, and record what the reply says of the author.

        Raises _NoAnswerError when the author gives no answer, and PeerError for any other failure.
        """
        source, author = command.source, command.author
        request = request_of(command.group, command.fragment, command.known, self.presence())
        if source == author:
            try:
                reply = await self.calls.publication(author, request)
            except UnreachableError as error:
                # An author that gives no answer is asked again sooner than one that sends something wrong (decision
                # 39).
                raise _NoAnswerError(str(error)) from error
            self.heard_untrusted(author, reply)
            return reply
        request.author = peer_bytes(author)
        reply = await self.calls.publication(source, request)
        rules = self.rules[command.fragment][command.group]
        # The author's signature is checked before anything else: without it the host made the manifest up, and is to
        # blame.
        if reply.HasField("manifest") and not is_signed_by_untrusted(rules, author, reply.manifest):
            raise BadBytesError(f"a publication of {author} that is not signed by it", code="bad-signature")
        # Only the presence bears the author's signature: a host cannot report that its guest is away.
        self.heard_untrusted(author, pb.PublicationReply(presence=reply.presence))
        return reply

    def _told(self, peer: str) -> AdvertisedProgress | None:
        info = self.membership.info(peer)
        if info is None:
            return None
        since_s = self.membership.so_far_since_s(peer)
        return AdvertisedProgress(info.round, info.inner_steps, info.inner_steps_done, info.steps_per_s, since_s)

    async def download(self, command: DownloadPublication[HeldSnapshot]) -> PublicationDownloaded | PullFailed:
        """Pull the bytes of a publication."""
        held, number = command.held, command.pull
        try:
            # Every tensor group and fragment has the same limits.
            limits = next(iter(self.rules[0].values())).pull
            wrong = await download_snapshot(self.calls, command.source, held, limits)
        except PeerError as error:
            return PullFailed(number, failure_of(error))
        num_bytes = held.snapshot.manifest.total_bytes
        return PublicationDownloaded(number, num_bytes, None if wrong is None else failure_of(wrong))


class _NoAnswerError(Exception):
    """Raised when an author gives no reply to a request for a publication."""
