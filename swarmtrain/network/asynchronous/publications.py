"""Publish this peer's weights and pseudo-gradients to peers that merge asynchronously.

The trainer hands over a publication and continues to train; nothing is computed until a peer requests it. The first
request has it quantised, hashed and signed in a thread. From then on it is that snapshot, so every reader decodes the
same bytes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from swarmtrain.errors import BadBytesError
from swarmtrain.network.identity import Identity, open_signed_untrusted
from swarmtrain.network.snapshots.state_provider import FillManifest
from swarmtrain.network.snapshots.store import (
    Body,
    HeldSnapshot,
    PullLimits,
    SnapshotStore,
    TensorSpec,
    build_snapshot,
    empty_held,
    manifest_untrusted,
)
from swarmtrain.network.tasks import SingleFlight
from swarmtrain.protocol.gossip.partners import PublicationVersion
from swarmtrain.protocol.gossip.pulls import GroupName
from swarmtrain.v1 import snapshot_pb2 as pb

_WEIGHTS, _GRADIENT = "weights", "gradient"
"""Tensor groups requested by a boolean flag instead of by name: the wire format is older than other tensor groups."""
_MAX_NAME_BYTES = 32

_KEPT = 1
"""Built publications kept, besides those that a peer reads or was given the name of."""


class Pulling(Protocol):
    """Background task that pulls."""

    async def stop(self) -> None:
        """Stop pulling until started again."""


@dataclass(frozen=True, kw_only=True)
class PublicationRules:
    """Limits and tensor tables that the run file prescribes for publications of one tensor group of a fragment.

    `max_tokens` is the most that a round can have, and `num_parts` its number of parts; 0 parts mean publications of
    the weights at a round's beginning.
    """

    run_sha256: str
    tables: tuple[tuple[TensorSpec, ...], ...]
    """Tensor tables, one for each format that the tensor group may have."""
    max_tokens: int
    num_parts: int
    pull: PullLimits
    fragment: int = 0
    """Fragment of the model to which these tensors belong."""

    @property
    def most_bytes(self) -> int:
        """Most bytes that one publication can have."""
        return max(sum(spec.size_bytes for spec in table) for table in self.tables)


def request_of(
    group: GroupName, fragment: int, known: PublicationVersion | None, presence: pb.Signed
) -> pb.PublicationRequest:
    """Return a request for a peer's newest publication of a tensor group of a fragment, unless that is the one at
    `known`."""
    named = "" if group in (_WEIGHTS, _GRADIENT) else group
    request = pb.PublicationRequest(weights=group == _WEIGHTS, section=named, fragment=fragment, presence=presence)
    if known is not None:
        request.has_any, request.round, request.part = True, known.round, known.part
    return request


def group_untrusted(request: pb.PublicationRequest, groups: Collection[GroupName]) -> GroupName:
    """Return the requested tensor group. Raises BadBytesError if it is named, and not one of the run's `groups`."""
    if not request.section:
        return _WEIGHTS if request.weights else _GRADIENT
    if len(request.section.encode()) > _MAX_NAME_BYTES:
        raise BadBytesError(
            f"it asks for a tensor group whose name has more than {_MAX_NAME_BYTES} bytes", code="bad-size"
        )
    if request.section not in groups:
        raise BadBytesError(
            f"it asks for a tensor group that this run does not have: {request.section!r}", code="not-asked-for"
        )
    return request.section


def is_signed_by_untrusted(rules: PublicationRules, peer: str, signed: pb.Signed) -> bool:
    """Return whether `peer` signed this manifest. If not, the sender made it up."""
    try:
        return open_signed_untrusted(signed, "manifest", rules.run_sha256, pb.Manifest)[0] == peer
    except BadBytesError:
        return False


