"""The bootstrap: publishes a run, is there for the first who join, and archives the run's state.

It does not train, sign rosters or count as a peer; the swarm goes on without it.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from swarmtrain import __version__
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.data.prepare import publishable_data
from swarmtrain.data.tokens import tokenizer_from_bytes_untrusted
from swarmtrain.errors import PeerError, UserError
from swarmtrain.events import ArchivedEvent, DoneEvent, EvalEvent, WarningEvent, short_peer
from swarmtrain.membership.lifecycle import PeerInfo
from swarmtrain.membership.progress import Progress
from swarmtrain.model.gpt import build_model
from swarmtrain.network.codec import average_bytes_untrusted, body_of, tensor_specs
from swarmtrain.network.node import NetworkThread, Node
from swarmtrain.network.swarm import PublishedRun, Swarm
from swarmtrain.peer.common import (
    Emit,
    Interrupted,
    PeerSettings,
    StopFlag,
    as_peer,
    held_out_loss,
    invite_event,
    leave_swarm,
    process_age_s,
    save_model,
    start_node,
    state_from_untrusted,
    use_threads,
    wait_for,
)
from swarmtrain.peer.folder import PeerFolder, peer_folder
from swarmtrain.run import PublishedSection, RunFile, published_bytes, run_sha256

__all__ = ["publish_run", "run_bootstrap"]

_LOOK_EVERY_S = 1.0
_LINGER_S = 60.0
_SAMPLE = 16


def publish_run(run: RunFile, base: Path, created: datetime.datetime) -> PublishedRun:
    """Cut the held-out text, learn the tokenizer, and write every default out. Raises RunFileError."""
    files = publishable_data(run, base)
    tokenizer = files.tokenizer_bytes
    section = PublishedSection(
        created=created.isoformat(timespec="microseconds"),
        swarmtrain=__version__,
        held_out_sha256=hashlib.sha256(files.held_out.text).hexdigest(),
        held_out_bytes=len(files.held_out.text),
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest() if tokenizer else None,
        tokenizer_bytes=len(tokenizer),
    )
    complete = run.model_copy(update={"published": section})
    data = published_bytes(complete)
    return PublishedRun(data, run_sha256(data), complete, files.held_out.text, tokenizer)


def run_bootstrap(run: RunFile, base: Path, settings: PeerSettings, emit: Emit, stop: StopFlag) -> DoneEvent:
    """Publish `run` and serve it until it ends or `stop` is set. `base` is what the run's data paths are relative to.

    With a folder that holds a run already, that run goes on: same identity, same invite.
    """
    use_threads(1)  # it measures, at the end; the cores are for those who train
    with peer_folder(settings.directory) as folder:
        published = _published(run, base, folder)
        network = NetworkThread()
        bootstrap = _Bootstrap(published, settings, folder, network, emit, stop)
        try:
            return bootstrap.run()
        except Interrupted:
            return bootstrap.done("interrupted")
        finally:
            leave_swarm(network, bootstrap.swarm, bootstrap.node)


def _published(run: RunFile, base: Path, folder: PeerFolder) -> PublishedRun:
    """The run in the folder, if it is this one; else a new one."""
    kept = folder.kept_run()
    if kept is None:
        published = publish_run(run, base, datetime.datetime.now(datetime.UTC))
        folder.keep_run(published)
        return published
    if kept.run.model_copy(update={"published": None}) != run:
        raise UserError(f"{folder.path} holds another run ({kept.run.run.name}); give another folder with --dir")
    return kept


@dataclass
class _Bootstrap:
    published: PublishedRun
    settings: PeerSettings
    folder: PeerFolder
    network: NetworkThread
    emit: Emit
    stop: StopFlag
    node: Node | None = None
    swarm: Swarm | None = None
    name: str = ""
    progress: Progress = field(default_factory=Progress)
    state: OuterState | None = None
    loss: float | None = None

    def run(self) -> DoneEvent:
        node = self.node = start_node(self.network, self.settings, self.folder, self.stop)
        self.name = self.settings.name or short_peer(node.identity.peer_id)
        self.emit = as_peer(self.emit, node.identity.peer_id, self.name)
        model = build_model(self.published.run.model, self.published.run.run.seed)
        me = PeerInfo(peer=node.identity.peer_id, name=self.name, is_bootstrap=True)
        specs = tensor_specs(model.named_parameters())
        swarm = self.swarm = Swarm(node, self.published, specs, average_bytes_untrusted, self.emit, me)
        wait_for(self.network.submit(swarm.start([])), self.stop)
        wait_for(self.network.submit(swarm.watch_daemon(self.stop.fail)), self.stop)
        wait_for(self.network.submit(swarm.announce()), self.stop)
        event = invite_event(swarm.invite())
        self.folder.write_invite(event.line)
        self.emit(event)
        self._archive_until_the_end(swarm)
        self._measure_and_save()
        self._wait_for_goodbyes(swarm)
        return self.done("total_tokens")

    def done(self, reason: str) -> DoneEvent:
        """How it ended."""
        return DoneEvent(
            held_out_loss=self.loss,
            tokens=0,
            run_tokens=self.progress.run_tokens,
            wall_s=process_age_s(),
            reason=reason,
        )

    def _archive_until_the_end(self, swarm: Swarm) -> None:
        """Take the state of some volunteer every `archive_every_s`, and at the end."""
        total = self.published.run.run.total_tokens
        next_s = time.monotonic() + self.published.run.network.archive_every_s
        while self.progress.run_tokens < total:
            self.stop.sleep(_LOOK_EVERY_S)
            self._ask_how_far(swarm)
            newest = max((info.run_tokens for info in swarm.membership.volunteers()), default=0)
            due = time.monotonic() >= next_s and newest > self.progress.run_tokens
            if (due or newest >= total) and self._archive(swarm):
                next_s = time.monotonic() + self.published.run.network.archive_every_s

    def _ask_how_far(self, swarm: Swarm) -> None:
        wait_for(self.network.submit(swarm.greet_some()), self.stop)

    def _archive(self, swarm: Swarm) -> bool:
        """Pull the newest state, offer it to joiners, and write it down; False if nobody delivered."""
        volunteers = [info.peer for info in swarm.membership.volunteers()]
        sample = random.sample(volunteers, min(_SAMPLE, len(volunteers)))
        new = wait_for(self.network.submit(swarm.rounds.fetch_newest_state(sample, "archive")), self.stop)
        if new is None or new.roster.total_tokens <= self.progress.run_tokens:
            return False
        try:
            state, progress = state_from_untrusted(new)
        except PeerError as error:
            self.emit(WarningEvent(message=f"the archive refused a state from {new.from_peer}: {error}"))
            return False
        self.state, self.progress = state, progress
        body = body_of(state.theta, state.momentum)

        async def offer() -> None:
            swarm.rounds.know_roster(new.roster, new.signed_roster)
            swarm.set_state(progress, body)
            swarm.me = dataclasses.replace(swarm.me, round=progress.round, run_tokens=progress.run_tokens)

        wait_for(self.network.submit(offer()), self.stop)
        model = build_model(self.published.run.model, self.published.run.run.seed)
        save_model(self.folder.archive_path, model, state.theta, self.published, progress)
        self.emit(
            ArchivedEvent(round=progress.round, run_tokens=progress.run_tokens, path=str(self.folder.archive_path))
        )
        return True

    def _measure_and_save(self) -> None:
        run = self.published.run
        model = build_model(run.model, run.run.seed)
        tokenizer = tokenizer_from_bytes_untrusted(self.published.tokenizer, run.model.vocabulary_size)
        assert self.state is not None
        self.loss = held_out_loss(model, self.state.theta, self.published, tokenizer)
        self.emit(EvalEvent(round=self.progress.round - 1, held_out_loss=self.loss))
        save_model(self.folder.model_path, model, self.state.theta, self.published, self.progress)

    def _wait_for_goodbyes(self, swarm: Swarm) -> None:
        """Serve on until the volunteers have left; a minute at most."""
        give_up_s = time.monotonic() + _LINGER_S
        while swarm.membership.volunteers() and time.monotonic() < give_up_s:
            self.stop.sleep(0.1)
