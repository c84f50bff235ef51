"""Real processes of a swarm for tests: starts them, reads their events, ends them, and finds what they leave behind.

Every process and its children have a unique variable in their environment, by which leftovers of a swarm are found.
Tests wait for events, never for a time. Limits are generous, since they are reached only when something is wrong.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import tomli_w
from preloaded import ForkedProcess, Preloaded

from swarmtrain.events import (
    CaughtUpEvent,
    DoneEvent,
    ErrorEvent,
    Event,
    InviteEvent,
    JoinedEvent,
    PeerLostEvent,
    RoundEvent,
    WarningEvent,
    parse_event,
)
from swarmtrain.network.daemon import owned_process_args

PATIENCE_S = 120.0
"""How long to wait for what must happen, on a machine that others use too."""

_READ_S = 10.0
"""Until what an ended process had written is read."""

EXIT_S = 5.0
"""How long a peer may take to end after Ctrl-C, and its processes to be gone, if it has a core to itself."""

_LOOK_EVERY_S = 0.02
"""Seconds between checks of files and processes, which do not notify of changes."""

_E = TypeVar("_E")


def wait_until(condition: Callable[[], Any], what: str, limit_s: float = PATIENCE_S) -> Any:
    """Wait until `condition` returns something true, and return it; fails with `what` after `limit_s`."""
    give_up_s = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < give_up_s, f"not within {limit_s:g} s: {what() if callable(what) else what}"
        time.sleep(_LOOK_EVERY_S)
    return value


def exit_limit_s() -> float:
    """Return `EXIT_S`, or longer on a machine with more load than cores."""
    return EXIT_S * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


# ---------------------------------------------------------------- runs

_TINY: dict[str, dict[str, Any]] = {
    "run": {"name": "tiny", "seed": 5, "total_tokens": 10**9},
    "model": {"context_tokens": 64, "num_layers": 2, "width": 64, "num_heads": 2, "feed_forward_ratio": 2.0},
    "data": {"source": "text", "paths": ["texts/*.txt"], "held_out_bytes": 4096},
    "inner": {"batch_sequences": 8, "warmup_fraction": 0.0},
    "merge": {"method": "diloco", "inner_steps": 10, "silence_s": 2.0, "outer_momentum": 0.5},
    "network": {"call_limit_s": 3.0, "stall_limit_s": 3.0},
}


def write_run(folder: Path, num_texts: int = 12, **sections: Mapping[str, Any]) -> Path:
    """Write a run file for a run of seconds, changed by `sections`, and `num_texts` text files of 16 kB beside it."""
    texts = folder / "texts"
    if not texts.exists():
        texts.mkdir(parents=True)
        for number in range(num_texts):
            (texts / f"{number}.txt").write_text(_text(number))
    table = {name: {**_TINY.get(name, {}), **sections.get(name, {})} for name in {**_TINY, **sections}}
    path = folder / f"{table['run']['name']}.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def _text(seed: int) -> str:
    """Return about 16 kB of made-up sentences, on which a model soon reaches the same loss for any seed."""
    words = ["".join(random.Random(n).choices("abcdefghiklmnoprstuvw", k=2 + n % 7)) for n in range(150)]
    chance = random.Random(1000 + seed)
    return "\n".join(" ".join(chance.choices(words, k=10)) for _ in range(300)) + "\n"


# ---------------------------------------------------------------- processes


@dataclass(eq=False)
class Child:
    """Process of a swarm, and its events."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes] | ForkedProcess
    log: Path
    events: list[Event] = field(default_factory=list)
    noise: list[bytes] = field(default_factory=list)
    _news: threading.Condition = field(default_factory=threading.Condition)
    _reader: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, name=f"events of {self.name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                try:
                    self.events.append(parse_event(line))
                except ValueError:
                    self.noise.append(line)
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    # ------------------------------------------------------------- events

    def wait_event(
        self, kind: type[_E], where: Callable[[_E], bool] = lambda event: True, limit_s: float = PATIENCE_S
    ) -> _E:
        """Wait for the first event of this kind that `where` accepts, past events included."""
        give_up_s = time.monotonic() + limit_s
        seen = 0
        with self._news:
            while True:
                for event in self.events[seen:]:
                    if isinstance(event, kind) and where(event):
                        return event
                seen = len(self.events)
                assert self._reader.is_alive(), f"{self.name} ended without {kind.__name__}; {self.story()}"
                left_s = give_up_s - time.monotonic()
                assert left_s > 0, f"no {kind.__name__} of {self.name} within {limit_s:g} s; {self.story()}"
                self._news.wait(min(left_s, 0.2))  # its end is no news

    def all(self, kind: type[_E]) -> list[_E]:
        """Return its events of one kind so far."""
        return [event for event in list(self.events) if isinstance(event, kind)]

    def rounds(self) -> dict[int, RoundEvent]:
        """Return its rounds so far, by number."""
        return {event.round: event for event in self.all(RoundEvent)}

    def settled_rounds(self) -> dict[int, RoundEvent]:
        """Return its rounds since it last took another peer's state, by number."""
        events = list(self.events)
        caught_up = [index for index, event in enumerate(events) if isinstance(event, CaughtUpEvent)]
        settled = events[max(caught_up, default=-1) + 1 :]
        return {event.round: event for event in settled if isinstance(event, RoundEvent)}

    def history(self, round: int) -> str:
        """Describe what it merged around `round`, for a failed assertion."""
        lines = []
        for event in list(self.events):
            if isinstance(event, CaughtUpEvent):
                lines.append(f"{event.time:.2f} caught up to {event.round} from {event.from_peer}: {event.reason}")
            elif isinstance(event, PeerLostEvent):
                lines.append(f"{event.time:.2f} lost {event.lost}: {event.reason}")
            elif isinstance(event, RoundEvent) and abs(event.round - round) < 4:
                parts = [f"{event.time:.2f} round {event.round}: {event.state_sha256[:12]}", f"signer {event.signer}"]
                lines.append(", ".join([*parts, f"{event.seconds:.1f} s, of {event.partners}"]))
        return "\n  ".join([f"{self.name} {self.id}", *lines])

    @property
    def last_round(self) -> int:
        """Return the last round it merged; -1 before the first."""
        return max(self.rounds(), default=-1)

    def wait_round(self, round: int, limit_s: float = PATIENCE_S) -> RoundEvent:
        """Wait for its first round with this or a later number."""
        return self.wait_event(RoundEvent, lambda event: event.round >= round, limit_s)

    def wait_more_rounds(self, number: int, limit_s: float = PATIENCE_S) -> RoundEvent:
        """Wait for `number` more rounds than it has had."""
        return self.wait_round(self.last_round + number, limit_s)

    @property
    def id(self) -> str:
        """Return its PeerID, from the first event that has it."""
        wait_until(
            lambda: any(event.peer for event in list(self.events)) or self.process.poll() is not None,
            lambda: f"an event of {self.name}; {self.story()}",
        )
        return next(event.peer for event in self.events if event.peer)

    @property
    def invite(self) -> InviteEvent:
        """Wait for its invite."""
        return self.wait_event(InviteEvent)

    def story(self) -> str:
        """Describe what is known of it, for a failed assertion."""
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        told = "\n  ".join(f"{type(event).__name__} {event}"[:400] for event in self.events[-8:])
        return f"{self.name}: exit code {self.process.poll()}\n  {told}\nstandard error:\n{log[-3000:]}"

    # ------------------------------------------------------------- its end

    def interrupt(self) -> None:
        """Send SIGINT, as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)

    def insist_if_it_waits(self, give_up_s: float) -> None:
        """Ask again if it is the last volunteer and waits for a bootstrap that is gone. Ctrl-C would end it."""
        while self.process.poll() is None and time.monotonic() < give_up_s:
            if any(warning.code == "no-bootstrap" for warning in self.all(WarningEvent)):
                self.process.terminate()
                time.sleep(0.1)  # of two signals at one moment, only one is delivered
                self.process.terminate()
                return
            time.sleep(_LOOK_EVERY_S)

    def kill(self) -> None:
        """Send SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    def wait(self, limit_s: float = PATIENCE_S) -> int:
        """Wait for its end, and until all its events are read; returns its exit code."""
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {limit_s:g} s; {self.story()}") from None
        self._reader.join(_READ_S)
        return code

    def error_line(self) -> str:
        """Return the last line of its standard error."""
        return (self.log.read_text(errors="replace").strip().splitlines() or [""])[-1]

    # ------------------------------------------------------------- its processes

    def daemon(self) -> int:
        """Return its daemon's process id."""
        return wait_until(lambda: next(iter(self._daemons()), 0), f"the daemon of {self.name}")

    def _daemons(self) -> list[int]:
        return [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/status")
            if f"\nPPid:\t{self.process.pid}\n" in _text_of(path) and "p2pd" in _text_of(path)
        ]

    def sockets(self) -> Path:
        """Return the folder of its daemon's sockets, from the daemon's arguments."""
        words = Path(f"/proc/{self.daemon()}/cmdline").read_bytes().split(b"\0")
        path = next(word for word in words if word.startswith((b"-listen=/unix", b"--listen=/unix")))
        return Path(os.fsdecode(path.partition(b"/unix")[2])).parent

    def pss_bytes(self) -> int:
        """Return the memory of all its processes; shared memory counts in proportion."""
        total = 0
        for pid in (self.process.pid, *self._daemons()):
            for line in _text_of(Path(f"/proc/{pid}/smaps_rollup")).splitlines():
                if line.startswith("Pss:"):
                    total += 1024 * int(line.split()[1])
        return total


