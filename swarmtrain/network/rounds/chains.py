"""A peer's own chain of rosters with the manifests that stand on them, and those that others show; as bytes, checked.

What they mean is in `protocol/rounds/chains.py`; who asks for them is in `network/rounds/questions.py`.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterable, Sequence

from google.protobuf.message import DecodeError

from swarmtrain.errors import BadBytesError
from swarmtrain.network.rounds.merger import RoundSettings
from swarmtrain.network.rounds.roster import check_publication, named, publication_of, roster_untrusted
from swarmtrain.network.signatures import payload_sha256
from swarmtrain.network.snapshots.store import manifest_untrusted
from swarmtrain.protocol.rounds.chains import MAX_LINKS, Chain, ChainLink, Chains, ShownChain, flaw
from swarmtrain.protocol.rounds.messages import SignedRoster
from swarmtrain.protocol.rounds.rosters import Roster
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["ChainStore", "NextRosters", "chain_untrusted"]

_MAX_BYTES = 2 * 1024 * 1024 + 512 * 1024
"""Of a chain on the wire, and of what is kept of the own one: a frame has 4 MiB."""
_KEPT_BYTES = 256 * 1024
"""Of the own chain in each checkpoint."""
_MAX_MANIFESTS = 2048
_MAX_KNOWN = 64


def chain_untrusted(message: pb.RosterChain, ours: Chain, settings: RoundSettings) -> ShownChain[pb.ChainLink]:
    """A chain that somebody shows, every signature checked; BadBytesError if anything does not fit.

    Takes as long as a thousand signatures may: call it in a thread.
    """
    num_manifests = sum(len(link.manifests) for link in message.links)
    if not 1 <= len(message.links) <= MAX_LINKS or num_manifests > _MAX_MANIFESTS:
        raise BadBytesError("a chain of rosters of a size out of range", code="bad-size")
    links, signed = [], {}
    for link in message.links:
        roster = roster_untrusted(link.roster, settings.run_sha256, settings.max_tokens)
        shown = dict(_manifest_untrusted(manifest, roster, settings) for manifest in link.manifests)
        links.append(ChainLink(roster=roster, shown=shown))
        signed[roster.digest] = link
    chain = Chain(tuple(links))
    if found := flaw(chain, ours):
        raise BadBytesError(found, code="bad-chain")
    return ShownChain(chain.joined_to(ours), signed)


def _manifest_untrusted(signed: pb.Signed, roster: Roster, settings: RoundSettings) -> tuple[str, int]:
    """(author, tokens) of a manifest that is one of this roster's entries."""
    snapshot = manifest_untrusted(signed, settings.run_sha256, pb.SNAPSHOT_KIND_PSEUDO_GRADIENT, settings.specs)
    check_publication(snapshot, snapshot.author, roster.round, settings.max_tokens)
    if publication_of(snapshot) not in roster.entries:
        raise BadBytesError("a chain with manifests of other entries than its rosters have", code="bad-chain")
    return snapshot.author, snapshot.manifest.tokens


class ChainStore(Chains[pb.ChainLink]):
    """This peer's own chain, and what others have shown of theirs, as they travel."""

    def move_to(self, roster: Roster, signed: pb.Signed, manifests: Sequence[pb.Signed] = ()) -> None:
        """The weights are those after `roster` now: merged here with these manifests, or taken from another peer."""
        tokens = {entry.snapshot: entry for entry in roster.entries}
        names = (tokens.get(payload_sha256(manifest)) for manifest in manifests)
        shown = {entry.peer: entry.tokens for entry in names if entry is not None}
        self.move(ChainLink(roster=roster, shown=shown), pb.ChainLink(roster=signed, manifests=manifests))

    def _bounded(self, signed: dict[str, pb.ChainLink]) -> dict[str, pb.ChainLink]:
        """The signed links of our chain, those of its end whole, those before them without manifests."""
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
        """Digests of our chain that tell another where its own parts from it: ever fewer, the farther back."""
        links = self.chain.links
        back = itertools.takewhile(lambda i: i <= len(links), (2**i for i in range(_MAX_KNOWN - 2)))
        digests = [links[-i].roster.digest for i in back]
        if links:
            digests += [links[0].roster.digest, links[0].roster.base]
        return [bytes.fromhex(digest) for digest in dict.fromkeys(digests)]

    def shows(self, known: Iterable[bytes], most_bytes: int | None = None) -> pb.RosterChain:
        """What led from the last of the rosters in `known` to ours; as much of it as a message holds, its end first."""
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
        """What a checkpoint keeps of our chain. From any thread."""
        return base64.b64encode(self.shows((), _KEPT_BYTES).SerializeToString()).decode()

    def restore_untrusted(self, kept: str, settings: RoundSettings) -> None:
        """Know again what a checkpoint kept, before `move_to` is told its roster. BadBytesError if it is damaged."""
        try:
            message = pb.RosterChain.FromString(base64.b64decode(kept, validate=True))
        except (DecodeError, ValueError, TypeError) as error:
            raise BadBytesError(f"a kept chain of rosters that cannot be read: {error}", code="bad-chain") from error
        if message.links:
            self.keep(chain_untrusted(message, self.chain, settings))


class NextRosters:
    """The rosters one of which this peer may apply next: of each the mean is made here, or a state was taken."""

    def __init__(self, chains: ChainStore) -> None:
        self._chains = chains
        self._known: dict[str, tuple[SignedRoster[pb.Signed], Sequence[pb.Signed]]] = {}
        """By digest, with the manifests that were merged."""

    def merged(self, one: SignedRoster[pb.Signed], manifests: Sequence[pb.Signed]) -> None:
        """Its mean is made here, of these."""
        self._known[one.roster.digest] = one, manifests

    def taken(self, roster: Roster, signed: pb.Signed) -> None:
        """The state after it was taken from another peer, or read from a disk."""
        _, manifests = self._known.get(roster.digest, (None, ()))
        self._known[roster.digest] = named(roster, signed), manifests

    def apply(self, digest: str, last: SignedRoster[pb.Signed] | None) -> SignedRoster[pb.Signed]:
        """This one it is, unless it is `last`, that which was applied before: our chain leads to it from now on."""
        one, manifests = self._known.get(digest, (last, ()))
        assert one is not None and one.roster.digest == digest, "a state without its roster"
        self._chains.move_to(one.roster, one.signed, manifests)
        return one

    def forget(self) -> None:
        """Those of the round before are not needed any more."""
        self._known.clear()
