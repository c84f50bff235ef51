"""A bootstrap's record of its archive: whose tokens the weights contain, what was merged, which data was seen.

The bootstrap gives all of that, with all peers' counts, to each peer that takes the archive: by then all volunteers may
be gone.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.network.answers import Serving
from swarmtrain.network.coverage import CarriedRows
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.checkpoints.checkpoint import Checkpoint
from swarmtrain.peer.checkpoints.manager import CheckpointManager
from swarmtrain.peer.merging.consensus_state import ConsensusState
from swarmtrain.protocol.archive.schedule import ArchiveSchedule, adds_to_archive, tokens_gained
from swarmtrain.protocol.gossip.partners import Place
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.tokens.progress import Progress

_log = logging.getLogger(__name__)
_HOLDS = "holds"
_ROWS = "shard_rows"
_PLACES = "places"
_SLACK_ROUNDS = 4
"""Rounds that a state's counts of other peers may be out of date by."""


@dataclass
class Archive:
    """Record of what the archive of one swarm contains: a run's swarm, or a stage's."""

    swarm: Swarm
    manager: CheckpointManager
    watch: ArchiveSchedule = field(default_factory=ArchiveSchedule)
    holds: Mapping[str, int] = field(default_factory=dict)
    """Tokens of each peer that are in the archived weights."""
    places: Sequence[Mapping[str, Place]] = ()
    """For each fragment, how far each peer's publications are in the archived weights."""
    rows: CarriedRows = field(init=False)
    _served: Progress = field(default_factory=Progress)
    _asked: Sequence[PeerInfo] = ()

    def __post_init__(self) -> None:
        self.rows = CarriedRows(self.swarm.published.sha256, self.swarm.accounting.contributions)
        self.manager.extras.update(
            {
                _HOLDS: lambda: dict(self.holds),
                _PLACES: lambda: [dict(of_fragment) for of_fragment in self.places],
                _ROWS: self.rows.kept,
            }
        )

    def serving(self) -> Serving:
        """Return what is served with the archive's state: rows of seen data, and the places of publications in its
        weights."""
        return Serving(rows=self.rows.rows_to_send, places=lambda: self.places)

    def restore(self, kept: Checkpoint | None) -> None:
        """Restore what was archived last time, and the counts since."""
        if kept is None:
            self.swarm.accounting.watch()
        else:
            self.holds = _holds_of(kept.extra.get(_HOLDS), kept.progress)
            self.places = _places_of(kept.extra.get(_PLACES))
            self._served = kept.progress
            try:
                self.rows.restore(kept.extra.get(_ROWS, []))
            except (ValueError, TypeError) as error:
                _log.info("ignored the data coverage in the archive: %s", error)
        # Counts and weights are archived apart: counts never fall, even where the work itself was lost (decision 49).
        self.manager.restore_counts()

    def asks(self, infos: Sequence[PeerInfo]) -> None:
        """Record that the states of some of these volunteers, which are all that train, are being asked for."""
        self._asked = infos

    def is_wanted(self, counts: Mapping[str, int], authors: Collection[str]) -> bool:
        """Return whether pulled weights of `authors` should replace those in the archive.

        If the archive contains them already, their authors are not asked again before they have more.
        """
        if not tokens_gained(counts, authors, self.holds):
            self.watch.archived(self._asked)
            return False
        slack_tokens = _SLACK_ROUNDS * self.swarm.published.run.round_tokens * len(self.holds)
        if adds_to_archive(counts, authors, self.holds, slack_tokens):
            return True
        _log.info("the volunteers' state lacks more of the archive's tokens than it adds")
        # Refused for a minute, then accepted: whoever trains on is the run. Averaging both was rejected, since an old
        # folder would pull the model back (decision 49).
        return not self.watch.refuse(swarm_time())

    def kept_of(self, present: ConsensusState) -> Checkpoint:
        """Return the checkpoint of the swarm's present weights, and remember what it contains."""
        self.holds, self.places = dict(present.holds), present.places
        self.watch.archived(self._asked)
        for _, rows in present.shard_rows:
            self.rows.receive_untrusted(rows)
        self._served = present.progress
        return checkpoint_of(present, self.manager)

    async def serve_counts(self, state: OuterState, progress: Progress) -> None:
        """Serve the archived `state` with the present counts. Runs in the network thread.

        Tokens trained since it was made belong to the run, whoever holds them: its learning rate must not rise again.
        """
        counts = self.swarm.accounting.contributions()
        if sum(counts.values()) <= self._served.run_tokens:
            return
        self._served = dataclasses.replace(progress, run_tokens=sum(counts.values()), peer_tokens=counts)
        kept = Checkpoint(state=state, progress=self._served, roster=None, signed_roster=None)
        await self.manager.offer(kept)


def checkpoint_of(present: ConsensusState, manager: CheckpointManager) -> Checkpoint:
    """Return the swarm's present weights as a checkpoint, with what `manager` keeps beside them."""
    return Checkpoint(
        state=present.state,
        progress=present.progress,
        roster=present.roster,
        signed_roster=present.signed_roster,
        extra=manager.extra(),
    )


def _holds_of(kept: Any, progress: Progress) -> Mapping[str, int]:
    """Return each peer's tokens in a checkpoint's weights, as the checkpoint says; older checkpoints say it by their
    counts."""
    if not isinstance(kept, Mapping):
        return progress.peer_tokens
    pairs = [(peer, tokens) for peer, tokens in kept.items() if isinstance(peer, str) and isinstance(tokens, int)]
    return dict(pairs) if len(pairs) == len(kept) else progress.peer_tokens


def _places_of(kept: Any) -> Sequence[Mapping[str, Place]]:
    """Return how far publications are in a checkpoint's weights; empty if it is old or malformed."""
    try:
        return [{str(peer): (int(round), int(part)) for peer, (round, part) in each.items()} for each in kept or ()]
    except (ValueError, TypeError, AttributeError) as error:
        _log.info("ignored the list of publications in the archive: %s", error)
        return ()
