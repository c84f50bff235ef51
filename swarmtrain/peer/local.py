"""A whole swarm on one machine: a bootstrap and volunteers as real processes, watched through their events.

Each child writes its events as JSON lines; a thread per child reads them. Children die with this process, however
it ends (see `network.daemon.owned_process_args`).
"""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from swarmtrain.errors import RunTimeError
from swarmtrain.events import DoneEvent, ErrorEvent, Event, InviteEvent, WarningEvent, parse_event
from swarmtrain.network.daemon import owned_process_args

__all__ = ["LocalSwarm"]

_STOP_LIMIT_S = 4.5


@dataclass
class _Child:
    name: str
    process: subprocess.Popen[bytes]
    log: Path
    closed: bool = False
    done: DoneEvent | None = None
    error: ErrorEvent | None = None


@dataclass
class LocalSwarm:
    """Starts children in `directory` (one folder each) and yields their events."""

    directory: Path
    check: Callable[[], None] = lambda: None
    """Called while waiting for events; what it raises ends the wait."""
    children: dict[str, _Child] = field(default_factory=dict)
    _events: queue.Queue[tuple[str, Event | None]] = field(default_factory=queue.Queue)

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Start `swarmtrain ARGUMENTS --json --dir DIRECTORY/name --name name`; standard error goes to name.log."""
        command = [sys.executable, "-m", "swarmtrain.cli", *arguments]
        command += ["--json", "--name", name, "--dir", str(self.directory / name)]
        log = self.directory / f"{name}.log"
        with log.open("ab") as errors:
            process = subprocess.Popen(
                owned_process_args(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
            )
        child = _Child(name, process, log)
        self.children[name] = child
        threading.Thread(target=self._read, args=(child,), name=f"events of {name}", daemon=True).start()

    def _read(self, child: _Child) -> None:
        assert child.process.stdout is not None
        for line in child.process.stdout:
            try:
                event = parse_event(line)
            except ValueError:
                continue  # a broken line of a child that was killed while writing it
            self._events.put((child.name, event))
        self._events.put((child.name, None))

    def events(self, limit_s: float | None = None) -> Iterator[Event]:
        """Events as they come, until every child has ended, or for `limit_s` without any."""
        while not all(child.closed for child in self.children.values()):
            self.check()
            try:
                name, event = self._events.get(timeout=0.2 if limit_s is None else min(0.2, limit_s))
            except queue.Empty:
                if limit_s is not None:
                    limit_s -= 0.2
                    if limit_s <= 0:
                        return
                continue
            child = self.children[name]
            if event is None:
                child.closed = True
                problem = self._problem(child)
                if problem is not None:
                    yield WarningEvent(name=name, message=problem)
                continue
            if isinstance(event, DoneEvent):
                child.done = event
            elif isinstance(event, ErrorEvent):
                child.error = event
            yield event

    def _problem(self, child: _Child) -> str | None:
        """Why a child ended, if not as it should. Raises RunTimeError when the swarm cannot go on without it: the
        others survive one that dies, but not all, and not the bootstrap before they have joined."""
        status = child.process.wait()
        if status == 0 and child.done is not None:
            return None
        if child.error is not None:
            problem = f"{child.name}: {child.error.message}"
        else:
            problem = f"{child.name} ended with status {status}; its log is {child.log}"
        alive = [other for other in self.children.values() if other.process.poll() is None and other is not child]
        if not alive or len(self.children) == 1:
            raise RunTimeError(problem)
        return problem

    def wait_for_invite(self, limit_s: float = 60.0) -> tuple[InviteEvent, list[Event]]:
        """The bootstrap's invite, and what came before it."""
        seen: list[Event] = []
        for event in self.events(limit_s):
            seen.append(event)
            if isinstance(event, InviteEvent):
                return event, seen
        raise RunTimeError("the bootstrap printed no invite; see bootstrap.log")

    def stop(self) -> None:
        """SIGTERM for every child, then, after a while, the end."""
        for child in self.children.values():
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)  # not SIGINT: a background job ignores it at first
        give_up_s = time.monotonic() + _STOP_LIMIT_S
        for child in self.children.values():
            try:
                child.process.wait(max(0.1, give_up_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()

    def last_words(self, limit_s: float = 1.0) -> Iterator[Event]:
        """What the children said while they were stopped."""
        while not all(child.closed for child in self.children.values()):
            try:
                name, event = self._events.get(timeout=limit_s)
            except queue.Empty:
                return
            if event is None:
                self.children[name].closed = True
            else:
                yield event
