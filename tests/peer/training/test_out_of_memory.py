"""Memory that runs out within a step: the step is repeated with smaller microbatches, and nothing of it is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from codes import raises_code
from torch import Tensor

from swarmtrain.data.batches import Batches
from swarmtrain.errors import RunTimeError
from swarmtrain.model.gpt import GPT, build_model
from swarmtrain.peer.devices import compute as compute_module
from swarmtrain.peer.devices.compute import ComputeDevice, is_out_of_memory
from swarmtrain.peer.lifecycle.stop import StopTraining
from swarmtrain.peer.training import loop as loop_module
from swarmtrain.peer.training.loop import ModelLoop
from swarmtrain.run import RunFile

TEXT = np.frombuffer(b"as much as fits, and not a sequence more at once than that. " * 30, dtype=np.uint8)
BATCH = 8

RUN = RunFile.model_validate(
    {
        "run": {"total_tokens": 16 * BATCH * 6},
        "model": {"context_tokens": 16, "num_layers": 1, "width": 16, "num_heads": 2},
        "inner": {"batch_sequences": BATCH, "learning_rate": 1e-2},
        "merge": {"method": "diloco", "inner_steps": 2, "outer_momentum": 0.5},
    }
)


def of_a_card() -> BaseException:
    return torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")


def of_main_memory() -> BaseException:
    return RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you")


def of_python() -> BaseException:
    return MemoryError()


@dataclass
class Memory:
    """Memory that runs out when more sequences than fit are computed at once, and of whom that was asked."""

    fitting: int
    error: Callable[[], BaseException] = of_main_memory
    asked: list[int] = field(default_factory=list)
    is_backward: bool = False
    """True if the forward pass fits, and the backward pass does not."""
    needs_recomputing: bool = False
    """True if nothing fits unless blocks are computed again in the backward pass."""

    def limit(self, model: GPT) -> GPT:
        right = model.loss

        def loss(batch: Tensor) -> Tensor:
            self.asked.append(len(batch))
            is_over = len(batch) > self.fitting or (self.needs_recomputing and not model.recomputes_blocks)
            if is_over and not self.is_backward:
                raise self.error()
            computed = right(batch)
            if is_over:
                computed.register_hook(self._fail)
            return computed

        model.loss = loss  # type: ignore[method-assign]
        return model

    def _fail(self, gradient: Tensor) -> None:
        raise self.error()


class CountedBatches(Batches):
    """Batches that count how often they were asked for one."""

    drawn = 0

    def next_batch(self) -> Tensor:
        self.drawn += 1
        return super().next_batch()


@dataclass
class Trainer:
    """Loop with that much memory, and what it told."""

    memory: Memory
    microbatch: int = BATCH
    told: list[tuple[int, int]] = field(default_factory=list)
    """Sequences at once before and after; the same number twice if blocks are computed again from then on."""
    loop: ModelLoop = field(init=False)

    def __post_init__(self) -> None:
        self.batches = CountedBatches(
            TEXT, context_tokens=16, batch_sequences=BATCH, run_sha256="ab" * 32, peer_id="me"
        )
        self.loop = ModelLoop(
            RUN,
            self.memory.limit(build_model(RUN.model, 0)),
            self.batches,
            compute=ComputeDevice(microbatch_sequences=self.microbatch),
            told_smaller=self._tell,
        )

    def _tell(self, before: ComputeDevice, now: ComputeDevice) -> None:
        assert now.recomputes == (before.microbatch_sequences == now.microbatch_sequences) and not before.recomputes
        assert now == self.loop.compute
        self.told.append((before.microbatch_sequences, now.microbatch_sequences))

    def gradient(self) -> Tensor:
        """Take a step of which nothing is kept but the gradient, before the clip."""
        found = list[Tensor]()
        step = self.loop.inner.step

        def note(progress: float, scale: float = 1.0) -> Tensor:
            grads = [parameter.grad for parameter in self.loop.model.parameters()]
            found.append(torch.cat([each.flatten().clone() for each in grads if each is not None]))
            return step(progress, scale)

        self.loop.inner.step = note  # type: ignore[method-assign]
        self.loop.take_step(0.5)
        return found[0]


ERRORS = [of_a_card, of_main_memory, of_python]


@pytest.mark.parametrize("is_backward", [False, True])
@pytest.mark.parametrize(
    ("fitting", "microbatch", "told", "asked"),
    [
        (8, 8, [], [8]),
        (5, 8, [(8, 4)], [8, 4, 4]),
        (2, 8, [(8, 4), (4, 2)], [8, 4, 2, 2, 2, 2]),
        (1, 8, [(8, 4), (4, 2), (2, 1)], [8, 4, 2, *[1] * 8]),
        (2, 5, [(5, 3), (3, 2)], [5, 3, 2, 2, 2, 2]),
        (1, 3, [(3, 2), (2, 1)], [3, 2, *[1] * 8]),
    ],
)
def test_a_step_is_repeated_with_half_the_sequences_until_they_fit(
    fitting: int,
    microbatch: int,
    told: list[tuple[int, int]],
    asked: list[int],
    is_backward: bool,
) -> None:
    whole, halved = Trainer(Memory(BATCH)), Trainer(Memory(fitting, is_backward=is_backward), microbatch)
    expected, found = whole.gradient(), halved.gradient()
    assert halved.told == told and halved.memory.asked == asked
    assert halved.batches.drawn == halved.batches.position == 1, "the batch is drawn once"
    assert torch.linalg.vector_norm(found - expected) <= 1e-6 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("is_backward", [False, True])
def test_blocks_are_computed_again_before_a_peer_gives_up(is_backward: bool) -> None:
    whole = Trainer(Memory(BATCH))
    short = Trainer(Memory(BATCH, is_backward=is_backward, needs_recomputing=True), 2)
    expected, found = whole.gradient(), short.gradient()
    assert short.told == [(2, 1), (1, 1)] and short.memory.asked == [2, 1, *[1] * 8]
    assert short.batches.drawn == short.batches.position == 1, "the batch is drawn once"
    assert torch.linalg.vector_norm(found - expected) <= 1e-6 * torch.linalg.vector_norm(expected)
    for step in range(3):
        _both(short, whole, step)
    assert len(short.told) == 2 and short.loop.model.recomputes_blocks, "it goes on so, and tells it once"


def test_a_loop_computes_as_it_is_told_from_the_start() -> None:
    model = build_model(RUN.model, 0)
    loop = Trainer(Memory(BATCH)).loop
    assert not loop.model.recomputes_blocks
    ModelLoop(RUN, model, loop.batches, compute=ComputeDevice(recomputes=True))
    assert model.recomputes_blocks


def _both(trainer: Trainer, plain: Trainer, step: int) -> Any:
    return trainer.loop.take_step(step / 12), plain.loop.take_step(step / 12)


def test_memory_that_runs_out_in_the_middle_of_training_and_of_a_batch_loses_nothing() -> None:
    """Others have taken it meanwhile: the gradients so far of the batch are given up, and none is counted twice."""
    trainer, plain = Trainer(Memory(BATCH), 4), Trainer(Memory(BATCH), 4)
    for step in range(4):
        _both(trainer, plain, step)
    right, number = trainer.loop.model.loss, 0

    def loss(batch: Tensor) -> Tensor:
        nonlocal number
        number += 1
        if number == 2:
            raise of_a_card()
        return right(batch)

    trainer.loop.model.loss = loss  # type: ignore[method-assign]
    expected, found = plain.gradient(), trainer.gradient()
    assert trainer.told == [(4, 2)] and number == 2 + 4 and trainer.batches.drawn == 5
    assert torch.linalg.vector_norm(found - expected) <= 1e-6 * torch.linalg.vector_norm(expected)
    moved = trainer.loop.parameters.read() - plain.loop.parameters.read()
    assert torch.linalg.vector_norm(moved) <= 1e-5 * torch.linalg.vector_norm(plain.loop.parameters.read())


@pytest.mark.parametrize("error", ERRORS)
def test_a_sequence_that_does_not_fit_ends_training_in_one_line(error: Callable[[], BaseException]) -> None:
    trainer = Trainer(Memory(0, error), 4)
    before = trainer.loop.parameters.read()
    with raises_code(
        "out-of-memory", RunTimeError, "16 tokens", "cpu", "pipeline.stages", "model.context_tokens"
    ) as raised:
        trainer.loop.take_step(0.5)
    assert "\n" not in str(raised.value) and trainer.told == [(4, 2), (2, 1), (1, 1)]
    assert torch.equal(trainer.loop.parameters.read(), before)
    assert all(parameter.grad is None for parameter in trainer.loop.model.parameters())


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x4 and 3x8)"),
        ValueError("out of memory of what was said"),
        NotImplementedError("no such operator"),
    ],
)
def test_other_errors_pass_through_at_once(error: Exception) -> None:
    trainer = Trainer(Memory(0, lambda: error))
    with pytest.raises(type(error)) as raised:
        trainer.loop.take_step(0.5)
    assert raised.value is error and trainer.memory.asked == [8] and not trainer.told


def test_moments_that_do_not_fit_end_training_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made by the first step, and no smaller microbatch makes room for them."""

    def fail(tensor: Tensor) -> Tensor:
        raise of_a_card()

    trainer = Trainer(Memory(BATCH))
    before = trainer.loop.parameters.read()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros_like", fail)
        with raises_code("out-of-memory", RunTimeError, "cpu", "pipeline.stages") as raised:
            trainer.loop.take_step(0.5)
    assert "\n" not in str(raised.value) and not trainer.told
    assert torch.equal(trainer.loop.parameters.read(), before)


