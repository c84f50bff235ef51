"""Recorder inside a volunteer: writes down what it trained and published, and what entered its weights.

One JSON object per line; `at_s` is the time by the machine's monotonic clock, which is the same in all processes. The
volunteer is unchanged, except that its choices come from a generator with a known seed.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from swarmtrain.errors import BadBytesError
from swarmtrain.network.asynchronous.publications import Publisher
from swarmtrain.network.codec import vector_sha256
from swarmtrain.peer.merging import asynchronous_exchange, roster_exchange
from swarmtrain.peer.merging.gossip_exchange import GossipExchange
from swarmtrain.peer.merging.gossip_runner import GossipRunner
from swarmtrain.peer.merging.robustness import Robustness
from swarmtrain.peer.training.replica import MergedFragment, Replica
from swarmtrain.protocol.gossip import engine
from swarmtrain.protocol.gossip.engine import GossipEngine
from swarmtrain.protocol.gossip.messages import MergeFragment
from swarmtrain.protocol.gossip.partners import PublicationVersion


def prelude(path: Path) -> str:
    """Return Python code that makes a volunteer write its record to `path`, for `Swarm.join`."""
    here = str(Path(__file__).parent)
    return f"import sys; sys.path.insert(0, {here!r}); import recording; recording.record({str(path)!r})"


def generator(peer: str) -> random.Random:
    """Return the generator of a recorded volunteer's choices."""
    return random.Random(f"choices of {peer}")


class Record:
    """Record file.

    Lines that a thread writes within a `block` have its number, and no other thread's lines are between them.
    """

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 - until the process ends
        self.lock = threading.RLock()
        self.thread = threading.local()
        self.before_block: Callable[[list[dict[str, Any]]], None] = lambda lines: None
        """Called with the lines of each block before they are written; it may insert others before them."""
        self._num_blocks = self._num_lines = 0
        self._last: dict[str, Any] = {}

    def write(self, kind: str, **what: Any) -> None:
        with self.lock:
            # Serialised now: the values may change before the block ends.
            line = json.loads(json.dumps({"kind": kind, "at_s": time.monotonic(), **what}, default=plain))
            if (lines := getattr(self.thread, "lines", None)) is None:
                self._put([line])
            else:
                lines.append(line)

    def _put(self, lines: list[dict[str, Any]]) -> None:
        self._num_blocks += 1
        for line in lines:
            self._num_lines += 1
            of_all = {"number": self._num_lines, "block": self._num_blocks}
            self._file.write(json.dumps({**line, **of_all}) + "\n")
        self._file.flush()

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """Treat what this thread does inside as one moment; a nested block is part of the outer one."""
        with self.lock:
            if getattr(self.thread, "lines", None) is not None:
                yield
                return
            self.thread.lines, self.thread.now, self.thread.num_tasks = [], None, 0
            try:
                yield
            finally:
                lines, self.thread.lines = self.thread.lines, None
                if lines:
                    self.before_block(lines)
                    self._put(lines)

    def write_news(self, kind: str, **what: Any) -> None:
        """Write a line unless it equals the last one of its kind."""
        with self.lock:
            text = json.dumps(what, default=plain)
            if self._last.get(kind) != text:
                self._last[kind] = text
                self.write(kind, **what)


