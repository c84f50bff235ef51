"""Run a whole swarm on one machine: a bootstrap and volunteers as real processes, observed through their events.

Each child writes its events as JSON lines; a thread per child reads them. Children die with this process, however it
ends (see `network.daemon.owned_process_args`). Ctrl-C in a terminal does not reach them: this process ends the
volunteers first and then the bootstrap, so that what they trained last is archived.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from swarmtrain.environment import BY_TRACKER, PEER, minimal_environment
from swarmtrain.errors import Problem, RunTimeError, UserError
from swarmtrain.events import DoneEvent, ErrorEvent, Event, FinishingEvent, InviteEvent, WarningEvent, parse_event
from swarmtrain.network.daemon import owned_process_args
from swarmtrain.network.links.impairments import Narrowing, Outage
from swarmtrain.network.links.proxy import LinkShape, PeerLinks
from swarmtrain.network.links.throttle import BYTES_PER_S_OF_MBIT
from swarmtrain.network.node import NetworkThread
from swarmtrain.rehearsal import LinksSection, RehearsalFile

BOOTSTRAP = "bootstrap"
"""Name of the bootstrap among the children."""
_STOP_LIMIT_S = 10.0
"""Seconds for the bootstrap's last archive and the goodbyes on a busy machine; most end within a second."""
_HAND_OVER_LIMIT_S = 40.0
"""Seconds for volunteers that leave together, which wait until the bootstrap has archived their work; usually two."""
_GROUP = -1 if sys.platform.startswith("linux") else 0
"""Process group of a child. On Linux each already has a session of its own."""
_INSIST_S = 3.0
_ALONE_S = 120.0
"""Seconds for which a bootstrap may look for the work of volunteers that have all ended; usually two. By itself it
would wait for others for ever."""
_PIPE_S = 5.0
"""Seconds for which a process that has ended may hold its pipe open, by a process that it had started."""
_POLL_INTERVAL_S = 0.1
_OPEN_LIMIT_S = 10.0


def link_shape(links: LinksSection, volunteer: bool) -> LinkShape:
    """Return the shape of a peer's link, one of two links between two peers. The bootstrap's has only the delay."""
    if not volunteer:
        links = LinksSection(rtt_ms=links.rtt_ms)
    return LinkShape(
        delay_s=links.rtt_ms / 1000 / 4,
        up_bytes_per_s=links.up_mbit * BYTES_PER_S_OF_MBIT,
        down_bytes_per_s=links.down_mbit * BYTES_PER_S_OF_MBIT,
        jitter_s=links.jitter_ms / 1000 / 2,
        loss=1.0 - (1.0 - links.loss_percent / 100) ** 0.5,
    )


class LocalLinks:
    """Links of a swarm on this machine, carried by a thread of this process."""

    def __init__(self, given: RehearsalFile) -> None:
        self._given = given
        self._network = NetworkThread()
        self._links = PeerLinks(given.rehearsal.seed)

    def options(self, name: str, limited: bool) -> list[str]:
        """Open a link for a new peer; return the options that make all its traffic pass through it."""
        shape, hidden = link_shape(self._given.links_of(name), limited), self._given.is_hidden(name)
        link = self._network.run(self._links.open(name, shape, hidden=hidden), _OPEN_LIMIT_S)
        options = ["--listen", link.listen, "--announce", link.announce, "--only-announced"]
        return [*options, "--check-reach"] if hidden else options

    def part(self, sides: list[list[str]]) -> Outage:
        """Cut these peers off from all others."""
        return self._network.run(self._links.part(sides), _OPEN_LIMIT_S)

    def mend(self, outage: Outage) -> None:
        """End an outage."""
        self._network.run(self._links.mend(outage), _OPEN_LIMIT_S)

    def narrow(self, names: Sequence[str], share: float) -> Narrowing:
        """Let the links of these peers carry only this share of their bandwidth."""
        return self._network.run(self._links.narrow(names, share), _OPEN_LIMIT_S)

    def widen(self, narrowing: Narrowing) -> None:
        """End a narrowing."""
        self._network.run(self._links.widen(narrowing), _OPEN_LIMIT_S)

    def reset(self, name: str) -> None:
        """Cut a peer's connections; both ends learn of it."""
        self._network.run(self._links.reset(name), _OPEN_LIMIT_S)

    def forget(self, name: str) -> None:
        """Leave a peer's connections half open: neither end learns of it."""
        self._network.run(self._links.forget(name), _OPEN_LIMIT_S)

    @property
    def passed_bytes(self) -> dict[str, tuple[int, int]]:
        """Bytes that each link has carried up and down, by its peer's name."""
        return self._links.passed_bytes

    def close(self) -> None:
        """Cut all links."""
        self._network.stop()


