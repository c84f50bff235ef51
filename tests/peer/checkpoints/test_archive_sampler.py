"""What an archive is worth while the run goes on: measured seldom, in the background, and never in the way."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from patience import PATIENCE_S

from swarmtrain.data.tokens import tokenizer_from_bytes_untrusted
from swarmtrain.errors import UserError
from swarmtrain.events import EvalEvent, Event, WarningEvent
from swarmtrain.machine_memory import Memory
from swarmtrain.model.run_model import build_run_model
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.peer.bootstrap import publish_run
from swarmtrain.peer.checkpoints import archive_sampler
from swarmtrain.peer.checkpoints.archive_sampler import ArchiveSampler, rest_s
from swarmtrain.peer.lifecycle.node import held_out_loss_of, save_weights
from swarmtrain.protocol.history import HistoryPoint, TextSample
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import parse_run

RUN = """
[run]
total_tokens = 100_000
[model]
context_tokens = 16
num_layers = 1
width = 16
num_heads = 2
[data]
source = "text"
paths = ["*.txt"]
held_out_bytes = 2048
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedRun:
    base = tmp_path_factory.mktemp("text")
    for number in range(40):
        lines = [f"line {line} of text {number} is rather long, and says that {line * number}" for line in range(30)]
        (base / f"{number}.txt").write_text("\n".join(lines))
    return publish_run(parse_run(RUN, "r"), base, datetime.datetime.now(datetime.UTC))


class Measured:
    """A sampler of the archive in `folder`, and what it told."""

    def __init__(self, published: PublishedRun, folder: Path) -> None:
        self.published, self.folder = published, folder
        self.events: list[Event] = []
        self.records: list[tuple[HistoryPoint, TextSample | None]] = []
        self.sampler = ArchiveSampler(
            published, folder, self.events.append, lambda point, sample: self.records.append((point, sample))
        )

    def archive(self, round: int, tokens: int, *, has_diverged: bool = False) -> Progress:
        progress = Progress(round=round, run_tokens=tokens)
        model = build_run_model(self.published.run, None)
        if has_diverged:
            next(iter(model.trained_tensors())).data.fill_(math.nan)
        save_weights(self.folder, dict(model.trained_parameters()), self.published, progress, None)
        return progress


def test_the_loss_is_the_models_and_the_sample_continues_held_out_text(published: PublishedRun, tmp_path: Path) -> None:
    measured = Measured(published, tmp_path / "archive")
    measured.sampler.measure(measured.archive(3, 4000))
    (event,) = measured.events
    tokenizer = tokenizer_from_bytes_untrusted(published.tokenizer, published.run.model.vocabulary_size)
    expected = held_out_loss_of(build_run_model(published.run, None), published, tokenizer)
    assert isinstance(event, EvalEvent) and event.round == 2
    assert event.held_out_loss == pytest.approx(expected.nats_per_byte)
    (at_once, nothing_yet), (point, sample) = measured.records
    assert at_once == point and nothing_yet is None and sample is not None, "the curve does not wait for the text"
    assert (point.run_tokens, point.held_out_loss) == (4000, event.held_out_loss)
    assert sample.prompt.encode() in published.held_out and 5 < len(sample.prompt) <= 48
    assert sample.text and len(sample.text) <= 200 and (sample.round, sample.run_tokens) == (3, 4000)
    again = Measured(published, tmp_path / "archive")
    again.sampler.measure(Progress(round=3, run_tokens=4000))
    written = again.records[1][1]
    assert written is not None and written.text == sample.text, "the same round writes the same"


def test_a_loss_that_is_not_finite_is_told_once(published: PublishedRun, tmp_path: Path) -> None:
    measured = Measured(published, tmp_path / "archive")
    for round in (3, 4):
        measured.sampler.measure(measured.archive(round, 1000 * round, has_diverged=True))
    (warning,) = measured.events
    assert isinstance(warning, WarningEvent) and warning.code == "training-diverged" and not measured.records
    measured.sampler.measure(measured.archive(5, 5000))
    assert isinstance(measured.events[-1], EvalEvent) and len(measured.records) == 2, "it has come back"


