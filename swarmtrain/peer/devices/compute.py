"""Where and how a loop computes: the device, the precision, and how many steps it may be ahead of the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from swarmtrain.errors import RunTimeError
from swarmtrain.model.four_bits import convert_frozen_layers
from swarmtrain.model.language_model import LanguageModel
from swarmtrain.protocol.devices import Precision

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable with the folder of torch's compiler's cache."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MAX_QUEUED = 2
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class ComputeDevice:
    """Device and precision of a loop. Parameters are fp32 on the device; products are computed in `precision`."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = "fp32"
    microbatch_sequences: int = 0
    """Sequences computed at once; 0: as the run file says."""
    recomputes: bool = False
    """Whether memory is so short that blocks are computed again in the backward pass."""
    others: tuple[torch.device, ...] = ()
    """Further devices, each of which computes a part of every batch (data parallel)."""
    shards: bool = False
    """Whether each device holds a part of the weights only, because no device holds all of them."""
    base_bits: int = 32
    """Bits of each weight of an adapter's frozen model, 32 or 4."""
    memory_share: float = 1.0
    """Share of a card's memory that may be used."""

    @property
    def is_host(self) -> bool:
        """True if the device's memory is main memory."""
        return self.device.type == "cpu"

    @property
    def model_device(self) -> torch.device:
        """Device for the whole model: main memory if each device holds a part of it only."""
        return torch.device("cpu") if self.shards else self.device

    @property
    def num_host_ranks(self) -> int:
        """Number of ranks that share the processor; 1 if the devices are cards."""
        return 1 + len(self.others) if self.is_host else 1

    def placed(self, model: LanguageModel) -> LanguageModel:
        """Move a whole model to the device, its frozen weights in as many bits as they have. Raises UserError."""
        if self.base_bits == 4:
            convert_frozen_layers(model, _DTYPES.get(self.precision, torch.float32))
        return model.to(self.model_device)

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context in which the model is called."""
        return autocast(self.device, self.precision)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """Return the context in which a model is called to compute in `precision` on `device`."""
    return nullcontext() if precision == "fp32" else _autocast(device, precision)


@contextmanager
def _autocast(device: torch.device, precision: Precision) -> Iterator[None]:
    with torch.autocast(device.type, dtype=_DTYPES[precision]):
        yield


def finish(device: torch.device) -> None:
    """Wait until the device has computed everything that this thread has asked of it so far."""
    if device.type == "cuda":
        _recorded(device).synchronize()
    elif device.type == "xpu":
        torch.xpu.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _recorded(device: torch.device) -> torch.cuda.Event:
    """Return an event after what was asked of the device's present stream so far. A thread that waits for it sleeps:
    with `torch.cuda.synchronize` it would keep a core busy, and wait for what other threads have asked since."""
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def release_cached(device: torch.device) -> None:
    """Return to the device what torch keeps of its memory without using it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "xpu":
        torch.xpu.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


class StepQueue:
    """Keeps the trainer at most two steps ahead of its device, so that it counts and times finished steps.

    On a processor each step is finished when its call returns, and the queue stays empty.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: deque[torch.cuda.Event] = deque()

    def step_asked(self) -> None:
        """Note that a step was asked of the device, and wait until at most two are not finished."""
        if self._device.type != "cuda":
            return
        self._events.append(_recorded(self._device))
        while len(self._events) > _MAX_QUEUED:
            self._events.popleft().synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error says that memory ran out, of a device or of the machine."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def does_not_fit(doing: str, device: torch.device) -> RunTimeError:
    """Return the error of a peer whose memory ran out while `doing` something that cannot be done with less."""
    return RunTimeError(
        f"memory ran out while {doing} on {device}: this model does not fit here; use a device with more memory, or "
        "ask for a run with more pipeline.stages, a smaller model or a smaller model.context_tokens",
        code="out-of-memory",
    )


@contextmanager
def enough_memory(doing: str, device: torch.device) -> Iterator[None]:
    """Raise RunTimeError if memory runs out in the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise does_not_fit(doing, device) from error