def _text_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # it has ended
        return ""


@dataclass
class Swarm:
    """Processes of swarms, below one folder; a context manager that ends them all."""

    folder: Path
    children: list[Child] = field(default_factory=list)
    tag: str = field(default_factory=lambda: uuid.uuid4().hex)
    listen: str = "127.0.0.1:0"
    temporary: Path | None = None
    """Folder for temporary files of its processes; None: the system's."""
    preloaded: Preloaded | None = None
    """Forking processes, which start most of its processes quicker."""

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            if child.process.poll() is None:
                child.process.kill()
        for child in self.children:
            child.process.wait()
        give_up_s = time.monotonic() + EXIT_S
        while (left := self.leftovers()) and time.monotonic() < give_up_s:
            time.sleep(_LOOK_EVERY_S)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for child in self.children:
            child._reader.join(_READ_S)
            assert child.process.stdout is not None
            child.process.stdout.close()

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of its processes; their caches and default folders are below its folder."""
        own = {
            "OMP_NUM_THREADS": "1",
            "SWARMTRAIN_JOIN_ON_BATTERY": "1",  # tests run on laptops, too
            "LC_SWARMTRAIN_TEST": self.tag,  # also in the minimal environments of its children
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "XDG_DATA_HOME": str(self.folder / "data"),
        }
        if self.temporary is not None:
            own["TMPDIR"] = str(self.temporary)
        return {**os.environ, **own}

    def start(self, name: str, arguments: Sequence[str], *, prelude: str = "", cwd: Path | None = None) -> Child:
        """Start `swarmtrain ARGUMENTS`; `prelude` is Python that runs before it. It dies with this process."""
        cwd = cwd or self.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"{name}-{len(self.children)}.log"
        process: subprocess.Popen[bytes] | ForkedProcess
        with log.open("wb") as errors:
            if self.preloaded is not None and not prelude:
                process = self.preloaded.start(len(self.children), arguments, errors, self.environment, cwd)
            else:
                process = self._start_anew(arguments, prelude, errors, cwd)
        child = Child(name, self.folder / name, process, log)
        self.children.append(child)
        return child

    def _start_anew(
        self, arguments: Sequence[str], prelude: str, errors: IO[bytes], cwd: Path
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "swarmtrain.cli", *arguments]
        if prelude:
            code = f"{prelude}\nfrom swarmtrain.cli.main import main\nmain()"
            command = [sys.executable, "-c", code, *arguments]
        return subprocess.Popen(
            owned_process_args(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=self.environment,
            cwd=cwd,
        )

    def _peer(self, name: str, arguments: Sequence[str], prelude: str = "") -> Child:
        own = ["--json", "--name", name, "--dir", str(self.folder / name), "--listen", self.listen]
        return self.start(name, [*arguments, *own], prelude=prelude)

    def bootstrap(self, run_file: Path, *extra: str, name: str = "bootstrap", prelude: str = "") -> Child:
        """Start a bootstrap of `run_file`."""
        return self._peer(name, ["bootstrap", str(run_file), *extra], prelude)

    def join(self, name: str, invite: str, *extra: str, prelude: str = "") -> Child:
        """Start a volunteer; its text is beside the run files that `write_run` wrote into this folder."""
        return self._peer(name, ["join", invite, "--threads", "1", "--data", str(self.folder), *extra], prelude)

    def join_all(self, names: Sequence[str], invite: str) -> list[Child]:
        """Start volunteers, and wait until each has joined."""
        children = [self.join(name, invite) for name in names]
        for child in children:
            child.wait_event(JoinedEvent)
        return children

    def run(self, *arguments: str, limit_s: float = PATIENCE_S) -> Finished:
        """Run a command to its end."""
        child = self.start(arguments[0] if arguments else "none", arguments)
        code = child.wait(limit_s)
        return Finished(code, child.noise, child.log.read_text(), child.all(ErrorEvent))

    # ------------------------------------------------------------- what is left

    def leftovers(self) -> dict[int, str]:
        """Map live processes of this swarm, daemons included, to their command lines."""
        mark = f"LC_SWARMTRAIN_TEST={self.tag}".encode()
        own = {child.process.pid for child in self.children if child.process.poll() is None}
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if int(path.parent.name) in own or mark in path.read_bytes().split(b"\0"):
                    words = (path.parent / "cmdline").read_bytes().split(b"\0")
                    found[int(path.parent.name)] = b" ".join(words[:6]).decode(errors="replace")[:200]
        return found

    def assert_nothing_left(self) -> None:
        """Check that no process of the swarm, daemons included, is left after at most 5 s."""
        wait_until(lambda: not self.leftovers(), lambda: f"still there: {self.leftovers()}", exit_limit_s())

    def interrupt_all(self, children: Sequence[Child]) -> None:
        """Send SIGINT to the remaining ones; check that all end cleanly and in time, and that nothing is left."""
        self.interrupt_some(children)
        self.assert_nothing_left()

    def interrupt_some(self, children: Sequence[Child]) -> None:
        """Send SIGINT to each; check that all end cleanly and in time."""
        sockets = [child.sockets() for child in children]
        for child in children:
            child.interrupt()
        give_up_s = time.monotonic() + exit_limit_s()
        for child in children:
            child.insist_if_it_waits(give_up_s)
            assert child.wait(max(0.1, give_up_s - time.monotonic())) == 0, child.story()
            (done,) = child.all(DoneEvent)
            assert (done.reason, done.peer, done.name) == ("interrupted", child.id, child.name), child.story()
            rounds = child.rounds().values()
            assert done.tokens >= sum(event.tokens for event in rounds), child.story()
            assert done.run_tokens >= max((event.run_tokens for event in rounds), default=0), child.story()
            assert not child.noise, f"{child.name} wrote something else than events: {child.noise[:3]}"
        assert not [folder for folder in sockets if folder.exists()]


@dataclass(frozen=True)
class Finished:
    """Command that has ended."""

    code: int
    lines: list[bytes]
    stderr: str
    errors: list[ErrorEvent]

    @property
    def stdout(self) -> str:
        """Output that is no event."""
        return b"".join(self.lines).decode()


def assert_same_states(children: Sequence[Child]) -> int:
    """Check that all peers that merged a round have equal weights; returns how many rounds several of them merged.

    Rounds before a child last caught up do not count: catching up resolves two rosters of one round. While they train,
    the newest two rounds may still be unresolved.
    """
    by_round: dict[int, dict[str, RoundEvent]] = {}
    for child in children:
        for number, event in child.settled_rounds().items():
            by_round.setdefault(number, {})[child.name] = event
    for number, events in sorted(by_round.items()):
        states = {name: event.state_sha256[:12] for name, event in events.items()}
        if number > max(by_round) - 2 and any(child.process.poll() is None for child in children):
            continue
        stories = "\n".join(child.history(number) for child in children)
        assert len(set(states.values())) == 1, f"round {number}: {states}\n{stories}"
    return sum(len(events) > 1 for events in by_round.values())
