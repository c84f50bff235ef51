"""Write, verify and keep chains of rosters with their manifests: this peer's own, and those that others show.

`protocol/rounds/chains.py` decides which chain holds; `network/rounds/questions.py` asks for them.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterable, Sequence

from google.protobuf.message import DecodeError

from swarmtrain.errors import BadBytesError
from swarmtrain.network.identity import payload_sha256
from swarmtrain.network.rounds.merger import RoundSettings
from swarmtrain.network.rounds.roster import check_publication, named, publication_of, roster_untrusted
from swarmtrain.protocol.rounds.chains import MAX_LINKS, Chain, ChainLink, Chains, ShownChain, flaw
from swarmtrain.protocol.rounds.messages import SignedRoster
from swarmtrain.protocol.rounds.rosters import Roster
from swarmtrain.v1 import snapshot_pb2 as pb

_MAX_BYTES = 2 * 1024 * 1024 + 512 * 1024
"""Most bytes of a chain on the wire, and of the own chain in memory: a frame has 4 MiB."""
_KEPT_BYTES = 256 * 1024
"""Most bytes of the own chain in each checkpoint."""
_MAX_MANIFESTS = 2048  # in one message
_MAX_KNOWN = 64  # digests that one message names


def chain_untrusted(message: pb.RosterChain, ours: Chain, settings: RoundSettings) -> ShownChain[pb.ChainLink]:
    """Return the chain in a peer's message, joined to `ours`, after verifying every signature.

    Takes as long as up to a thousand signatures: call it in a thread. Raises BadBytesError if the chain is invalid.
    """
    num_manifests = sum(len(link.manifests) for link in message.links)
    if not 1 <= len(message.links) <= MAX_LINKS or num_manifests > _MAX_MANIFESTS:
        raise BadBytesError("a chain with too few or too many rosters", code="bad-size")
    links, signed = [], {}
    for link in message.links:
        num_chunks = settings.groups.num_chunks
        roster = roster_untrusted(link.roster, settings.run_sha256, settings.max_tokens, num_chunks)
        shown = dict(_manifest_untrusted(manifest, roster, settings) for manifest in link.manifests)
        links.append(ChainLink(roster=roster, shown=shown))
        signed[roster.digest] = link
    chain = Chain(tuple(links))
    if found := flaw(chain, ours):
        raise BadBytesError(found.detail, code=found.code)
    return ShownChain(chain.joined_to(ours), signed)


def _manifest_untrusted(signed: pb.Signed, roster: Roster, settings: RoundSettings) -> tuple[str, int]:
    """Return (author, tokens) of a manifest. Raises BadBytesError unless it is one of this roster's entries."""
    snapshot = settings.groups.gradient_untrusted(signed, settings.run_sha256)
    check_publication(snapshot, snapshot.author, roster.round, settings.max_tokens)
    if publication_of(snapshot) not in roster.entries:
        raise BadBytesError(
            "a chain with manifests of publications that are not on its rosters", code="bad-publication"
        )
    return snapshot.author, snapshot.manifest.tokens


