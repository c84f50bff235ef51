"""What a peer asks others about rounds, and what their answers say, once their bytes are checked."""

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
from swarmtrain.network.snapshots.store import Snapshot, manifest_untrusted
from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.protocol.rounds.rosters import AdvertisedRound, Roster
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["RoundQuestions", "Said"]

_log = logging.getLogger("swarmtrain.network.rounds.runner")


@dataclass(frozen=True, slots=True)
class Said:
    """What comes of a question, and the publication that it told of."""

    event: ev.QuestionAnswered[pb.Signed, pb.ChainLink] | ev.ReplyRefused | ev.QuestionFailed
    publication: Snapshot | None = None


class RoundQuestions:
    """Asks. That a peer applied the same roster as before need not be said whole each time: so it is remembered what
    each said last."""

    def __init__(
        self,
        downloads: Downloads,
        settings: RoundSettings,
        chains: ChainStore,
        rosters: CheckedRosters,
        last_of: Callable[[str], Roster | None],
    ) -> None:
        """`last_of(peer)` is the roster that the engine knows a peer to have applied last."""
        self._downloads, self._settings, self._chains, self._rosters = downloads, settings, chains, rosters
        self._last_of = last_of
        self._last_signed: dict[str, tuple[Roster, str]] = {}
        """What each peer said last that it had applied, and the name of that."""
        self._broken: set[str] = set()
        """Whose answer led to an error of ours, the last time."""

    async def ask(self, ask: ev.AskRoundQuestion) -> Said:
        """Ask one question."""
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
        except Exception:  # of ours: it costs this question, and not the round
            if ask.peer not in self._broken:  # it is asked again soon, and may be for as long as a round lasts
                _log.exception("asking %s about round %d failed", ask.peer, question.round)
            self._broken.add(ask.peer)
            return Said(ev.QuestionFailed(ask.number))

    async def read_untrusted(self, ask: ev.AskRoundQuestion, reply: pb.RoundReply) -> Said:
        """What a peer says of itself and of a round, its signatures checked."""
        peer, question, settings = ask.peer, ask.question, self._settings
        last, published, shown = None, None, None
        if reply.HasField("last_roster"):
            last = self._rosters.read_untrusted(reply.last_roster)
        if reply.HasField("publication") and not question.has_publication:
            kind = pb.SNAPSHOT_KIND_PSEUDO_GRADIENT
            published = manifest_untrusted(reply.publication, settings.run_sha256, kind, settings.specs)
            check_publication(published, peer, question.round, settings.max_tokens)
        roster = self._rosters.read_untrusted(reply.roster) if reply.HasField("roster") else None
        head = self._last_of(peer) if reply.same_last else None if last is None else last.roster
        ours = self._chains.chain
        if question.wants_chain and reply.HasField("chain") and head is not None and head.digest not in ours:
            shown = await asyncio.to_thread(chain_untrusted, reply.chain, ours, settings)
        if last is not None and not reply.same_last:
            self._last_signed[peer] = last.roster, last.name
        told = AdvertisedRound(round=reply.current_round, last=head, participating=reply.participating)
        offer = None if published is None else publication_of(published)
        answer = ev.PeerReply(told, reply.inner_steps_done, reply.away, last, offer, roster, shown)
        return Said(ev.QuestionAnswered(ask.number, answer), published)

    def last_known(self, peer: str) -> bytes:
        """The name of what this peer said last that it had applied."""
        roster, name = self._last_signed.get(peer, (None, ""))
        return bytes.fromhex(name) if roster is not None and self._last_of(peer) == roster else b""

    def forget(self, peer: str) -> None:
        """A peer that has long been gone."""
        self._last_signed.pop(peer, None)
        self._broken.discard(peer)