def plain(value: Any) -> Any:
    """Convert a value to what JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        members = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        return {name: member for name, member in members.items() if not callable(member)}
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)


def record(path: str) -> Record:
    """Write to `path` from now on."""
    record = Record(path)
    _rounds(record)
    _choices(record)
    _pulls(record)
    _merges(record)
    return record


def _text_of(vector: Tensor) -> str:
    return base64.b64encode(vector.numpy().tobytes()).decode()


def around(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Put `wrapper(original, *args, **kwargs)` in place of a module's function or a class's method."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    put(owner, name, wrapped)


_IN_PLACE_OF: list[tuple[Any, str, Any]] = []


def put(owner: Any, name: str, value: Any) -> None:
    """Replace a module's or class's attribute by `value`, until `take_out`."""
    _IN_PLACE_OF.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def take_out() -> None:
    """Restore all replaced attributes."""
    while _IN_PLACE_OF:
        setattr(*_IN_PLACE_OF.pop())


def _rounds(record: Record) -> None:
    """Record how rounds begin, and what is published in them."""

    def start_round(original: Any, self: GossipExchange, progress: Any, steps_per_s: float) -> Any:
        told = record.thread
        told.began_s, told.done = time.monotonic(), 0
        told.steps = 0.0, (), ()  # not asked for until it knows its speed
        start = original(self, progress, steps_per_s)
        record.write(
            "round",
            at_s=told.began_s,  # its weights may be requested before it returns
            round=progress.round,
            run_tokens=progress.run_tokens,
            steps_of=told.steps,
            everybodys_of=told.everybodys,
            format_of=told.format_of,
            start=start,
        )
        return start

    def steps(original: Any, own: float, others: Any, *args: Any, **how: Any) -> int:
        record.thread.steps = own, others, how["others_end_in_s"]
        return original(own, others, *args, **how)

    def everybodys(original: Any, own: float, others: Any) -> float:
        record.thread.everybodys = own, others
        return original(own, others)

    def gradient_format(original: Any, sizes: Any, *args: Any) -> Any:
        record.thread.format_of = args
        return original(sizes, *args)

    def publish(original: Any, self: GossipExchange, contribution: Any) -> None:
        c = contribution
        with record.lock:
            record.write("published", found=[[of.round, of.part, of.tokens] for of in c.fragment_rounds])
            original(self, contribution)

    def build(original: Any, self: Publisher, publication: Any) -> Any:
        mark = PublicationVersion(publication.round, publication.part, publication.tokens)
        with record.lock:  # what rounding loses goes to the next one, unless its round is over when it is made
            record.write("asked_for", fragment=self.fragment, mark=mark)
            return original(self, publication)

    around(GossipExchange, "start_round", start_round)
    around(roster_exchange, "round_inner_steps", steps)
    around(asynchronous_exchange, "steps_of_everybody", everybodys)
    around(engine, "gradient_format", gradient_format)
    around(GossipExchange, "publish", publish)
    around(Publisher, "_build", build)


def _choices(record: Record) -> None:
    """Draw choices from a known generator."""

    def init(original: Any, self: GossipEngine[Any, Any, Any], me: str, settings: Any) -> None:
        original(self, me, settings, generator(me))

    around(GossipEngine, "__init__", init)


def _pulls(record: Record) -> None:
    """Record what the run's rule made of each pulled publication."""

    def decode(original: Any, self: GossipExchange, command: Any) -> Any:
        manifest = command.held.snapshot.manifest
        mark = PublicationVersion(manifest.round, manifest.part, manifest.tokens)
        record.thread.version = command.fragment, mark
        which = {"fragment": command.fragment, "section": command.group, "author": command.author}
        found = [type(command.news).__name__, command.news.tokens]
        record.write("news", **which, mark=mark, is_here=True, found=found)
        return original(self, command)

    def accept(original: Any, self: Robustness, peer: str, arrival: Any, own_theta: Any, round: int) -> Any:
        (fragment, mark), refused, tokens = record.thread.version, "", 0
        with record.lock:
            try:
                found = original(self, peer, arrival, own_theta, round)
                tokens = found.tokens
                return found
            except BadBytesError as error:
                refused = str(error)
                raise
            finally:
                section = "gradient" if mark.part else "weights"
                record.write(
                    "accepted", fragment=fragment, author=peer, section=section, mark=mark, found=[tokens, refused]
                )

    def learn(original: Any, self: Robustness, gradient: Any, tokens: int) -> None:
        with record.lock:
            original(self, gradient, tokens)
            record.write("learned", found=tokens)

    around(GossipExchange, "decode_untrusted", decode)
    around(Robustness, "accept", accept)
    around(Robustness, "learn", learn)


def _merges(record: Record) -> None:
    """Record what entered each merge, and the resulting weights."""

    prepared_for: dict[int, tuple[float, float]] = {}

    def prepare(original: Any, self: GossipExchange, command: Any) -> Any:
        found, plan = original(self, command), command.plan
        prepared_for[id(found)] = plan.began_s[plan.fragments.index(command.fragment)], plan.ends_s
        return found

    def merge_due(original: Any, self: GossipRunner, round: int, fragment: int, **how: Any) -> Any:
        due = original(self, round, fragment, **how)
        if isinstance(due, MergeFragment):
            pulled = [[one.group, one.peer, one.version, one.began_s] for one in due.pulled]
            of_s = None if due.merge is None else prepared_for[id(due.merge)]
            reference = self.engine._others.reference_round()
            record.write("taken", fragment=fragment, round=round, reference=reference, pulled=pulled, of_s=of_s)
        return due

    def enter(original: Any, self: Replica, merged: MergedFragment) -> None:
        original(self, merged)
        entered = [[one.peer, one.tokens] for one in merged.arrived.merged]
        sums = {"theta_sha256": vector_sha256(self.state.theta), "momentum_sha256": vector_sha256(self.state.momentum)}
        record.write("merged", fragment=merged.fragment, found=entered, **sums)

    def adopt(original: Any, self: Replica, replaced: Any) -> None:
        original(self, replaced)
        progress, state = replaced.progress, replaced.state
        record.write(
            "adopted",
            round=progress.round,
            run_tokens=progress.run_tokens,
            reason=replaced.reason,
            theta=_text_of(state.theta),
            momentum=_text_of(state.momentum),
        )

    around(GossipExchange, "prepare", prepare)
    around(GossipRunner, "merge_due", merge_due)

    def step_done(original: Any, self: GossipExchange, inner_steps_done: int) -> None:
        record.thread.done = inner_steps_done
        original(self, inner_steps_done)

    def restart(original: Any, self: Replica) -> None:
        original(self)
        record.write("restarts", done=record.thread.done)

    around(GossipExchange, "step_done", step_done)
    around(Replica, "restart", restart)
    around(Replica, "enter", enter)
    around(Replica, "adopt", adopt)
