"""Peers of the world "lives" in which the bootstrap is the server and merges what its workers upload."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from fault_search.lives_peers import (
    RUN,
    Behind,
    Bootstrap,
    DiskCheckpoint,
    Folder,
    LivesWorld,
    Round,
    SearchedVolunteer,
    identity_of,
)
from swarmtrain.network.asynchronous.server_link import describe_weights
from swarmtrain.peer.lifecycle.bootstrap_peer import LOOK_EVERY_S
from swarmtrain.peer.merging.server_exchange import ServerExchange
from swarmtrain.protocol.server import GradientUpload, GradientUploads, UploadVersions, too_old
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import PublishedSection

_NOTHING = "00" * 32
SERVED_RUN = RUN.model_copy(
    update={
        "merge": RUN.merge.model_copy(update={"method": "server"}),
        "published": PublishedSection(
            created="1970-01-01T00:00:00Z",
            swarmtrain="0",
            held_out_sha256=_NOTHING,
            held_out_bytes=1,
            server=identity_of("b").peer_id,
        ),
    }
)


class _Exchange(ServerExchange):
    """The product's exchange, of which only the decisions are used."""

    def __init__(self, worker: Worker) -> None:
        world: Any = worker.world
        server = identity_of("b").peer_id
        publisher: Any = SimpleNamespace(server=server, lock=threading.Lock(), uploads=GradientUploads())
        link: Any = SimpleNamespace(take=lambda: None, heard_s=0.0)
        stop: Any = SimpleNamespace(sleep=worker.sleep, check=lambda: None)
        self.swarm, self.run, self.network = worker.swarm, world.run_file, world
        self.publisher, self.link, self.stop = publisher, link, stop
        self._fresh = True

    def offer(self, state: Any, progress: Progress) -> None:
        """Do nothing: the worker offers its state."""


class Worker(SearchedVolunteer):
    """Volunteer that uploads each of its rounds, and continues from the server's weights and those of its own rounds
    that are not in them."""

    def __init__(
        self, world: LivesWorld, folder: Folder, address: int, invite: Mapping[str, int], speed: float
    ) -> None:
        super().__init__(world, folder, address, invite, speed)
        self.exchange = _Exchange(self)
        self.rounds: dict[int, Round] = {}
        """Entry in `Behind.rounds` for each of the worker's rounds, by its number."""

    @property
    def uploads(self) -> GradientUploads[Any]:
        """Uploads that the server does not have yet."""
        found: GradientUploads[Any] = self.exchange.publisher.uploads
        return found

    def _merge(self, mine: Round) -> bool:
        number = self.progress.round
        self.rounds[number] = mine
        piece = GradientUpload(
            round=number,
            tokens=RUN.round_tokens,
            inner_steps=RUN.merge.inner_steps,
            arrivals=self.exchange._base_arrivals,
            own_tokens=self.own_tokens,
            gradient=torch.zeros(1),
        )
        self.uploads.add(piece)
        self.behind = dataclasses.replace(self.behind, rounds=self.behind.rounds | {mine})
        server = self.world.processes.get("b")
        if isinstance(server, Server) and server in self.neighbours() and server.arrivals:
            entered = server.versions.round(self.me)
            self.exchange._go_on_from(torch.ones(1), server.arrivals, entered)
            for peer, tokens in server.progress_now().peer_tokens.items():
                if server.versions.round(peer) is not None:
                    self.accounting.receive(peer, tokens)
            own = frozenset(one for at, one in self.rounds.items() if entered is None or at > entered)
            behind = server.state_behind
            self.behind = dataclasses.replace(behind, rounds=behind.rounds | own)
        return False


class Server(Bootstrap):
    """Bootstrap that is the server: its weights are the run's."""

    def __init__(self, world: LivesWorld, folder: Folder, address: int, invite: Mapping[str, int]) -> None:
        super().__init__(world, folder, address, invite)
        self.versions, self.arrivals, self.refreshes, self.in_buffer = UploadVersions(), 0, 0, 0
        self.state_behind, self.leavers, self._archived_arrivals = Behind(), None, 0

    def restore(self, kept: DiskCheckpoint) -> None:
        """Continue from a checkpoint, with its record of the workers' rounds."""
        super().restore(kept)
        arrivals, self.refreshes, self.in_buffer, rows = kept.of_server
        self.arrivals, self.state_behind = arrivals, kept.behind
        self.versions.load(rows)
        self._archived_arrivals = arrivals
        self._serve()

    def _serve_counts(self) -> None:
        """Do nothing, because the server's own state has the counts."""

    def progress_now(self) -> Progress:
        """Return the progress, in rounds of which each refreshes the momentum. One that has begun counts."""
        counts = self.accounting.contributions()
        return Progress(
            round=self.refreshes + (self.in_buffer > 0), run_tokens=sum(counts.values()), peer_tokens=counts
        )

    def _serve(self) -> None:
        if not self.arrivals:
            return
        arrivals, entered = self.arrivals, self.versions.newest(4096)
        archive, behind, self.progress, self.behind = self.progress, self.behind, self.progress_now(), self.state_behind
        self.set_state()
        self.fill = lambda manifest: describe_weights(manifest, arrivals, entered)
        self.progress, self.behind = archive, behind

    def _look(self) -> None:
        """Take in the uploads of the workers, and archive the server's weights from time to time."""
        self._ask_how_far()
        now = self.world.clock.now
        for info in self.membership.volunteers():
            worker = self.world.by_id(info.peer)
            while isinstance(worker, Worker) and worker in self.neighbours() and self._take_next(worker):
                pass
        if self.arrivals != self._archived_arrivals and now >= self._next_s:
            self._keep()
            self._next_s = now + RUN.network.archive_every_s
        self.later(LOOK_EVERY_S, self._look)

    def _take_next(self, worker: Worker) -> bool:
        piece = worker.uploads.after(has := self.versions.round(worker.me))
        if piece is None or not self.versions.is_new(worker.me, piece.round):
            return False
        size = max(1, len(self.membership.volunteers()))
        self.versions.enter(worker.me, piece.round)
        if too_old(piece.arrivals, self.arrivals, size, RUN.merge.max_staleness_rounds):
            return True
        new = frozenset(one for at, one in worker.rounds.items() if (has is None or at > has) and at <= piece.round)
        before = self.state_behind
        self.state_behind = Behind(before.rounds | new, max(before.at_tokens, worker.behind.at_tokens))
        self.arrivals += 1
        self.in_buffer += 1
        self.accounting.receive(worker.me, piece.own_tokens)
        if self.in_buffer >= size:
            self.in_buffer, self.refreshes = 0, self.refreshes + 1
        self._serve()
        if not self.in_buffer:
            self._keep()
        return True

    def _keep(self) -> None:
        self.progress, self.behind = self.progress_now(), self.state_behind
        of_server = self.arrivals, self.refreshes, self.in_buffer, self.versions.rows()
        self._archived_arrivals = self.arrivals
        now, extra = self.world.clock.now, self.manager.extra()
        self.folder.write(
            DiskCheckpoint(
                self.progress, self.behind, self.accounting.kept(), at_s=now, extra=extra, of_server=of_server
            )
        )
        self.world.archived(self)

    def leave(self) -> None:
        """Leave, and write the weights to disk."""
        self.count_once_more()
        if self.arrivals:
            self._keep()
        self.end()
