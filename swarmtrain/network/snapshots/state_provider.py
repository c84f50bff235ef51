"""Serve this peer's newest state to late joiners and to peers that missed a round.

Hashing a state takes time and memory, so it becomes a snapshot only when a peer asks for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from swarmtrain.network.asynchronous.place_rows import add_place_rows
from swarmtrain.network.identity import Identity
from swarmtrain.network.snapshots.store import Body, HeldSnapshot, SnapshotStore, TensorSpec, build_snapshot
from swarmtrain.network.tasks import SingleFlight
from swarmtrain.network.token_rows import add_token_rows
from swarmtrain.protocol.gossip.partners import Place
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.v1 import snapshot_pb2 as pb

_POLL_INTERVAL_S = 2.0  # between two looks whether a state built on demand is still being read

SECOND_MOMENT = "moment-2"
"""Name of the second of several moments, of AdamW and LAMB the means of squares, in a state's tensor table."""

FillManifest = Callable[[pb.Manifest], None]
"""Adds to a manifest the fields that only some merge methods have."""


def state_specs(specs: Sequence[TensorSpec], num_moments: int = 1) -> tuple[TensorSpec, ...]:
    """Return the tensor table of a state: the outer parameters, then their momentum, or each of several moments."""
    moments = ("momentum",) if num_moments == 1 else tuple(f"moment-{number + 1}" for number in range(num_moments))
    return tuple(
        TensorSpec(f"{part}/{spec.name}", spec.shape, spec.dtype) for part in ("theta", *moments) for spec in specs
    )


@dataclass
class StateProvider:
    """Newest state of this peer, built into a snapshot on demand."""

    identity: Identity
    run_sha256: str
    specs: Sequence[TensorSpec]
    store: SnapshotStore
    coverage: Callable[[], Sequence[pb.Signed]] = tuple
    """Returns the signed rows of seen data that go into the manifest."""
    places: Callable[[], Sequence[Mapping[str, Place]]] = tuple
    """Returns, for each fragment, the place up to which the weights hold each peer's publications. Called when the body
    is made."""
    progress: Progress | None = None
    _body: Body | Callable[[], Body] | None = field(default=None, init=False)
    _fill: FillManifest = field(default=lambda manifest: None, init=False)
    _held: HeldSnapshot | None = field(default=None, init=False)
    _held_of: Progress | None = field(default=None, init=False)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _making: SingleFlight[HeldSnapshot] = field(default_factory=SingleFlight, init=False)

    def put(
        self, progress: Progress, body: Body | Callable[[], Body], fill: FillManifest = lambda manifest: None
    ) -> None:
        """Offer this state from now on; nobody may write into its buffers any more.

        A callable `body` is called in a thread when a peer asks for the state, and gives the state of that moment. It
        may contain more than `progress` counts, and is dropped when nobody reads it.
        """
        self._let_go(self._held)
        self.progress, self._body, self._fill = progress, body, fill

    async def held(self, min_round: int) -> tuple[Progress, HeldSnapshot] | None:
        """Return the newest state as a snapshot, or None if it is older than `min_round`."""
        async with self._lock:
            progress, body, fill = self.progress, self._body, self._fill
            if progress is None or body is None or progress.round < min_round:
                return None
            held = self._held
            if held is None or self._held_of is not progress:
                held = await self._making.made(progress, partial(self._build, progress, body, fill))
                self._held, self._held_of = held, progress
                self.store.add(held)
                if callable(body):
                    self._look_later(held)
            self.store.touch(held.snapshot.sha256)
            return progress, held

    def _look_later(self, held: HeldSnapshot) -> None:
        asyncio.get_running_loop().call_later(_POLL_INTERVAL_S, self._look, held)

    def _look(self, held: HeldSnapshot) -> None:
        """Drop a state that nobody reads: it keeps tensors alive that merges have replaced, 8 bytes a parameter."""
        if held is not self._held:  # another has followed, perhaps while this one was made
            if self._held is None or self._held.snapshot.sha256 != held.snapshot.sha256:
                self.store.drop(held.snapshot.sha256)
            return
        if self.store.is_being_read(held.snapshot.sha256):
            self._look_later(held)
        else:
            self._let_go(held)

    def _let_go(self, held: HeldSnapshot | None) -> None:
        if held is not None and callable(self._body):
            self.store.drop(held.snapshot.sha256)
            self._held = self._held_of = None

    def _build(self, progress: Progress, body: Body | Callable[[], Body], fill: FillManifest) -> HeldSnapshot:
        # The body first: coverage and places may then count a merge that it lacks, never miss one in it.
        made = body() if callable(body) else body
        manifest = pb.Manifest(
            run_sha256=bytes.fromhex(self.run_sha256),
            kind=pb.SNAPSHOT_KIND_STATE,
            round=progress.round,
            run_tokens=progress.run_tokens,
            roster_sha256=bytes.fromhex(progress.roster_sha256),
            coverage=self.coverage(),
        )
        add_token_rows(manifest, progress.peer_tokens)
        add_place_rows(manifest, self.places())
        fill(manifest)
        return build_snapshot(self.identity, manifest, self.specs, made)
