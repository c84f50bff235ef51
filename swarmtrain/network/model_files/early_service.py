"""Service of a peer that fetches its run's model: it gives away each file that it has, and answers nothing else yet.

The peer enters the swarm when its model is prepared, which may be minutes after the first file is complete. Until then
its swarm's service is not there; this one stands in its place, and calls that it does not answer fail as they do where
nothing answers. It makes itself known to those whom the peer asks for files (`FileSources`).
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from swarmtrain.errors import BusyError, PeerError
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.run_lookup import PublishedRun, version_fields
from swarmtrain.network.model_files.source_table import FileSourceTable
from swarmtrain.network.model_files.sources import FileSources
from swarmtrain.network.node import Node
from swarmtrain.network.service import namespace_of, service_type
from swarmtrain.network.snapshots.store import SnapshotStore
from swarmtrain.v1 import snapshot_pb2 as pb

_log = logging.getLogger(__name__)
_INTRODUCE_EVERY_S = 15.0


async def serve_files_early(node: Node, published: PublishedRun, sources: FileSources) -> None:
    """Serve what is in `node.served_files`, and the run's own files, until a swarm enters in this node."""
    limits = published.run.network
    store = SnapshotStore(limits.max_readers, up=node.traffic.up, min_bytes_per_s=limits.least_bytes_per_s)
    service = service_type()(_EarlyAnswers(published), store, published.blobs(), node)
    await node.serve(service, namespace_of(published.sha256), _introduce(sources))


async def _introduce(sources: FileSources) -> None:
    """Say again and again that this peer serves files."""
    while True:
        await sources.find()
        await asyncio.sleep(_INTRODUCE_EVERY_S)


@dataclass
class _EarlyAnswers:
    """Answers of a peer that is in no swarm yet. See `service.Answers`."""

    published: PublishedRun
    sources: FileSourceTable = field(init=False)

    def __post_init__(self) -> None:
        self.sources = FileSourceTable(self.published.sha256)

    def hello(self, request: pb.HelloRequest, caller: str) -> pb.HelloReply:
        """Answer another peer that fetches files; raise BusyError for all others, which believe this peer absent."""
        if not request.HasField("file_source"):
            raise self._not_here()
        self.sources.take_untrusted(request.file_source, caller)
        return pb.HelloReply(
            **version_fields(),
            run_sha256=bytes.fromhex(self.published.sha256),
            time=swarm_time(),
            away=True,
            file_sources=self.sources.others_than(caller),
        )

    async def state(self, request: pb.StateRequest) -> pb.StateReply:
        """Raise BusyError."""
        raise self._not_here()

    async def round(self, request: pb.RoundRequest, caller: str) -> pb.RoundReply:
        """Raise BusyError."""
        raise self._not_here()

    async def publication(self, request: pb.PublicationRequest, caller: str) -> pb.PublicationReply:
        """Raise BusyError."""
        raise self._not_here()

    def history(self) -> pb.HistoryReply:
        """Raise BusyError."""
        raise self._not_here()

    def refused(self, peer: str, error: PeerError) -> None:
        """Note a peer that calls too often: nobody is told before this peer takes part."""
        _log.info("%s: %s", peer, error)

    def _not_here(self) -> BusyError:
        return BusyError("it is getting the model's files, and takes no part in the run yet")
