"""Ask other peers about rounds, and check and read their replies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from swarmtrain.errors import BadBytesError, PeerError
from swarmtrain.network.rounds.chains import ChainStore, chain_untrusted
from swarmtrain.network.rounds.downloads import Downloads
from swarmtrain.network.rounds.merger import RoundSettings
from swarmtrain.network.rounds.roster import CheckedRosters, check_publication, publication_of
from swarmtrain.network.snapshots.store import Snapshot
from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.protocol.rounds.rosters import AdvertisedRound, Roster
from swarmtrain.v1 import snapshot_pb2 as pb

_log = logging.getLogger("swarmtrain.network.rounds.runner")


@dataclass(frozen=True, slots=True)
class Said:
    """Engine event that results from a question, and the publication that the reply announced."""

    event: ev.QuestionAnswered[pb.Signed, pb.ChainLink] | ev.ReplyRefused | ev.QuestionFailed
    publication: Snapshot | None = None


class RoundQuestions:
    """Sends questions, and remembers the last roster that each peer said it had applied.

    A request names that roster, so a peer that has applied no other need not send it again: a roster of 1,000 peers is
    """

    def __init__(
        self,
        downloads: Downloads,
        settings: RoundSettings,
        chains: ChainStore,
        rosters: CheckedRosters,
        last_of: Callable[[str], Roster | None],
    ) -> None:
        """Make a questioner; `last_of(peer)` returns the roster that, as the engine knows, a peer applied last."""
        self._downloads, self._settings, self._chains, self._rosters = downloads, settings, chains, rosters
        self._last_of = last_of
        self._last_signed: dict[str, tuple[Roster, str]] = {}
        """Roster that each peer last said it had applied, with its name."""
        self._broken: set[str] = set()
        """Peers whose last reply caused an error in this program itself."""

    async def ask(self, ask: ev.AskRoundQuestion) -> Said:
        """Send one question and return its result. Never raises for a bad or missing reply."""
        question = ask.question
        request = pb.RoundRequest(
            round=question.round,
            has_publication=question.has_publication,
            has_roster_sha256=bytes.fromhex(question.has_roster),
            has_share=question.has_share,
            has_last_sha256=self.last_known(ask.peer),
            wants_chain=question.wants_chain,
            wait_s=question.hold_s,
        )
        if question.wants_chain:
            request.chain_known.extend(self._chains.known())
        try:
            said = await self.read_untrusted(ask, await self._downloads.calls.round(ask.peer, request))
            self._broken.discard(ask.peer)
            return said
        except BadBytesError as error:
            self._downloads.refused(ask.peer, error)
            return Said(ev.ReplyRefused(ask.number))
        except PeerError as error:
            _log.debug("asking %s about round %d failed: %s", ask.peer, question.round, error)
            return Said(ev.QuestionFailed(ask.number))
        except Exception:  # a bug here costs this question, not the round
            if ask.peer not in self._broken:  # the peer is asked again soon, for as long as a round lasts
                _log.exception("asking %s about round %d failed", ask.peer, question.round)
            self._broken.add(ask.peer)
            return Said(ev.QuestionFailed(ask.number))

    async def read_untrusted(self, ask: ev.AskRoundQuestion, reply: pb.RoundReply) -> Said:
        """Check the signatures of a peer's reply and return its contents. Raises BadBytesError."""
        peer, question, settings = ask.peer, ask.question, self._settings
        last, published, shown = None, None, None
        if reply.HasField("last_roster"):
            last = self._rosters.read_untrusted(reply.last_roster)
        if reply.HasField("publication") and not question.has_publication:
            published = settings.groups.gradient_untrusted(reply.publication, settings.run_sha256)
            check_publication(published, peer, question.round, settings.max_tokens)
        roster = self._rosters.read_untrusted(reply.roster) if reply.HasField("roster") else None
        head = self._last_of(peer) if reply.same_last else None if last is None else last.roster
        ours = self._chains.chain
        if question.wants_chain and reply.HasField("chain") and head is not None and head.digest not in ours:
            # Up to a thousand signatures: off the event loop.
            shown = await asyncio.to_thread(chain_untrusted, reply.chain, ours, settings)
        if last is not None and not reply.same_last:
            self._last_signed[peer] = last.roster, last.name
        advertised = AdvertisedRound(round=reply.current_round, last=head, participating=reply.participating)
        offer = None if published is None else publication_of(published)
        answer = ev.PeerReply(advertised, reply.inner_steps_done, reply.away, last, offer, roster, shown)
        return Said(ev.QuestionAnswered(ask.number, answer), published)

    def last_known(self, peer: str) -> bytes:
        """Return the name of the roster that this peer last said it had applied, or b""."""
        roster, name = self._last_signed.get(peer, (None, ""))
        return bytes.fromhex(name) if roster is not None and self._last_of(peer) == roster else b""

    def forget(self, peer: str) -> None:
        """Forget a peer that has been gone for long."""
        self._last_signed.pop(peer, None)
        self._broken.discard(peer)