def publication_untrusted(
    rules: PublicationRules, peer: str, signed: pb.Signed
) -> tuple[HeldSnapshot, PublicationVersion]:
    """Return an empty snapshot for the publication that `peer`'s manifest names, and its version.

    Raises BadBytesError when the manifest is not `peer`'s, or its fragment, part or counters are out of range.
    """
    snapshot = manifest_untrusted(signed, rules.run_sha256, pb.SNAPSHOT_KIND_PUBLICATION, *rules.tables)
    manifest = snapshot.manifest
    if snapshot.author != peer:
        raise BadBytesError("a publication of another peer than the one that sent it", code="bad-publication")
    if manifest.fragment != rules.fragment:
        raise BadBytesError(
            f"a publication of fragment {manifest.fragment}, where {rules.fragment} was asked for",
            code="bad-publication",
        )
    if not min(1, rules.num_parts) <= manifest.part <= rules.num_parts:
        raise BadBytesError(
            f"a publication of part {manifest.part}, where a round has {rules.num_parts} parts", code="bad-round"
        )
    # Each step trains on at least one token. Weights at a round's beginning (part 0) have no steps yet.
    most, least = (rules.max_tokens, 1) if manifest.part else (0, 0)
    if not (least <= manifest.inner_steps <= manifest.tokens <= most):
        raise BadBytesError(
            f"a publication that claims {manifest.tokens} tokens in {manifest.inner_steps} steps, which cannot be",
            code="bad-tokens",
        )
    if not manifest.tokens <= manifest.author_tokens < 2**60:
        raise BadBytesError(
            "a publication that counts more tokens in its round than in all rounds of its author", code="bad-tokens"
        )
    return empty_held(snapshot), PublicationVersion(manifest.round, manifest.part, manifest.tokens)


@dataclass(frozen=True, kw_only=True)
class OwnPublication:
    """Publication of a tensor group: part number `part` of a round, or as part 0 the weights with which the round
    begins.

    The publisher calls `encode` for the bytes when a peer requests them.
    """

    round: int
    part: int
    tokens: int
    inner_steps: int
    author_tokens: int
    encode: Callable[[], Body]
    specs: Sequence[TensorSpec] | None = None
    """Tensor table, if it differs from the publisher's."""
    token: object = field(default_factory=object)
    """Identity of this publication for comparison, so that nobody has to keep its vectors alive."""
    fill: FillManifest = lambda manifest: None


@dataclass
class Publisher:
    """Keeps the newest publication of a tensor group, and builds its snapshot when a peer requests it."""

    identity: Identity
    run_sha256: str
    specs: Sequence[TensorSpec]
    store: SnapshotStore
    fragment: int = 0
    newest: OwnPublication | None = None
    """Newest publication; set by the trainer's thread, read by the network's."""
    shard_rows: Callable[[], Iterable[pb.Signed]] = tuple
    """Returns the signed rows of seen data for the manifest."""
    _built: deque[tuple[object, HeldSnapshot]] = field(default_factory=deque)
    _building: asyncio.Lock = field(default_factory=asyncio.Lock)
    _making: SingleFlight[HeldSnapshot] = field(default_factory=SingleFlight)

    def wanted(self, request: pb.PublicationRequest, caller: str) -> OwnPublication | None:
        """Return the newest publication, or None if the caller has it already."""
        newest = self.newest
        if newest is None or (request.has_any and (newest.round, newest.part) == (request.round, request.part)):
            return None
        return newest

    async def held_after(self, request: pb.PublicationRequest, caller: str = "") -> HeldSnapshot | None:
        """Return the snapshot of the newest publication, building it if necessary; None if the caller has it
        already."""
        async with self._building:
            wanted = self.wanted(request, caller)
            if wanted is None:
                return None
            if not self._built or self._built[-1][0] is not wanted.token:
                held = await self._making.made(wanted.token, partial(self._build, wanted))
                self._built.append((wanted.token, held))
                while len(self._built) > _KEPT:
                    self.store.drop(self._built.popleft()[1].snapshot.sha256)
            self.store.add(self._built[-1][1])  # again: the store may have dropped it as too old a round
            self.store.touch(self._built[-1][1].snapshot.sha256)
            return self._built[-1][1]

    def _build(self, publication: OwnPublication) -> HeldSnapshot:
        manifest = pb.Manifest(
            run_sha256=bytes.fromhex(self.run_sha256),
            kind=pb.SNAPSHOT_KIND_PUBLICATION,
            round=publication.round,
            part=publication.part,
            tokens=publication.tokens,
            inner_steps=publication.inner_steps,
            author_tokens=publication.author_tokens,
            fragment=self.fragment,
            coverage=self.shard_rows(),
        )
        publication.fill(manifest)
        return build_snapshot(self.identity, manifest, publication.specs or self.specs, publication.encode())
