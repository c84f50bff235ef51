"""Live display on a terminal while peers train: fed by events, redrawn in place.

`PeerDisplay` shows one peer, `SwarmDisplay` one row for each peer that `swarmtrain local` started. Both keep plain
numbers and draw from them, so a test can draw without a terminal. A peer's own display also reads its status, twice a
second, so that it agrees with `swarmtrain status`. Names and messages may come from other peers: they are shown as
plain text, escaped, never as markup.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from swarmtrain.cli.facts import contribution_in_words, progress_in_words
from swarmtrain.cli.peers import PeerPhase, View
from swarmtrain.cli.screen import serving_lines
from swarmtrain.cli.terminal import TerminalConsole
from swarmtrain.events import (
    ArrivingEvent,
    AssignedEvent,
    DeviceEvent,
    DoneEvent,
    EvalEvent,
    Event,
    FetchedEvent,
    FinishingEvent,
    InviteEvent,
    JoinedEvent,
    MovedEvent,
    PausedEvent,
    PeerJoinedEvent,
    PeerLeftEvent,
    PeerLostEvent,
    ResumedEvent,
    RoundEvent,
    StageThroughputEvent,
    StartedEvent,
    WarningEvent,
    arrived_in_words,
    times_below_allreduce,
    to_plain_line,
)
from swarmtrain.v1 import control_pb2 as wire
from swarmtrain.words import (
    below_in_words,
    count_in_words,
    counted,
    loss_in_words,
    one_line,
    percent_in_words,
    shares_in_words,
    short_peer,
    size_in_words,
    source_losses_in_words,
    stages_in_words,
    time_in_words,
)

_log = logging.getLogger(__name__)
_ROUNDS_FOR_SPEED = 10
_LINES_KEPT = 5
_DRAWN_PER_S = 2.0


@dataclass
class _Peer:
    """State of one peer, as its events tell."""

    name: str
    state: str = "starting"
    arriving: ArrivingEvent | None = None
    round: RoundEvent | None = None
    held_out_loss: float | None = None
    source_losses: str = ""
    """Held-out loss by source, in words."""
    tokens: int = 0  # its own, in the rounds seen
    tokens_before: int = 0  # the run's, when it joined
    present: set[str] = field(default_factory=set)
    num_parameters: int = 0
    shared_steps: int = 0  # inner steps of the rounds that were merged with others, and what was sent in them
    shared_bytes: int = 0
    stages: tuple[int, ...] = ()
    """Stages of a pipeline that the peer holds."""

    @property
    def does(self) -> str:
        """State of the peer, or the stages of a pipeline that it trains."""
        return stages_in_words(self.stages) if self.stages and self.state == "training" else self.state

    def take(self, event: Event) -> None:
        if isinstance(event, DeviceEvent | InviteEvent | JoinedEvent | ResumedEvent | RoundEvent | DoneEvent):
            self.arriving = None
        match event:
            case ArrivingEvent():
                self.state, self.arriving = "joining", event
            case InviteEvent() if self.state in ("starting", "joining"):
                self.state = "serving"  # a bootstrap; a volunteer has joined before it invites
            case JoinedEvent():
                self.state, self.tokens_before = "joined", event.run_tokens
            case StartedEvent():
                self.state, self.num_parameters = "training", event.num_parameters
            case ResumedEvent():
                self.state = "training"
            case PausedEvent():
                self.state = "paused"
            case FinishingEvent():
                self.state = "finishing"
            case AssignedEvent():
                self.stages = event.stages
            case MovedEvent():
                self.stages = event.after
            case RoundEvent():
                self.state, self.round = "training", event
                self.tokens += event.tokens
                if event.times_below_allreduce is not None:
                    self.shared_steps += event.inner_steps
                    self.shared_bytes += event.bytes_sent
                if event.signer:  # a roster names everyone; partners of a merge without one are only a few
                    self.present = set(event.partners)
            case EvalEvent():
                self.held_out_loss = event.held_out_loss
                self.source_losses = source_losses_in_words(event.sources, event.source_losses)
            case PeerJoinedEvent():
                self.present.add(event.joined)
            case PeerLostEvent():
                self.present.discard(event.lost)
            case PeerLeftEvent():
                self.present.discard(event.left)
            case DoneEvent():
                self.state = "done"
                if event.held_out_loss is not None:
                    self.held_out_loss = event.held_out_loss
                    self.source_losses = source_losses_in_words(event.sources, event.source_losses)

    @property
    def times_below_allreduce(self) -> float | None:
        """Factor by which the peer sent fewer bytes than an all-reduce would have, over all its rounds as in `status`;
        over the last round while the model's size is not known."""
        known = times_below_allreduce(self.num_parameters, self.shared_steps, self.shared_bytes)
        return known or (None if self.round is None else self.round.times_below_allreduce)

    def share(self, run_tokens: int) -> float:
        """Return the peer's share of the tokens trained since it joined, 0 to 1."""
        return min(1.0, self.tokens / max(1, run_tokens - self.tokens_before))


