"""End one round: pull other peers' publications and average them, as the engine commands."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from swarmtrain.errors import UnreachableError
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.rounds.answers import RoundAnswers
from swarmtrain.network.rounds.chains import NextRosters
from swarmtrain.network.rounds.merger import Merger, UnobtainableError
from swarmtrain.network.rounds.roster import publication_of
from swarmtrain.network.rounds.state_fetch import NewState
from swarmtrain.network.snapshots.store import HeldSnapshot, Snapshot, empty_held
from swarmtrain.network.tasks import end_tasks
from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.protocol.rounds.rosters import Roster
from swarmtrain.v1 import snapshot_pb2 as pb

_log = logging.getLogger("swarmtrain.network.rounds.runner")
_Event: TypeAlias = ev.Event[pb.Signed, pb.ChainLink]
_SignedRoster: TypeAlias = ev.SignedRoster[pb.Signed]


@dataclass(frozen=True, kw_only=True)
class RosterMean:
    """Mean pseudo-gradient of a roster, as the bytes of one fp32 vector."""

    roster: Roster
    mean: bytearray
    untrained: tuple[slice, ...] = ()
    """Numbers of the vector that are of no publication: groups of an adapter that nobody trained."""


Outcome: TypeAlias = RosterMean | NewState


class EndedRound:
    """Pulls and merges from the end of this peer's inner steps until the round has an outcome.

    A later merge of the same round reuses the publications that an earlier one found.
    """

    def __init__(
        self,
        own: HeldSnapshot,
        merger: Merger,
        answers: RoundAnswers,
        rosters: NextRosters,
        tell: Callable[[_Event], None],
    ) -> None:
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._merger, self._answers, self._rosters, self._tell = merger, answers, rosters, tell
        self._publications = {own.snapshot.sha256: own}
        self._under_way: set[asyncio.Task[None]] = set()
        self._fetching: dict[str, asyncio.Task[None]] = {}
        """Pulls of whole publications, by name."""
        self._merging: asyncio.Task[None] | None = None
        self._mean: RosterMean | None = None

    def announced(self, snapshot: Snapshot) -> None:
        """Add a publication that this round may merge; none of its bytes have been pulled yet."""
        self._publications.setdefault(snapshot.sha256, empty_held(snapshot))

    def fetch(self, fetch: ev.FetchPublication) -> None:
        """Begin to pull a publication's bytes."""
        self._fetching[fetch.publication.snapshot] = self._begin(self._fetch(fetch))

    def merge(self, one: _SignedRoster) -> None:
        """Begin to average a roster's publications once the previous merge has ended.

        Pulls that began when the group was smaller end if the roster is merged in shares: each peer then needs only a
        part, and what has come by then is used.
        """
        self._mean = None
        if len(one.roster.entries) > self._merger.settings.share_above:
            for task in self._fetching.values():
                task.cancel()
            self._fetching.clear()
        self._merging = self._begin(self._merge(one, self._merging))

    def give_up_merge(self) -> None:
        """Cancel the merge under way."""
        if self._merging is not None:
            self._merging.cancel()

    def finish(self, roster: Roster) -> None:
        """End the round with the mean over this roster."""
        # The engine may name another roster with the same entries by now: it leads to the same weights.
        assert self._mean is not None and self._mean.roster.digest == roster.digest
        self.ends(self._mean)

    def ends(self, outcome: Outcome) -> None:
        """Set the round's outcome, unless it has one."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    def fail(self, error: BaseException) -> bool:
        """Set an error as the outcome. Returns False if the round had an outcome already."""
        is_open = not self.outcome.done()
        if is_open:
            self.outcome.set_exception(error)
        return is_open

    async def stop(self) -> None:
        """Cancel pulls and merges that still run."""
        await end_tasks(self._under_way)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._work_ended)
        return task

    def _work_ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self.fail(error):
            _log.error("an error of this peer disturbed the end of a round", exc_info=error)

    async def _fetch(self, fetch: ev.FetchPublication) -> None:
        sha256 = fetch.publication.snapshot
        held = self._publications[sha256]
        event: _Event = ev.PublicationFetched(sha256)
        try:
            await self._merger.pull_whole(held, fetch.sources)
        except UnreachableError:
            event = ev.PublicationNotFetched(sha256)
        except Exception:
            _log.exception("fetching a publication of %s failed", fetch.publication.peer)
            event = ev.PublicationNotFetched(sha256)
        self._tell(event)

    async def _merge(self, one: _SignedRoster, before: asyncio.Task[None] | None) -> None:
        """Average a roster's publications after the merge `before` has ended, and tell the engine the result."""
        if before is not None:
            await end_tasks([before])
        roster = one.roster
        offers = ((entry.peer, self._publications.get(entry.snapshot)) for entry in roster.entries)
        held = {peer: offer for peer, offer in offers if offer is not None}

        def share_ready(pieces: Sequence[HeldSnapshot]) -> None:
            self._answers.shared(roster.round, pieces)
            self._tell(ev.ShareAveraged(roster.digest, len(pieces)))

        event: _Event
        began_s = swarm_time()
        try:
            mean = await self._merger.merge(roster, one.name, held, share_ready)
            took_s = swarm_time() - began_s
            how = self._merger.roles_in_words(roster)
            _log.info("round %d: averaged %d in %.2f s, %s", roster.round, len(roster.entries), took_s, how)
            untrained = self._merger.settings.groups.untrained(each.snapshot for each in held.values())
            self._mean = RosterMean(roster=roster, mean=mean, untrained=untrained)
            event = ev.RosterMerged(roster.digest)
            self._rosters.merged(one, [each.snapshot.signed for each in held.values()])
        except UnobtainableError as error:
            _log.info("round %d: %s", roster.round, error)
            event = ev.RosterNotMerged(roster.digest, error.peers)
        finally:  # also after a cancelled merge: the next one may want the same publications
            for each in held.values():
                if each.snapshot.sha256 not in self._publications:
                    self._publications[each.snapshot.sha256] = each
                    self._tell(ev.PublicationFound(publication_of(each.snapshot)))
                if each.complete:
                    self._tell(ev.PublicationFetched(each.snapshot.sha256))
        self._tell(event)