class ChainStore(Chains[pb.ChainLink]):
    """Chain of this peer, and chains that other peers have sent, as signed messages."""

    def move_to(self, roster: Roster, signed: pb.Signed, manifests: Sequence[pb.Signed] = ()) -> None:
        """Append `roster`, which led to the present weights: merged here from `manifests`, or taken from
        another peer."""
        tokens = {entry.snapshot: entry for entry in roster.entries}
        names = (tokens.get(payload_sha256(manifest)) for manifest in manifests)
        shown = {entry.peer: entry.tokens for entry in names if entry is not None}
        self.move(ChainLink(roster=roster, shown=shown), pb.ChainLink(roster=signed, manifests=manifests))

    def _bounded(self, signed: dict[str, pb.ChainLink]) -> dict[str, pb.ChainLink]:
        """Return the signed links of this peer's chain that fit into the limit, latest first; older ones are kept
        without their manifests."""
        kept, room_bytes = dict[str, pb.ChainLink](), _MAX_BYTES
        for link in reversed(self.chain.links):
            if (one := signed.get(link.roster.digest)) is None:
                break
            if (size_bytes := one.ByteSize()) > room_bytes:
                one = pb.ChainLink(roster=one.roster)
                size_bytes = one.ByteSize()
            if size_bytes > room_bytes:
                break
            room_bytes -= size_bytes
            kept[link.roster.digest] = one
        return kept

    def known(self) -> list[bytes]:
        """Return digests of rosters on this peer's chain, spaced wider the older they are. Another peer finds by them
        where its own chain departs from this one."""
        links = self.chain.links
        back = itertools.takewhile(lambda i: i <= len(links), (2**i for i in range(_MAX_KNOWN - 2)))
        digests = [links[-i].roster.digest for i in back]
        if links:
            # The oldest roster kept, and its base: the farthest point at which another chain can still be joined to
            # ours.
            digests += [links[0].roster.digest, links[0].roster.base]
        return [bytes.fromhex(digest) for digest in dict.fromkeys(digests)]

    def shows(self, known: Iterable[bytes], most_bytes: int | None = None) -> pb.RosterChain:
        """Return the links from the last roster in `known` to this peer's head, the latest first, as many as fit into a
        message."""
        asker = {digest.hex() for digest in itertools.islice(known, _MAX_KNOWN)}
        parts, room_bytes, num_manifests = [], _MAX_BYTES if most_bytes is None else most_bytes, 0
        for link in reversed(self.chain.links):
            digest = link.roster.digest
            if digest in asker or (one := self._signed.get(digest)) is None:
                break
            num_manifests += len(one.manifests)
            if one.ByteSize() > room_bytes or num_manifests > _MAX_MANIFESTS:
                one = pb.ChainLink(roster=one.roster)
            if (size_bytes := one.ByteSize()) > room_bytes:
                break
            room_bytes -= size_bytes
            parts.append(one)
        return pb.RosterChain(links=reversed(parts))

    def kept(self) -> str:
        """Return what a checkpoint keeps of this peer's chain, in base64. May be called from any thread."""
        return base64.b64encode(self.shows((), _KEPT_BYTES).SerializeToString()).decode()

    def restore_untrusted(self, kept: str, settings: RoundSettings) -> None:
        """Load what `kept` returned, before `move_to` appends the checkpoint's roster. Raises BadBytesError if it is
        damaged."""
        try:
            message = pb.RosterChain.FromString(base64.b64decode(kept, validate=True))
        except (DecodeError, ValueError, TypeError) as error:
            raise BadBytesError(f"a saved chain of rosters that cannot be read: {error}", code="bad-chain") from error
        if message.links:
            self.keep(chain_untrusted(message, self.chain, settings))


class NextRosters:
    """Rosters that this peer may apply next: it has averaged them, or has taken the state that they lead to."""

    def __init__(self, chains: ChainStore) -> None:
        self._chains = chains
        self._known: dict[str, tuple[SignedRoster[pb.Signed], Sequence[pb.Signed]]] = {}
        """Rosters by digest, each with the manifests that were merged."""

    def merged(self, one: SignedRoster[pb.Signed], manifests: Sequence[pb.Signed]) -> None:
        """Add a roster that was averaged here from `manifests`."""
        self._known[one.roster.digest] = one, manifests

    def taken(self, roster: Roster, signed: pb.Signed) -> None:
        """Add the roster of a state that was taken from another peer, or read from a disk."""
        _, manifests = self._known.get(roster.digest, (None, ()))
        self._known[roster.digest] = named(roster, signed), manifests

    def apply(self, digest: str, last: SignedRoster[pb.Signed] | None) -> SignedRoster[pb.Signed]:
        """Append the roster with this digest to this peer's chain, and return it. `last` is the roster applied before;
        it may be the same."""
        one, manifests = self._known.get(digest, (last, ()))
        assert one is not None and one.roster.digest == digest, "a state without its roster"
        self._chains.move_to(one.roster, one.signed, manifests)
        return one

    def forget(self) -> None:
        """Forget the rosters of the round before."""
        self._known.clear()