@dataclass
class _Progress:
    """Progress of the run, and its end at the present speed."""

    total_tokens: int = 0  # 0 while unknown
    run_tokens: int = 0
    _seen: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_ROUNDS_FOR_SPEED))

    def take(self, event: Event) -> None:
        match event:
            case StartedEvent() | FetchedEvent():
                self.total_tokens = event.total_tokens or self.total_tokens
            case RoundEvent() | JoinedEvent() | DoneEvent() if event.run_tokens > self.run_tokens or not self._seen:
                self.run_tokens = max(self.run_tokens, event.run_tokens)
                self._seen.append((event.time, event.run_tokens))

    def left_s(self) -> float | None:
        """Return the seconds to the end; None while they cannot be estimated."""
        if not self.total_tokens or len(self._seen) < 2:
            return None
        (first_s, first_tokens), (last_s, last_tokens) = self._seen[0], self._seen[-1]
        if last_s <= first_s or last_tokens <= first_tokens:
            return None
        return max(0, self.total_tokens - last_tokens) * (last_s - first_s) / (last_tokens - first_tokens)

    def draw(self) -> RenderableType:
        words = f"{count_in_words(self.run_tokens)} tokens"
        if self.total_tokens:
            part = percent_in_words(self.run_tokens, self.total_tokens)
            words = f"{part} of {count_in_words(self.total_tokens)} tokens"
        if (left_s := self.left_s()) is not None:
            words += f", about {time_in_words(left_s)} left" if left_s else ", finishing"
        return _bar(self.run_tokens, self.total_tokens, words)


def _bar(run_tokens: int, total_tokens: int, words: str) -> RenderableType:
    row = Table.grid(padding=(0, 1), expand=True)
    row.add_column(ratio=1, min_width=10)
    row.add_column(no_wrap=True, justify="right")
    total = total_tokens or None
    row.add_row(ProgressBar(total=total, completed=run_tokens, pulse=total is None), Text(words))
    return row


class _Display:
    """Drawing in place: shared base of both displays."""

    _redraws: ClassVar[bool] = False
    """True if the display is redrawn between events too."""

    def __init__(self, title: str, total_tokens: int, console: Console | None) -> None:
        self._title = title
        self._progress = _Progress(total_tokens)
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._taking = (
            threading.Lock()
        )  # never held while calling rich, which draws under its own lock and then takes this one
        self._live = Live(
            get_renderable=self.draw,
            console=console or TerminalConsole(),
            auto_refresh=self._redraws,
            refresh_per_second=_DRAWN_PER_S,
            transient=False,
        )

    def start(self) -> None:
        """Begin to draw."""
        self._live.start(refresh=True)

    def stop(self) -> None:
        """Draw a last time and leave the picture on the screen."""
        self._live.stop()

    def show(self, event: Event) -> None:
        """Take an event and redraw."""
        with self._taking:
            self._progress.take(event)
            self._take(event)
            if not isinstance(event, InviteEvent | RoundEvent | ArrivingEvent | StageThroughputEvent):
                self._lines.append(to_plain_line(event))
        if isinstance(event, InviteEvent):
            # Above the picture, and wrapped only by the terminal, so that it can be copied as one word.
            self._live.console.print(Text(one_line(event.line)), soft_wrap=True)
        self._live.refresh()

    def look_at(self, status: Callable[[], Any]) -> None:
        """Ignore a peer's status: a display of many peers shows their events only."""

    def draw(self) -> RenderableType:
        """Draw the whole picture from what is known now."""
        self._look()
        with self._taking:
            lines = [Text(line, style="dim", overflow="fold") for line in self._lines]
            return Group(Text(self._title, style="bold"), self._progress_bar(), *self._body(), *lines)

    def _look(self) -> None:
        """Read, before drawing, what no event says."""

    def _progress_bar(self) -> RenderableType:
        return self._progress.draw()

    def _take(self, event: Event) -> None:
        raise NotImplementedError

    def _body(self) -> Iterable[RenderableType]:
        raise NotImplementedError


