"""What a peer knows of a round, and what runs beside its deciding; `network/rounds.py` drives it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from swarmtrain.network.snapshots import Held
from swarmtrain.network.tasks import end_tasks
from swarmtrain.protocol.rosters import Roster, better_roster
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["KnownRound", "Merged", "RoundWork"]


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The mean pseudo-gradient of a roster, as the bytes of one fp32 vector."""

    roster: Roster
    mean: bytearray
    left_out: tuple[str, ...] = ()


@dataclass
class KnownRound:
    """What is known of one round."""

    started_s: float = 0.0
    ended_s: float = 0.0
    publications: dict[str, Held] = field(default_factory=dict)
    rosters: dict[str, tuple[Roster, pb.Signed]] = field(default_factory=dict)
    share: Held | None = None
    asked_at_s: dict[str, float] = field(default_factory=dict)
    answered_at_s: dict[str, float] = field(default_factory=dict)
    """When what each peer answered last was asked."""
    unobtainable: set[str] = field(default_factory=set)
    undeliverable: set[str] = field(default_factory=set)
    distrusted: set[str] = field(default_factory=set)
    """Peers that sent something malformed about this round: asked again, but not waited for."""
    impossible: set[str] = field(default_factory=set)
    """Digests of rosters that name a publication of ours that we never made."""

    lacking_s: dict[str, float] = field(default_factory=dict)
    """Since when each peer has told of a roster whose chain nobody has shown yet."""

    def keep_only(self, peer: str) -> None:
        """The round is over: the others' bytes are not needed any more."""
        self.publications = {peer: self.publications[peer]}

    def best(self) -> tuple[Roster, pb.Signed] | None:
        roster = better_roster([roster for roster, _ in self.rosters.values()])
        return None if roster is None else next(pair for pair in self.rosters.values() if pair[0] == roster)


@dataclass
class RoundWork:
    """What runs beside the deciding: questions by PeerID, pulls by snapshot, and one merge, of the roster `merging`."""

    asking: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    pulling: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    merging: str = ""
    merge: asyncio.Task[Merged | None] | None = None

    async def give_up_merge(self) -> None:
        """The decision is another one now."""
        if self.merge is not None:
            await end_tasks([self.merge])
            self.merge = None

    async def cancel(self) -> None:
        """The round is over."""
        await self.give_up_merge()
        await end_tasks([*self.asking.values(), *self.pulling.values()])