@dataclass
class _Child:
    name: str
    process: subprocess.Popen[bytes]
    log: Path
    command: list[str]
    ended: bool = False
    """True if the rehearsal itself has ended the process."""
    closed: bool = False
    done: DoneEvent | None = None
    error: ErrorEvent | None = None
    is_finishing: bool = False
    """True once it has said that the run is over."""
    ended_s: float | None = None
    """Time when its process was first seen to have ended."""


@dataclass
class LocalSwarm:
    """Starts children in `directory` (one folder each) and yields their events."""

    directory: Path
    check: Callable[[], None] = lambda: None
    """Called while waiting for events; an exception ends the wait."""
    links: LocalLinks | None = None
    """Links that the children are behind; None if they reach each other directly."""
    children: dict[str, _Child] = field(default_factory=dict)
    _events: queue.Queue[tuple[_Child, Event | None]] = field(default_factory=queue.Queue)
    _alone_s: float | None = None
    """Time since when the bootstrap has been left by all volunteers."""
    _asked_to_end: int = 0
    """Signals that it was sent since."""
    _restarts: bool = True
    """True while a process that a rehearsal has ended may be started again."""

    def place(self, name: str, limited: bool) -> list[str]:
        """Return the options that say where a new child listens: behind a link, if there are links."""
        return ["--listen", "127.0.0.1:0"] if self.links is None else self.links.options(name, limited)

    def start(self, name: str, arguments: Sequence[str], program: Sequence[str] = ("-m", "swarmtrain.cli")) -> None:
        """Start `swarmtrain ARGUMENTS --json --dir DIRECTORY/name --name name`; standard error goes to name.log.

        `program` is what Python is told to run.
        """
        command = [sys.executable, *program, *arguments]
        command += ["--json", "--name", name, "--dir", str(self.directory / name)]
        self._start(name, command)

    def _start(self, name: str, command: list[str]) -> None:
        log = self.directory / f"{name}.log"
        tracked = [BY_TRACKER.get(word.removeprefix("--report-to="), "") for word in command]
        with log.open("ab") as errors:
            process = subprocess.Popen(
                owned_process_args(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                process_group=_GROUP,
                env=minimal_environment(" ".join([PEER, *tracked])),
            )
        child = _Child(name, process, log, command)
        self.children[name] = child
        threading.Thread(target=self._read, args=(child,), name=f"events of {name}", daemon=True).start()

    def _read(self, child: _Child) -> None:
        assert child.process.stdout is not None
        with child.process.stdout as lines:
            for line in lines:
                try:
                    event = parse_event(line)
                except ValueError:
                    continue  # cut short, as the child was killed while writing
                self._events.put((child, event))
        self._events.put((child, None))

    def events(self, limit_s: float | None = None) -> Iterator[Event]:
        """Yield events as they come, until every child has ended, or `limit_s` seconds pass without any."""
        while not all(child.closed for child in self.children.values()):
            self.check()
            try:
                child, event = self._events.get(timeout=0.2 if limit_s is None else min(0.2, limit_s))
            except queue.Empty:
                if limit_s is not None:
                    limit_s -= 0.2
                    if limit_s <= 0:
                        return
                self._end_lonely_bootstrap()
                ended = self._ended_with_open_pipe()
                if ended is None:
                    continue
                child, event = ended, None
            if event is None:
                if child.closed:
                    continue
                child.closed = True
                problem = self._problem(child)
                if problem is not None:
                    yield WarningEvent(name=child.name, message=problem, code=problem.code)
                continue
            if isinstance(event, DoneEvent):
                child.done = event
            elif isinstance(event, ErrorEvent):
                child.error = event
            elif isinstance(event, FinishingEvent):
                child.is_finishing = True
            yield event

    def _ended_with_open_pipe(self) -> _Child | None:
        """Return a child that has ended, and whose pipe is held open by a process that it had started."""
        for child in self.children.values():
            if child.closed or child.process.poll() is None:
                continue
            child.ended_s = time.monotonic() if child.ended_s is None else child.ended_s
            if time.monotonic() > child.ended_s + _PIPE_S:
                return child
        return None

    def _end_lonely_bootstrap(self) -> None:
        """End the bootstrap if all volunteers have ended and it still waits for their work: nobody will bring it.

        A bootstrap that has seen the run's end is left alone: to measure the model may take long.
        """
        bootstrap = self.children.get(BOOTSTRAP)
        volunteers = [child for child in self.children.values() if child is not bootstrap]
        has_gone = [child.closed and not (child.ended and self._restarts) for child in volunteers]
        is_alone = bool(volunteers) and all(has_gone)
        if bootstrap is None or bootstrap.closed or bootstrap.ended or bootstrap.is_finishing or not is_alone:
            self._alone_s = None
            return
        now_s = time.monotonic()
        self._alone_s = now_s if self._alone_s is None else self._alone_s
        limits_s = (_ALONE_S, _ALONE_S + _STOP_LIMIT_S, _ALONE_S + 2 * _STOP_LIMIT_S)
        if self._asked_to_end == len(limits_s) or now_s < self._alone_s + limits_s[self._asked_to_end]:
            return
        if not self._asked_to_end:
            message = (
                f"the bootstrap still looked for the last weights {_ALONE_S:.0f} s after all volunteers had ended, and "
                f"is ended now; its log is {bootstrap.log}; start the command again with the same --dir to go on"
            )
            self._events.put((bootstrap, WarningEvent(name=BOOTSTRAP, message=message, code="bootstrap-left-alone")))
        self._asked_to_end += 1
        is_last = self._asked_to_end == len(limits_s)
        bootstrap.process.send_signal(signal.SIGKILL if is_last else signal.SIGTERM)

    def _problem(self, child: _Child) -> Problem | None:
        """Return the reason why a child ended, if not as it should.

        Raises RunTimeError, or UserError if the child ended with code 2, if the swarm cannot continue: it survives the
        death of one child, but not of all, nor the bootstrap's before others have joined, and no bootstrap trains if
        every volunteer has ended with an error.
        """
        status = child.process.wait()
        if (status == 0 and child.done is not None) or (status == -signal.SIGKILL and child.ended):
            return None
        if child.error is not None:
            problem = Problem(child.error.message, child.error.code).found_in(child.name)
        else:
            problem = Problem(f"{child.name} ended with status {status}; see its log, {child.log}", "peer-failed")
        alive = [other for other in self.children.values() if other.process.poll() is None and other is not child]
        volunteers = [other for other in self.children.values() if other.name != BOOTSTRAP]
        nobody_trains = bool(volunteers) and all(other.error is not None for other in volunteers)
        if not alive or len(self.children) == 1 or nobody_trains:
            raise (UserError if status == UserError.exit_code else RunTimeError)(problem)
        return problem

    # calls of a rehearsal's faults (`faults.Processes`)

    def end(self, name: str, cleanly: bool) -> None:
        """End a process, by SIGTERM or by SIGKILL."""
        child = self.children[name]
        child.ended = True
        if child.process.poll() is None:
            child.process.send_signal(signal.SIGTERM if cleanly else signal.SIGKILL)

    def begin_again(self, name: str) -> None:
        """Start a process again in its folder; kill it first if it has not ended yet."""
        child = self.children[name]
        if not child.ended:
            return  # two faults struck it, and the shorter one is over: it runs again
        if child.process.poll() is None:
            child.process.kill()
        child.process.wait()
        self._start(name, child.command)

    def end_restarts(self) -> None:
        """Wait for no process any more that the rehearsal has ended."""
        self._restarts = False

    def hang(self, name: str) -> None:
        """Suspend a process and its daemon."""
        for process in self._processes(name):
            with contextlib.suppress(psutil.Error):  # it may have ended just now
                process.suspend()

    def go_on(self, name: str) -> None:
        """Resume a process and its daemon."""
        for process in self._processes(name):
            with contextlib.suppress(psutil.Error):
                process.resume()

    def _processes(self, name: str) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.children[name].process.pid)
            return [process, *process.children(recursive=True)]
        return []

    def tell(self, message: str) -> None:
        """Show a message to the person, as a warning event."""
        self._events.put((next(iter(self.children.values())), WarningEvent(message=message, code="rehearsal")))

    def wait_for_invite(
        self, limit_s: float | None = None, show: Callable[[Event], None] = lambda event: None
    ) -> tuple[InviteEvent, list[Event]]:
        """Return the bootstrap's invite and the events up to it; `show` gets them as they come.

        Without a limit it waits as long as the bootstrap works: to download a large model takes hours. Raises
        RunTimeError if the bootstrap ends first.
        """
        seen: list[Event] = []
        for event in self.events(limit_s):
            seen.append(event)
            show(event)
            if isinstance(event, InviteEvent):
                return event, seen
        raise RunTimeError("the bootstrap printed no invite; see bootstrap.log", code="peer-failed")

    def stop(self, show: Callable[[Event], None] = lambda event: None) -> None:
        """End the volunteers, then the bootstrap, then the links; `show` gets their events meanwhile."""
        bootstrap = self.children.get(BOOTSTRAP)
        serves = bootstrap is not None and bootstrap.process.poll() is None
        volunteers = [child for child in self.children.values() if child is not bootstrap]
        self._end(volunteers, _HAND_OVER_LIMIT_S if serves else _INSIST_S, show)
        self._end([bootstrap] if bootstrap is not None else [], _STOP_LIMIT_S, show)
        if self.links is not None:
            self.links.close()
            self.links = None

    def _end(self, children: Sequence[_Child], limit_s: float, show: Callable[[Event], None]) -> None:
        """Send SIGTERM to each; after `limit_s` once more, which makes it skip its last work; then kill it."""
        for last_s in (limit_s, _INSIST_S):
            for child in children:
                if child.process.poll() is None:
                    self.go_on(child.name)
                    child.process.send_signal(signal.SIGTERM)  # not SIGINT: a background job ignores it at first
            give_up_s = time.monotonic() + last_s
            while any(child.process.poll() is None for child in children) and time.monotonic() < give_up_s:
                for event in self._said(_POLL_INTERVAL_S):
                    show(event)
        for child in children:
            if child.process.poll() is None:
                child.process.kill()
            child.process.wait()

    def _said(self, limit_s: float) -> Iterator[Event]:
        """Yield the next event of any child, if one comes within `limit_s` seconds."""
        with contextlib.suppress(queue.Empty):
            child, event = self._events.get(timeout=limit_s)
            if event is not None:
                yield event
            else:
                child.closed = True

    def last_words(self, limit_s: float = 1.0) -> Iterator[Event]:
        """Yield the events that the children emitted while they were stopped."""
        while not all(child.closed for child in self.children.values()):
            try:
                child, event = self._events.get(timeout=limit_s)
            except queue.Empty:
                return
            if event is None:
                child.closed = True
            else:
                yield event
