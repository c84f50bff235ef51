"""What the archived model is worth while the run goes on: its held-out loss, and a sample of what it writes.

A bootstrap does not train, so it can afford that now and then: in a thread of the lowest priority, with a twentieth of
one processor at most, and only if the model fits into free memory twice. What counts is the processor's time: beside
programs that have it, the lowest priority makes a second of work last ten and more.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from swarmtrain.data.sample_prompt import sample_prompt
from swarmtrain.data.tokens import Tokenizer, tokenizer_from_bytes_untrusted
from swarmtrain.errors import SwarmtrainError
from swarmtrain.events import Event
from swarmtrain.machine_memory import machine_memory
from swarmtrain.model.evaluation import TextLoss
from swarmtrain.model.export import ExportedModel, load_exported
from swarmtrain.model.language_model import LanguageModel
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.peer.checkpoints.export import Sampling, continuation
from swarmtrain.peer.lifecycle.node import eval_event, held_out_loss_of
from swarmtrain.protocol.history import HistoryPoint, TextSample
from swarmtrain.protocol.tokens.progress import Progress

_log = logging.getLogger(__name__)
_REST_OF_WORK = 19.0
"""Seconds of rest for each of the processor's seconds of work."""
_LEAST_REST_S = 2.0
_END_S = 20.0
_NICE = 19
_SAMPLE_TOKENS = 200
_SAMPLE_S = 30.0
"""Longest time that a sample may take; it ends with the token of that moment."""
_TEMPERATURE = 0.7
_MAX_CHARACTERS = 2000
"""Of the prompt, of which the end is shown, and of the text."""
_ROOM = 2.0


def rest_s(processor_s: float) -> float:
    """Return for how long the sampler rests after work that took so much of the processor's time."""
    return max(_LEAST_REST_S, _REST_OF_WORK * processor_s)


class _ClosedError(Exception):
    """Leaves a measurement: the peer ends."""


class ArchiveSampler:
    """Measures what is `offer`ed, the newest first, until `close`.

    `emit` gets an `eval` event for each measurement, a warning if its loss is not finite, `record` its point of the
    run's history, and again with the sample. `files` returns the folder of the run's model files; None if the model is
    built in.
    """

    def __init__(
        self,
        published: PublishedRun,
        archive: Path,
        emit: Callable[[Event], None],
        record: Callable[[HistoryPoint, TextSample | None], None],
        files: Callable[[], Path | None] = lambda: None,
    ) -> None:
        self._published, self._archive, self._emit, self._record, self._files = published, archive, emit, record, files
        self._wanted: Progress | None = None
        self._news = threading.Condition()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._has_diverged = False

    def offer(self, progress: Progress) -> None:
        """Measure the archive of this progress as soon as it can be afforded, unless there is a newer one by then."""
        with self._news:
            self._wanted = progress
            self._news.notify()
        if self._thread is None and not self._closed.is_set():
            self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End what it does, within some steps of the model."""
        self._closed.set()
        with self._news:
            self._news.notify()
        if self._thread is not None:
            self._thread.join(_END_S)

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)  # of this thread alone, on Linux
        while (progress := self._next()) is not None:
            began_s = time.thread_time()
            try:
                self.measure(progress)
            except _ClosedError:
                return
            except (SwarmtrainError, OSError, ValueError, MemoryError) as error:
                _log.info("the archive is not measured: %s", error)
            except Exception:  # the boundary of this thread: the bootstrap goes on without samples
                _log.exception("the archive could not be measured")
                return
            gc.collect()  # models of transformers refer to themselves: it would stay beside the next one
            self._closed.wait(rest_s(time.thread_time() - began_s))

    def _next(self) -> Progress | None:
        with self._news:
            self._news.wait_for(lambda: self._wanted is not None or self._closed.is_set())
            progress, self._wanted = self._wanted, None
            return None if self._closed.is_set() else progress

    def measure(self, progress: Progress) -> None:
        """Measure the archive, which should be that of `progress`, and let it write. Raises UserError if it cannot be
        read, OSError and MemoryError."""
        self._check_room()
        exported = load_exported(self._archive, self._files())
        if exported.run_tokens != progress.run_tokens:
            return  # there is a newer one, which was offered too
        tokenizer = tokenizer_from_bytes_untrusted(self._published.tokenizer, self._published.run.model.vocabulary_size)
        loss = held_out_loss_of(exported.model, self._published, tokenizer, self._check)
        point = held_out_point(progress, loss)
        if loss.is_finite or not self._has_diverged:  # told once, and not with each archive
            self._emit(eval_event(point.round, loss))
        self._has_diverged = not loss.is_finite
        if self._has_diverged:
            return
        self._record(point, None)  # writing takes as long again, and the curve need not wait for it
        self._record(point, self._sampled(exported, tokenizer, progress))

    def _check(self) -> None:
        if self._closed.is_set():
            raise _ClosedError

    def _check_room(self) -> None:
        """Raise MemoryError unless the model fits into the free memory twice."""
        size = sum(path.stat().st_size for path in self._archive.glob("*.safetensors"))
        if _ROOM * size > machine_memory().available_bytes:
            raise MemoryError("too little memory is free")

    def _sampled(self, exported: ExportedModel, tokenizer: Tokenizer, progress: Progress) -> TextSample:
        until_s = time.monotonic() + _SAMPLE_S

        def goes_on() -> bool:
            self._check()
            return time.monotonic() < until_s

        return text_sample(exported.model, self._published, tokenizer, progress, goes_on)


def held_out_point(progress: Progress, loss: TextLoss) -> HistoryPoint:
    """Return the point of a model of this progress, whose held-out loss was measured now."""
    return HistoryPoint(
        run_tokens=progress.run_tokens,
        time=time.time(),
        round=max(0, progress.round - 1),
        held_out_loss=loss.nats_per_byte,
    )


def text_sample(
    model: LanguageModel,
    published: PublishedRun,
    tokenizer: Tokenizer,
    progress: Progress,
    goes_on: Callable[[], bool],
) -> TextSample:
    """Let the run's model of this progress continue a line of the held-out text, for as long as `goes_on` allows."""
    prompt = sample_prompt(published.run, published.held_out, tokenizer, progress.round)
    written = continuation(model, tokenizer, prompt, Sampling(_SAMPLE_TOKENS, _TEMPERATURE, progress.round), goes_on)
    return TextSample(
        prompt=tokenizer.decode(prompt).decode(errors="replace")[-_MAX_CHARACTERS:],
        text=written.decode(errors="replace")[:_MAX_CHARACTERS],
        round=progress.round,
        run_tokens=progress.run_tokens,
        time=time.time(),
    )
