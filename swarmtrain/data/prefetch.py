"""Batches drawn ahead by a thread while the trainer takes its step: the source may be slow, and the trainer does not
wait for it.

The draws are those of the source alone, in its order, whenever and from whichever shard they are taken.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from swarmtrain.data.batches import BatchSource
from swarmtrain.data.mixture import MixedBatches

_log = logging.getLogger(__name__)
_MOST_AHEAD = 2
_POLL_INTERVAL_S = 0.1


def prefetched(source: MixedBatches, device: torch.device, check: Callable[[], None] = lambda: None) -> BatchSource:
    """Return `source` with its batches drawn ahead, where that gains anything; see `PrefetchedBatches` for `check`.

    It does for a stream, which is read over a network and encoded, and for a device, which computes while the processor
    has nothing else to do; CUDA's copies batches from pinned memory by itself. On a processor the windows of a corpus
    in memory take a thousandth of a step, and a thread would only take that time at another moment.
    """
    if device.type == "cpu" and source.is_in_memory:
        return source
    return PrefetchedBatches(source, Tensor.pin_memory if device.type == "cuda" else _as_it_is, check)


def _as_it_is(batch: Tensor) -> Tensor:
    return batch


class PrefetchedBatches:
    """Source whose next batches are drawn by a thread, two ahead at most; the thread begins with the first batch.

    One thread at a time may call it. An error of the source is raised by the `next_batch` that would have met it.
    """

    def __init__(
        self,
        source: MixedBatches,
        prepare: Callable[[Tensor], Tensor] = _as_it_is,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`prepare` is applied to each batch, in the thread. `check` is called several times a second while the caller
        waits, and may raise; the batch is then returned by the next call.
        """
        self._source, self._prepare, self._check = source, prepare, check
        self._position = source.position
        self._shard: int | None = None
        self._drawn: deque[Tensor] = deque()
        self._error: BaseException | None = None
        """Error of the draw after those in `_drawn`."""
        self._is_drawing = self._is_closed = False
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def position(self) -> int:
        """Number of batches that were taken, however many are drawn. See `BatchSource`."""
        return self._position

    @property
    def num_shards(self) -> int:
        """Number of shards that `use_shard` can choose from; 0 if there are none. See `BatchSource`."""
        return self._source.num_shards

    def use_shard(self, shard: int) -> None:
        """Draw from this shard from now on; what was drawn ahead from another one is drawn again. See `BatchSource`."""
        with self._change:
            if shard == self._shard:
                return
            self._wait_until(lambda: not self._is_drawing)
            self._source.use_shard(shard)
            self._source.rewind(self._position)
            self._shard, self._error = shard, None
            self._drawn.clear()
            self._change.notify_all()

    def next_batch(self) -> Tensor:
        """Return the next batch, int64 (B, T + 1). See `BatchSource`."""
        with self._change:
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._draw, name="batches", daemon=True)
                self._thread.start()
            self._wait_until(lambda: bool(self._drawn) or self._error is not None or self._is_closed)
            if self._drawn:
                self._position += 1
                self._change.notify_all()
                return self._drawn.popleft()
            raise RuntimeError("these batches are closed") if self._error is None else self._error

    def close(self, limit_s: float = 1.0) -> None:
        """End the thread; one that waits for its source ends when that has answered, later than `limit_s` perhaps."""
        with self._change:
            self._is_closed = True
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join(limit_s)

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            if not self._change.wait(_POLL_INTERVAL_S):
                self._check()

    def _draw(self) -> None:
        """Draw batches until closed."""
        while True:
            with self._change:
                self._change.wait_for(
                    lambda: self._is_closed or (self._error is None and len(self._drawn) < _MOST_AHEAD)
                )
                if self._is_closed:
                    return
                self._is_drawing = True
            batch, error = self._drawn_now()
            with self._change:
                self._is_drawing, self._error = False, error
                if batch is not None:
                    self._drawn.append(batch)
                self._change.notify_all()

    def _drawn_now(self) -> tuple[Tensor | None, BaseException | None]:
        """Return the source's next batch or its error."""
        try:
            return self._prepare(self._source.next_batch()), None
        except BaseException as error:  # a library's panic is no Exception
            _log.debug("the next batch could not be drawn, which the trainer will hear: %r", error)
            return None, error
