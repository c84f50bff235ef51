"""One merge in shares, in a simulated swarm whose transfers share the links of their ends.

Does what `network/rounds/merger.py` does: one stream from each author, of piece after piece of this peer's own share;
from each other owner one piece of its share after the other, as they are ready. A share whose owner is gone or too
late is averaged here. Averaging itself takes no time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from swarmtrain.protocol.membership.membership import PeerState
from swarmtrain.protocol.rounds import messages as ev
from swarmtrain.protocol.rounds.roles import PIECES_AT_ONCE, share_pieces
from swarmtrain.protocol.rounds.rosters import Roster, RoundPublication, share_ranges, sources_of
from swarmtrain.protocol.rounds.share_waits import ShareWaits
from swarmtrain.run import CHUNK_BYTES

if TYPE_CHECKING:
    from swarmtrain.simulate.systems.transfers import Carrier, Owner, Transfers


class ShareMerge:
    """Merge of a roster whose peers each average a share; `done` is called once, with the peers whose publications
    nobody delivers."""

    def __init__(
        self, transfers: Transfers, owner: Owner, world: Carrier, roster: Roster, done: Callable[[frozenset[str]], None]
    ) -> None:
        self._transfers, self._owner, self._world, self._roster, self._done = transfers, owner, world, roster, done
        self._settings = owner.settings
        ranges = share_ranges(self._settings.num_chunks, len(roster.entries), roster.shares)
        self._shares = [share_pieces(chunks) if roster.shares else [chunks] for chunks in ranges]
        me = owner.name
        self._own = roster.peers.index(me) if me in roster.peers else None
        self._lacking = {(i, piece) for i, share in enumerate(self._shares) for piece in share if piece}
        self._queues: dict[str, deque[tuple[range, Callable[[bool], None]]]] = {}
        """Pulls that wait for each publication's present one, which is the first of them."""
        self._averaged_here: set[int] = set()
        self._begun: set[int] = set()
        times, sizes = owner.engine.averaging_times(roster), [len(chunks) for chunks in ranges]
        limit_s = owner.engine.merge_limit_s(roster.peers, roster.shares)
        self._waits = ShareWaits(world.clock.now, sizes, self._own, times, owner.settings.silence_s, limit_s)
        self._is_over = False

    def begin(self) -> None:
        """Pull everything."""
        for index in range(len(self._shares)):
            if index == self._own:
                self._average(index, self._left(index))
            else:
                for _ in range(PIECES_AT_ONCE):
                    self._next_piece(index)
        self._look_whether_done()

    def stop(self) -> None:
        """Give up."""
        self._is_over = True

    def _left(self, index: int) -> list[range]:
        return [piece for piece in self._shares[index] if (index, piece) in self._lacking]

    def _name(self, piece: range) -> str:
        return f"share-of-{self._roster.digest} {piece.start}:{piece.stop}"

    def _bytes(self, piece: range) -> float:
        return min(piece.stop * CHUNK_BYTES, self._settings.publication_bytes) - piece.start * CHUNK_BYTES

    def _look_whether_done(self, lacking: frozenset[str] = frozenset()) -> None:
        if not self._is_over and (lacking or not self._lacking):
            self._is_over = True
            self._done(lacking)

    # ------------------------------------------------------------------ shares of others

    def _next_piece(self, index: int, piece: range | None = None) -> None:
        """Pull a piece of an owner's share, or wait until the owner has it. Without `piece`, the next one."""
        left = self._left(index)
        piece = piece or next((each for each in left if each.start not in self._begun), None)
        if self._is_over or piece is None or index in self._averaged_here:
            return
        self._begun.add(piece.start)
        owner, now = self._world.peers[self._roster.peers[index]], self._world.clock.now
        is_here = owner.alive and self._owner.membership.state(owner.name) is PeerState.LIVE
        if not is_here or now >= self._waits.due_s(index):
            if is_here:
                self._owner.tell(ev.ShareJudged(owner.name, in_time=False))
            self._averaged_here.add(index)
            self._average(index, left)
            return
        is_reached = owner.running and self._world.connected(self._owner, owner)
        if not is_reached or owner.transfers.provide(self._name(piece)) is None:
            self._wait(index, piece)
            return

        def came(payload: object) -> None:
            if self._is_over:
                return
            if payload is None:
                self._next_piece(index, piece)
                return
            self._lacking.discard((index, piece))
            self._waits.came(index, len(piece), self._world.clock.now)
            if not self._left(index):
                self._owner.tell(ev.ShareJudged(owner.name, in_time=True))
            self._look_whether_done()
            self._next_piece(index)

        self._world.pull(self._owner, owner.name, self._name(piece), self._bytes(piece), came)

    def _wait(self, index: int, piece: range) -> None:
        """Wait until the owner says that it has this piece, for a while."""
        owner, waits = self._world.peers[self._roster.peers[index]], True

        def look() -> None:
            nonlocal waits
            if waits:
                waits = False
                self._next_piece(index, piece)

        def told() -> None:
            self._owner.later(self._world.latency_s(owner, self._owner), look)

        owner.transfers.tell_when_kept(self._name(piece), told)
        self._owner.later(self._settings.share_again_s, look)

    # ------------------------------------------------------------------ averaging

    def _average(self, index: int, pieces: list[range]) -> None:
        """Get these pieces of every entry, and average them."""
        for piece in pieces:
            waiting = {offer.peer for offer in self._roster.entries}

            def got(peer: str, came: bool, piece: range = piece, waiting: set[str] = waiting) -> None:
                if self._is_over:
                    return
                waiting.discard(peer)
                if not came:
                    self._look_whether_done(frozenset([peer]))
                elif not waiting:
                    self._averaged(index, piece)

            for offer in self._roster.entries:
                self._get(offer, index, piece, partial(got, offer.peer))

    def _averaged(self, index: int, piece: range) -> None:
        self._lacking.discard((index, piece))
        if index == self._own:
            self._transfers.keep(self._name(piece))
            if not (left := self._left(index)):
                self._waits.own_is_ready(self._world.clock.now)
            self._owner.tell(ev.ShareAveraged(self._roster.digest, len(self._shares[index]) - len(left)))
        self._look_whether_done()

    def _get(self, offer: RoundPublication, index: int, piece: range, done: Callable[[bool], None]) -> None:
        """Get a piece of a publication, behind those of it that were asked for before."""
        what = f"{offer.snapshot} {piece.start}:{piece.stop}"
        if self._transfers.provide(what) is not None:
            self._owner.later(0.0, done, True)
            return
        queue = self._queues.setdefault(offer.snapshot, deque())
        queue.append((piece, done))
        if len(queue) == 1:
            self._pull_first(offer, index)

    def _pull_first(self, offer: RoundPublication, index: int, *, goes_on: bool = False) -> None:
        queue = self._queues[offer.snapshot]
        piece, done = queue[0]
        what = f"{offer.snapshot} {piece.start}:{piece.stop}"

        def came(payload: object) -> None:
            if self._is_over:
                return
            queue.popleft()
            if payload is not None:
                self._transfers.keep(what)
            done(payload is not None)
            if queue and not self._is_over:
                self._pull_first(offer, index, goes_on=payload is not None)

        sources = [offer.peer, self._roster.peers[index], *sources_of(self._roster, offer.peer)]
        self._transfers.pull_from(sources, what, self._bytes(piece), came, goes_on=goes_on)