def test_an_archive_that_is_not_the_one_offered_is_left_alone(published: PublishedRun, tmp_path: Path) -> None:
    measured = Measured(published, tmp_path / "archive")
    measured.archive(4, 5000)
    measured.sampler.measure(Progress(round=3, run_tokens=4000))
    assert not measured.events and not measured.records
    with pytest.raises(UserError):
        Measured(published, tmp_path / "none").sampler.measure(Progress())


def test_without_room_it_is_not_tried(published: PublishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(published, tmp_path / "archive")
    progress = measured.archive(1, 100)
    monkeypatch.setattr(archive_sampler, "machine_memory", lambda: Memory(total_bytes=10**9, available_bytes=1000))
    with pytest.raises(MemoryError):
        measured.sampler.measure(progress)


@pytest.fixture(autouse=True)
def not_nice(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the lowest priority, a thread may wait for minutes beside other programs."""
    monkeypatch.setattr(archive_sampler, "_NICE", 0)


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    def set_rest(seconds: float) -> None:
        monkeypatch.setattr(archive_sampler, "_LEAST_REST_S", seconds)
        monkeypatch.setattr(archive_sampler, "_REST_OF_WORK", 0.0)

    return set_rest


class Slow(ArchiveSampler):
    """A sampler whose measurements wait until they are let go."""

    def __init__(self) -> None:
        super().__init__(None, Path(), lambda event: None, lambda point, sample: None)  # type: ignore[arg-type]
        import threading

        self.began = threading.Semaphore(0)
        self.let_go = threading.Semaphore(0)
        self.measured: list[int] = []
        self.fails: dict[int, Exception] = {}

    def measure(self, progress: Progress) -> None:
        self.measured.append(progress.round)
        self.began.release()
        while not self.let_go.acquire(timeout=0.01):
            self._check()
        if progress.round in self.fails:
            raise self.fails[progress.round]


def test_the_newest_that_was_offered_meanwhile_comes_next(rests: Any) -> None:
    rests(0.0)
    slow = Slow()
    slow.fails[1] = OSError("the disk went away")
    slow.offer(Progress(round=1))
    assert slow.began.acquire(timeout=PATIENCE_S)
    for round in (2, 3, 4):
        slow.offer(Progress(round=round))
    slow.let_go.release()
    assert slow.began.acquire(timeout=PATIENCE_S)
    slow.close()
    assert slow.measured == [1, 4]
    slow.offer(Progress(round=5))
    slow.close()
    assert slow.measured == [1, 4], "it has ended"


def test_it_rests_by_what_it_took_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen on a busy machine: half a second of work lasted ten, and a run of six minutes had two points."""
    rests: list[float] = []
    clocks = {"thread_time": 100.0, "monotonic": 7000.0}

    class Busy(Slow):
        def measure(self, progress: Progress) -> None:
            super().measure(progress)
            clocks["thread_time"] += 0.5
            clocks["monotonic"] += 10.0

    def rest(processor_s: float) -> float:
        rests.append(processor_s)
        return 0.0

    told = {name: lambda name=name: clocks[name] for name in clocks}
    monkeypatch.setattr(archive_sampler, "time", SimpleNamespace(**told))
    monkeypatch.setattr(archive_sampler, "rest_s", rest)
    busy = Busy()
    busy.offer(Progress(round=1))
    assert busy.began.acquire(timeout=PATIENCE_S)
    busy.offer(Progress(round=2))
    busy.let_go.release()
    assert busy.began.acquire(timeout=PATIENCE_S)
    busy.close()
    assert rests == [0.5]


def test_a_twentieth_of_a_processor() -> None:
    assert rest_s(1.0) == 19.0 and rest_s(10.0) == 190.0
    assert rest_s(0.0) == 2.0, "an archive that could not be read is not tried at once"


def test_it_ends_while_it_rests(rests: Any) -> None:
    rests(3600.0)
    slow = Slow()
    slow.offer(Progress(round=1))
    assert slow.began.acquire(timeout=PATIENCE_S)
    slow.let_go.release()
    slow.offer(Progress(round=2))
    slow.close()
    assert slow._thread is not None and not slow._thread.is_alive() and slow.measured == [1]