class PeerDisplay(_Display):
    """Display of one peer: activity, progress and time left, loss, peers present, its share of the work, traffic."""

    _redraws = True

    def __init__(self, title: str = "swarmtrain", total_tokens: int = 0, console: Console | None = None) -> None:
        self._peer = _Peer(name="")
        self._status: Callable[[], Any] | None = None
        self._view: View | None = None
        super().__init__(title, total_tokens, console)

    def look_at(self, status: Callable[[], Any]) -> None:
        """Show the peer's status from now on."""
        self._status = status

    def _look(self) -> None:
        if self._status is None:
            return
        try:
            self._view = View(status=self._status(), phase=PeerPhase.RUNNING, now=time.time())
        except Exception:  # a task boundary: whatever a look at the peer meets, the picture before it stays
            _log.exception("the screen's look at the peer failed")

    def _progress_bar(self) -> RenderableType:
        view = self._view
        if view is None or not view.status.total_tokens:
            return super()._progress_bar()
        return _bar(view.status.run_tokens, view.status.total_tokens, progress_in_words(view))

    def _take(self, event: Event) -> None:
        if isinstance(event, FetchedEvent):
            self._title = f"run {one_line(event.run_name)} ({event.run_sha256[:12]})"
        self._peer.take(event)

    def _body(self) -> Iterable[RenderableType]:
        peer, merged = self._peer, self._peer.round
        if peer.arriving is not None:
            yield _arriving(peer.arriving)
            return
        if self._view is not None or merged is None:
            yield Text(one_line(self._view.status.doing if self._view is not None else "") or peer.state)
        if self._view is not None and self._view.status.role == "bootstrap":
            yield from serving_lines(self._view, self._live.console.width)
            return
        if merged is None:
            return
        held_out = "" if peer.held_out_loss is None else f"   held-out {peer.held_out_loss:.3f} nats/byte"
        if peer.stages:
            yield Text(f"{stages_in_words(peer.stages)} of the model")
        yield Text(f"round {merged.round}   loss {merged.loss:.3f}{held_out}   {self._here(merged)}")
        if peer.source_losses:
            yield Text(f"held-out by source: {one_line(peer.source_losses)}")
        still = f", stalled for {time_in_words(merged.stall_s)}" if merged.stall_s >= 0.1 else ""
        steps = counted(merged.inner_steps, "inner step")
        yield Text(f"{steps} in {time_in_words(merged.seconds)}, merged in {time_in_words(merged.merge_s)}{still}")
        if (times := peer.times_below_allreduce) is not None:
            per_step = size_in_words(peer.shared_bytes / max(1, peer.shared_steps))
            yield Text(f"sent {per_step} per inner step, {below_in_words(times)} at every step")

    def _here(self, merged: RoundEvent) -> str:
        """Say how many peers are present, and this peer's share."""
        peer = self._peer
        if self._view is not None:
            status = self._view.status
            here = sum(other.present and not other.bootstrap for other in status.peers)
            share = f"own {contribution_in_words(status)}"
            if status.state in (wire.PEER_STATE_DONE, wire.PEER_STATE_FAILED):
                return share
        else:
            here = len(peer.present | {peer_id for peer_id in (merged.peer,) if peer_id})
            since = " since it joined" if peer.tokens_before else ""
            share = f"own share {peer.share(self._progress.run_tokens):.0%}{since}"
        return f"{counted(here, 'peer')} here   {share}"


def _arriving(event: ArrivingEvent) -> RenderableType:
    row = Table.grid(padding=(0, 1), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1, min_width=10)
    row.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(total=event.total_bytes, completed=event.share * event.total_bytes)
    row.add_row(Text(one_line(event.doing)), bar, Text(arrived_in_words(event)))
    return row


class SwarmDisplay(_Display):
    """Display of several peers of one machine: one row each, keyed by name."""

    def __init__(self, title: str = "swarmtrain", total_tokens: int = 0, console: Console | None = None) -> None:
        self._peers: dict[str, _Peer] = {}
        super().__init__(title, total_tokens, console)

    def _take(self, event: Event) -> None:
        if isinstance(event, WarningEvent) and not event.name and not event.peer:
            return  # about the swarm as a whole
        key = event.name or short_peer(event.peer)
        self._peers.setdefault(key, _Peer(name=key)).take(event)

    def _body(self) -> Iterable[RenderableType]:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("peer", overflow="ellipsis", max_width=16, no_wrap=True)
        table.add_column("state", no_wrap=True)
        for heading in ("round", "loss", "share", "s/round", "sent", "below"):
            table.add_column(heading, justify="right", no_wrap=True)
        peers = list(self._peers.values())
        for peer, share in zip(peers, shares_in_words([peer.tokens for peer in peers]), strict=True):
            table.add_row(Text(one_line(peer.name)), peer.does, *self._cells(peer, share))
        yield table
        measured = [peer for peer in self._peers.values() if peer.held_out_loss is not None]
        if measured and measured[-1].held_out_loss is not None:
            by_source = f": {measured[-1].source_losses}" if measured[-1].source_losses else ""
            yield Text(f"held-out loss {loss_in_words(measured[-1].held_out_loss)}{by_source}")

    def _cells(self, peer: _Peer, share: str) -> list[str]:
        merged, times = peer.round, peer.times_below_allreduce
        if merged is None:
            return [""] * 6
        below = "" if times is None else f"{count_in_words(times)}x"
        sent = size_in_words(merged.bytes_sent)
        return [str(merged.round), f"{merged.loss:.3f}", share, f"{merged.seconds:.1f}", sent, below]
