"""Answer other peers' questions about rounds, as messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from swarmtrain.network.rounds.chains import ChainStore
from swarmtrain.network.snapshots.store import HeldSnapshot
from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.protocol.rounds.roles import MAX_PIECES
from swarmtrain.v1 import snapshot_pb2 as pb


def question_of(request: pb.RoundRequest) -> ev.RoundQuestion:
    """Return the question that a request asks."""
    return ev.RoundQuestion(
        round=request.round,
        hold_s=request.wait_s if request.wait_s > 0 else 0.0,
        has_publication=request.has_publication,
        has_roster=request.has_roster_sha256.hex(),
        has_share=request.has_share,
        share_piece=request.share_piece,
        wants_chain=request.wants_chain,
    )


class RoundAnswers:
    """Converts the engine's answers to messages, and keeps the snapshots that they refer to: this peer's publications
    of the last rounds, and the shares that it averaged."""

    def __init__(self, chains: ChainStore) -> None:
        self._chains = chains
        self._publications: dict[int, HeldSnapshot] = {}
        self._shares: dict[int, list[HeldSnapshot]] = {}
        """Pieces of the share of each round, in order."""

    def published(self, round: int, publication: HeldSnapshot) -> None:
        """Let other peers ask for this peer's publication of `round`."""
        self._publications[round] = publication

    def shared(self, round: int, pieces: Sequence[HeldSnapshot]) -> None:
        """Let other peers ask for the pieces of its share that this peer has averaged in `round`."""
        self._shares[round] = list(pieces)

    def forget(self, knows: Callable[[int], bool]) -> None:
        """Forget the snapshots of rounds for which `knows` returns False: the engine no longer knows them."""
        self._publications = {round: held for round, held in self._publications.items() if knows(round)}
        self._shares = {round: held for round, held in self._shares.items() if knows(round)}

    def reply(
        self, answer: ev.AnswerRoundQuestion[pb.Signed], request: pb.RoundRequest, inner_steps_done: int
    ) -> pb.RoundReply:
        """Return the engine's answer to `request` as a message."""
        reply = pb.RoundReply(
            current_round=answer.round,
            inner_steps_done=inner_steps_done,
            participating=answer.participating,
            away=answer.away,
        )
        # The caller knows this roster already; of 1,000 peers it would be 82 kB in every reply (decision 3).
        if answer.last is not None and answer.last.name == request.has_last_sha256.hex():
            reply.same_last = True
        elif answer.last is not None:
            reply.last_roster.CopyFrom(answer.last.signed)
        if request.wants_chain:
            reply.chain.CopyFrom(self._chains.shows(request.chain_known))
        if answer.publication is not None:
            reply.publication.CopyFrom(self._publications[request.round].snapshot.signed)
        if answer.roster is not None:
            reply.roster.CopyFrom(answer.roster.signed)
        pieces = self._shares.get(request.round, [])
        if answer.share and request.share_piece < len(pieces):
            reply.share.CopyFrom(pieces[request.share_piece].snapshot.signed)
            more = pieces[request.share_piece + 1 :][:MAX_PIECES]
            reply.more_shares.extend(piece.snapshot.signed for piece in more)
        return reply
