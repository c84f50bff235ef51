"""Peers that serve model files before they enter the swarm, as they said lately to the one that keeps this table.

They fetch the run's model, and are in no table of members: they have no model to take part with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from swarmtrain.errors import BadBytesError
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.records import open_presence_untrusted, presence_from_proto_untrusted
from swarmtrain.v1 import snapshot_pb2 as pb

MOST_SOURCES = 32
_KEPT_S = 60.0
"""They say it again every 15 s."""


@dataclass
class FileSourceTable:
    """Table of at most `MOST_SOURCES` peers of a run, of which those heard from longest ago give way."""

    run_sha256: str
    now: Callable[[], float] = swarm_time
    _told: dict[str, tuple[float, pb.Signed]] = field(default_factory=dict, init=False)
    """When each peer said that it serves files, and its presence; the latest last."""

    def take_untrusted(self, signed: pb.Signed, caller: str) -> None:
        """Record that `caller` serves files. Raises BadBytesError for a presence that is invalid or another peer's."""
        author, presence = open_presence_untrusted(signed, self.run_sha256)
        if author != caller:
            raise BadBytesError("a presence of another peer than the one that sent it", code="bad-presence")
        info = presence_from_proto_untrusted(author, presence)
        self._told.pop(author, None)
        if info.addresses and not info.hidden:
            self._told[author] = self.now(), signed
            if len(self._told) > MOST_SOURCES:
                del self._told[next(iter(self._told))]

    def others_than(self, caller: str) -> list[pb.Signed]:
        """Return the presences of the peers but `caller`, those heard from last first."""
        since_s = self.now() - _KEPT_S
        self._told = {peer: told for peer, told in self._told.items() if told[0] >= since_s}
        return [signed for peer, (_, signed) in reversed(self._told.items()) if peer != caller]
