"""Groups of tensors that a pseudo-gradient of synchronous rounds may leave out: those of an adapter.

The gradient's numbers are counted as if it had all groups ("the whole gradient"); a publication's body has those of its
groups, one after the other. Of a model that is no adapter the whole gradient is the only group, and a publication may
have it in fewer bytes (`algorithm/quantize.py:encode_pieces`): each chunk of the whole gradient is a piece of the body.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from swarmtrain.errors import BadBytesError
from swarmtrain.network.snapshots.store import Snapshot, TensorSpec, manifest_untrusted
from swarmtrain.protocol.adapter_groups import group_named, groups_of_names
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.v1 import snapshot_pb2 as pb


@dataclass(frozen=True)
class GradientPiece:
    """Bytes `start` to `end` of the whole gradient, which are bytes `at` to `ends_at` of a publication's body."""

    start: int
    end: int
    at: int
    ends_at: int


class GradientGroups:
    """Tensor tables of a run's pseudo-gradients, and where each group is in the whole gradient."""

    def __init__(self, specs: Sequence[TensorSpec], dtype: str = "float32") -> None:
        """`dtype` is that of publications, which have another than fp32 only if the model is no adapter."""
        self._dtype = dtype
        of = groups_of_names(spec.name for spec in specs) or [0] * len(specs)
        assert list(of) == sorted(of), "an adapter's tensors are ordered by their groups"
        self.is_adapter = bool(specs) and group_named(specs[0].name) is not None
        self._tables = {
            group: tuple(spec for spec, _ in pairs)
            for group, pairs in itertools.groupby(zip(specs, of, strict=True), lambda pair: pair[1])
        }
        sizes = [sum(spec.size_bytes for spec in table) for table in self._tables.values()]
        ends = itertools.accumulate(sizes, initial=0)
        self._places = dict(zip(self._tables, itertools.pairwise(ends), strict=True))

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole gradient."""
        return max((end for _, end in self._places.values()), default=0)

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole gradient."""
        return math.ceil(self.total_bytes / CHUNK_BYTES)

    def table(self, groups: Collection[int] | None) -> tuple[TensorSpec, ...]:
        """Return the tensor table of a publication of these groups; None: of all."""
        if self._dtype != "float32":
            return (self._encoded(self.total_bytes),)
        return tuple(
            spec for group, table in self._tables.items() if groups is None or group in groups for spec in table
        )

    def _encoded(self, num_bytes: int) -> TensorSpec:
        """Return the tensor that the first `num_bytes` of the whole gradient are in a publication."""
        return TensorSpec("gradient", (num_bytes // 4,), self._dtype)

    def places(self, groups: Collection[int] | None) -> list[slice]:
        """Return where the numbers of these groups are in the whole gradient, as a vector of fp32."""
        found = (place for group, place in self._places.items() if groups is None or group in groups)
        return [slice(start // 4, end // 4) for start, end in found]

    def gradient_untrusted(self, signed: pb.Signed, run_sha256: str) -> Snapshot:
        """Return the verified manifest of a pseudo-gradient of one or more whole groups. Raises BadBytesError."""
        table = self.table(None)
        if self.is_adapter:
            try:  # which groups it claims; whether they are as they should be is checked below
                named = [tensor.name for tensor in pb.Manifest.FromString(signed.payload).tensors]
            except DecodeError as error:
                raise BadBytesError("a manifest that cannot be read", code="bad-format") from error
            claimed = {group for name in named if (group := group_named(name)) is not None}
            table = self.table(claimed) or table
        return manifest_untrusted(signed, run_sha256, pb.SNAPSHOT_KIND_PSEUDO_GRADIENT, table)

    def untrained(self, snapshots: Iterable[Snapshot]) -> tuple[slice, ...]:
        """Return the places, as numbers of the whole gradient, that none of these publications has."""
        trained = set[int]().union(*(self._groups_in(snapshot) for snapshot in snapshots))
        return tuple(self.places(self._tables.keys() - trained))

    def _groups_in(self, snapshot: Snapshot) -> set[int]:
        if not self.is_adapter:
            return set(self._tables)
        return {group for tensor in snapshot.manifest.tensors if (group := group_named(tensor.name)) is not None}

    def pieces(self, snapshot: Snapshot, start: int, end: int) -> list[GradientPiece]:
        """Return the pieces of bytes `start` to `end` of the whole gradient that a publication has, in order."""
        if self._dtype != "float32":  # ranges begin at a chunk, and end at one or at the gradient's end
            assert start % CHUNK_BYTES == 0 and (end % CHUNK_BYTES == 0 or end == self.total_bytes)
            return [GradientPiece(start, end, self._encoded(start).size_bytes, self._encoded(end).size_bytes)]
        found, at, groups = [], 0, self._groups_in(snapshot)
        for group, (begins, ends) in self._places.items():
            if group not in groups:
                continue
            first, last = max(start, begins), min(end, ends)
            if first < last:
                found.append(GradientPiece(first, last, at + first - begins, at + last - begins))
            at += ends - begins
        return found

    def in_body(self, piece: GradientPiece, start: int, end: int) -> tuple[int, int]:
        """Return where bytes `start` to `end` of the whole gradient, which are in this piece, are in the body."""
        if self._dtype != "float32":
            return self._encoded(start).size_bytes, self._encoded(end).size_bytes
        return piece.at + start - piece.start, piece.at + end - piece.start

    def segments(self, start: int, end: int, *, by_chunk: bool = False) -> list[tuple[int, int]]:
        """Cut bytes `start` to `end` of the whole gradient where groups end, with `by_chunk` also where chunks do."""
        both = [(max(start, begins), min(end, ends)) for begins, ends in self._places.values()]
        if by_chunk:
            inner = (range(first - first % CHUNK_BYTES, last, CHUNK_BYTES) for first, last in both)
            cuts = [[first, *chunks[1:], last] for (first, last), chunks in zip(both, inner, strict=True)]
            both = [pair for some in cuts for pair in itertools.pairwise(some)]
        return [(first, last) for first, last in both if first < last]
