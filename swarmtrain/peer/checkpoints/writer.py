"""Checkpoint writer on a thread of its own; training waits only while the moments are copied.

Theta and momentum are new tensors after every outer step and nobody writes into them, so they need no copy. If the disk
is slower than the rounds, the newest checkpoint replaces the one that waits. A full or failing disk never ends
training: it causes a warning, repeated every five minutes, and one message when writing works again.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from swarmtrain.algorithm.inner import LentMoments
from swarmtrain.events import Event, WarningEvent
from swarmtrain.peer.checkpoints.checkpoint import Checkpoint, load_newest, save
from swarmtrain.peer.checkpoints.files import CheckpointFolder, Written
from swarmtrain.peer.lifecycle.process import trim_heap
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile

_log = logging.getLogger(__name__)
_REPEAT_S = 300.0
_NICER_BY = 5
MOST_COPIED = 4_000_000
"""Moments of at most this many parameters (32 MB) are copied for the writer; larger ones are lent.

Between two rounds nobody changes them before the first step's gradient is there, and that takes longer the more there
are.
"""


@dataclass
class Checkpointer:
    """Accepts checkpoints from one thread and writes them on another. Any thread may read `last` and call `flush`."""

    folder: CheckpointFolder
    emit: Callable[[Event], None]
    now: Callable[[], float] = time.monotonic
    last: Written | None = None
    """Newest checkpoint on the disk, if one was written or found."""
    durable: Progress | None = None
    """Progress of the run that `last` holds."""
    _change: threading.Condition = field(default_factory=threading.Condition)
    _waiting: Checkpoint | None = None
    _beside: Callable[[], None] | None = None
    _num_offered: int = 0
    _done: int = 0
    """Number of the newest `offer` whose writing has ended, successfully or not."""
    _written: int = 0
    """Number of the newest `offer` that is on the disk."""
    _closed: bool = False
    _thread: threading.Thread | None = None
    _rooms: list[Tensor] = field(default_factory=list)
    _num_to_prepare: int = 0
    _warned_s: float | None = None
    _failing: bool = False

    # ------------------------------------------------------------- the trainer's side

    def load(self, run: RunFile, num_parameters: int) -> Checkpoint | None:
        """Return the newest checkpoint that is whole, or None; emit a warning for each that cannot be used."""
        found = load_newest(
            self.folder,
            run,
            num_parameters,
            lambda message: self.emit(WarningEvent(message=message, code="checkpoint-unusable")),
        )
        if found is None:
            return None
        kept, self.last = found
        self.durable = kept.progress
        return kept

    def prepare(self, num_parameters: int) -> None:
        """Allocate memory for moments in advance: filling fresh memory takes several times as long as filling used
        memory.
        """
        if num_parameters > MOST_COPIED:
            return
        with self._change:
            self._num_to_prepare = num_parameters
            self._start()
            self._change.notify_all()

    def room(self, num_parameters: int) -> Tensor | None:
        """Return a tensor (2, P) to copy moments into, for the next `offer`; None if they are too large and must be
        lent.

        A checkpoint that still waits is given up for its memory.
        """
        with self._change:
            while self._num_to_prepare:
                self._change.wait()
            if self._waiting is not None:
                self._recycle(self._waiting)
                self._waiting = None
            if self._rooms:
                return self._rooms.pop()
        if num_parameters > MOST_COPIED:
            return None
        return torch.empty(2, num_parameters)

    def offer(self, checkpoint: Checkpoint, beside: Callable[[], None] | None = None) -> None:
        """Write `checkpoint` when the writer is free, unless a newer one comes first. Returns at once.

        Afterwards the writing thread calls `beside`, for small files kept with it; that may raise OSError.
        """
        with self._change:
            if self._waiting is not None:
                self._recycle(self._waiting)
            self._waiting, self._beside = checkpoint, beside
            self._num_offered += 1
            self._start()
            self._change.notify_all()

    def flush(self, limit_s: float) -> bool:
        """Wait at most `limit_s` seconds until the last offer, or a newer one, is on the disk; return whether it is."""
        with self._change:
            asked = self._num_offered
            self._change.wait_for(lambda: self._done >= asked or self._closed, limit_s)
            return self._written >= asked

    def close(self, limit_s: float) -> bool:
        """Flush, then end the thread. A checkpoint not finished by then is left unfinished, which does no harm."""
        done = self.flush(limit_s)
        with self._change:
            self._closed = True
            self._change.notify_all()
        return done

    # ------------------------------------------------------------- the writer's side

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
            self._thread.start()

    def _recycle(self, checkpoint: Checkpoint) -> None:
        if checkpoint.own is None:
            return
        moments = checkpoint.own.moments
        if isinstance(moments, LentMoments):
            moments.forget()
        elif len(self._rooms) < 2:
            self._rooms.append(moments.vectors)

    def _work(self) -> None:
        """Write what is offered until closed. A thread that has read lent moments ends after that checkpoint.

        The trainer's first step waits while lent moments are read, so the thread lowers its priority only after that;
        and since a thread cannot raise its priority again, the next checkpoint gets a new thread.
        """
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._closed or self._num_to_prepare)
                if self._closed:
                    return
                num_parameters = self._num_to_prepare
                if not num_parameters:
                    checkpoint, self._waiting, number = self._waiting, None, self._num_offered
                    beside = self._beside
            if num_parameters:
                self._prepare(num_parameters)
                continue
            assert checkpoint is not None
            is_written = self._write(checkpoint, beside)
            if checkpoint.state.size > MOST_COPIED:  # done here, beside the trainer, once a round
                trim_heap()
            with self._change:
                self._recycle(checkpoint)
                self._done = number
                self._written = number if is_written else self._written
                self._change.notify_all()
                if checkpoint.own is not None and isinstance(checkpoint.own.moments, LentMoments):
                    self._thread = None
                    if self._waiting is not None or self._num_to_prepare:
                        self._start()
                    return
            checkpoint = None  # else it would be kept in memory until the next one

    def _prepare(self, num_parameters: int) -> None:
        _be_nice()
        rooms = []
        try:
            # numpy fills the memory in this thread alone; torch would start a team of threads for it.
            rooms.append(torch.from_numpy(np.full((2, num_parameters), np.float32(0))))
        except MemoryError:
            _log.warning("not enough memory to copy the optimizer moments of %d parameters in advance", num_parameters)
        with self._change:
            self._rooms += rooms
            self._num_to_prepare = 0
            self._change.notify_all()

    def _write(self, checkpoint: Checkpoint, beside: Callable[[], None] | None) -> bool:
        try:
            self.last = save(self.folder, checkpoint, _be_nice)
            self.durable = checkpoint.progress
        except OSError as error:
            self._failing = True
            self._complain(self._in_words(error))
        except Exception as error:  # the boundary of this thread: training must not end because of it
            _log.exception("writing a checkpoint failed")
            self._failing = True
            self._complain(f"no checkpoint could be written: {error}")
        else:
            if self._failing:
                self._failing, self._warned_s = False, None
                self.emit(
                    WarningEvent(
                        message=f"checkpoints are written to {self.folder.path} again", code="checkpoints-again"
                    )
                )
            if beside is not None:
                _write_beside(beside)
            return True
        return False

    def _in_words(self, error: OSError) -> str:
        where = self.folder.path
        kept = "training goes on, but a restart would begin at an older checkpoint"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk is full, no checkpoint could be written to {where}: {kept}; make room"
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return f"no checkpoint could be written, {where} is read-only: {kept}; make it writable"
        return f"no checkpoint could be written to {where} ({error.strerror}): {kept}; look after the disk"

    def _complain(self, message: str) -> None:
        _log.info("%s", message)
        now = self.now()
        if self._warned_s is None or now >= self._warned_s + _REPEAT_S:
            self._warned_s = now
            self.emit(WarningEvent(message=message, code="checkpoint-not-written"))


def _write_beside(write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:  # the checkpoint is on the disk all the same
        _log.info("a file beside the checkpoint is not written: %s", error)
    except Exception:  # the boundary of this thread
        _log.exception("writing a file beside a checkpoint failed")


def _be_nice() -> None:
    """Lower the priority of this thread a little, so that it yields to the trainer (Linux: niceness is per thread).

    Only by 5: it sometimes holds Python's lock, which the trainer must not wait for.
    """
    if sys.platform == "linux":
        try:
            thread, usual = threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, os.getpid())
            os.setpriority(os.PRIO_PROCESS, thread, usual + _NICER_BY)
        except OSError as error:
            _log.debug("niceness: %s", error)