def test_other_errors_of_the_optimizer_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, error = Trainer(Memory(BATCH)), RuntimeError("CUDA error: unspecified launch failure")

    def fail(progress: float, scale: float = 1.0) -> Tensor:
        raise error

    trainer.loop.inner.step = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError) as raised:
        trainer.loop.take_step(0.5)
    assert raised.value is error


def test_a_stop_is_asked_for_while_a_step_is_repeated() -> None:
    trainer, asked = Trainer(Memory(1)), list[int]()

    def should_stop() -> bool:
        asked.append(len(trainer.memory.asked))
        return len(trainer.memory.asked) == 5

    before = trainer.loop.parameters.read()
    with pytest.raises(StopTraining):
        trainer.loop.take_step(0.5, should_stop)
    assert asked == [0, 1, 2, 3, 4, 5] and torch.equal(trainer.loop.parameters.read(), before)
    assert all(parameter.grad is None for parameter in trainer.loop.model.parameters())


def test_what_torch_keeps_without_using_it_is_given_back_before_the_next_try(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, released = Trainer(Memory(2)), list[tuple[torch.device, int]]()
    monkeypatch.setattr(
        loop_module, "release_cached", lambda device: released.append((device, len(trainer.memory.asked)))
    )
    trainer.loop.take_step(0.5)
    assert released == [(torch.device("cpu"), 1), (torch.device("cpu"), 2)]
    emptied = list[str]()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("cuda"))
    for name in ("cpu", "cuda:0"):
        compute_module.release_cached(torch.device(name))
    assert emptied == ["cuda"]


def test_nothing_of_a_step_that_did_not_fit_is_held_when_it_is_repeated() -> None:
    """An error holds its frames, and those hold activations."""
    import gc
    import weakref

    held = list[weakref.ref[Tensor]]()
    trainer, alive = Trainer(Memory(2, is_backward=True)), list[bool]()
    right = trainer.loop.model.features

    def features(tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        alive.extend(each() is not None for each in held)
        found = right(tokens, positions)
        held.append(weakref.ref(found))
        return found

    trainer.loop.model.features = features  # type: ignore[method-assign]
    gc.disable()
    try:
        trainer.loop.take_step(0.5)
    finally:
        gc.enable()
    assert len(held) == 6 and not any(alive)


def test_words_of_memory_that_ran_out() -> None:
    for error in ERRORS:
        assert is_out_of_memory(error())
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"))
    assert not is_out_of_memory(RuntimeError("an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("out of memory"))
