"""Stages on a device: what crosses into main memory and when, what waits for it, and pipelines of unlike peers.

The device is the processor, or torch's `meta`, whose numbers nobody can read.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from codes import raises_code
from device_reads import DeviceReads
from patience import PATIENCE_S
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swarmtrain.algorithm.inner import InnerConstants, InnerOptimizer
from swarmtrain.errors import RunTimeError
from swarmtrain.model.stage_work import DeviceStageWork
from swarmtrain.model.stages import build_stage, stage_shapes
from swarmtrain.network.codec import ActivationCodec
from swarmtrain.peer.devices import host_copies
from swarmtrain.peer.devices.host_copies import HostCopier, HostCopy
from swarmtrain.peer.pipeline import stage_loop
from swarmtrain.peer.pipeline.driver import Tail
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue, Task
from swarmtrain.peer.pipeline.stage_loop import StageLoop, StageTransfer
from swarmtrain.peer.pipeline.stage_replica import StageReplica
from swarmtrain.protocol.pipeline.ledger import Key, Kind, LedgerLimits, StageLedger, TakeStep
from swarmtrain.run_model import ModelSection

SECTION = ModelSection(context_tokens=16, num_layers=2, width=16, num_heads=2)
CONSTANTS = InnerConstants(
    learning_rate=1e-2,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    gradient_clip=1.0,
    warmup_fraction=0.1,
    floor_fraction=0.1,
)
CPU, META = torch.device("cpu"), torch.device("meta")
SEQUENCES, MICROBATCHES, BATCHES = 4, 4, 14
TOKENS = SEQUENCES * SECTION.context_tokens


def microbatch(number: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets that count upwards by one or two."""
    generator = torch.Generator().manual_seed(number)
    starts, steps = torch.randint(0, 40, (2, SEQUENCES, 1), generator=generator)
    tokens = starts + (1 + steps % 2) * torch.arange(SECTION.context_tokens + 1)
    return tokens[:, :-1], tokens[:, 1:]


# ---------------------------------------------------------------- what crosses, and what waits for it


class Crossing:
    """Stage of one peer on a device, which an asker in this thread asks, and its loop piece by piece."""

    def __init__(self, stage: int, device: torch.device = CPU) -> None:
        self.queue = StageRequestQueue(
            StageLedger(LedgerLimits(batch_tokens=2 * TOKENS)), lambda: 0.0, StageTransfer(device)
        )
        part = build_stage(stage_shapes(SECTION, (1,))[stage], 5).to(device)
        inner = InnerOptimizer(part.named_parameters(), CONSTANTS)
        self.loop = StageLoop(self.queue, DeviceStageWork(part), inner, 2 * TOKENS)

    def ask(self, number: int, kind: Kind, payload: Any) -> asyncio.Task[Any]:
        return asyncio.create_task(self.queue.ask(Key("d", number, 0), kind, TOKENS, payload))

    async def compute(self) -> None:
        """Let the loop compute the next piece of work, and nobody wait for a copy of it."""
        await asyncio.sleep(0)
        what = self.queue.next()
        assert isinstance(what, Task)
        self.loop._answer(what)


def test_an_answer_is_a_copy_which_whoever_asked_waits_for_and_not_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    copied, computed = threading.Event(), list[Tensor]()
    copy_at_once = HostCopier.copy

    def wait_ready() -> None:
        assert copied.wait(PATIENCE_S)

    def copy(copier: HostCopier, tensors: Sequence[Tensor]) -> HostCopy:
        computed.extend(tensors)
        return HostCopy(copy_at_once(copier, tensors).values, wait_ready)

    monkeypatch.setattr(HostCopier, "copy", copy)
    finished = list[torch.device]()
    monkeypatch.setattr(stage_loop, "finish", finished.append)

    async def live() -> None:
        first, last, (x, targets) = Crossing(0), Crossing(1), microbatch(0)
        asking = [first.ask(0, "forward", x), first.ask(1, "forward", x)]
        for _ in asking:
            await first.compute()
        tail = last.ask(0, "tail", (torch.ones(SEQUENCES, 16, 16), targets))
        await last.compute()
        again = first.ask(0, "forward", x)
        await asyncio.sleep(0.01)
        assert not any(each.done() for each in (*asking, tail, again)) and len(computed) == 3
        assert finished == [CPU] * 3, "what is counted as done is done"
        copied.set()
        out, other, repeated = await asyncio.gather(*asking, again)
        answer = await tail
        assert torch.equal(out, other) and torch.equal(out, repeated)
        assert isinstance(answer, Tail) and answer.loss > 0 and answer.gradient.shape == (SEQUENCES, 16, 16)
        for mine, there in zip((out, answer.gradient), (computed[0], computed[2]), strict=True):
            assert torch.equal(mine, there) and mine.data_ptr() != there.data_ptr() and not mine.requires_grad
            ActivationCodec("fp32").encode(mine)
        backward = first.ask(0, "backward", answer.gradient)
        await first.compute()
        assert await backward is None, "the first stage has nobody to send it to"

    asyncio.run(live())


class OnesOfMeta(TorchDispatchMode):
    """Device of `meta` tensors of which copies in main memory are ones, and so are numbers that are read."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        operator = func.overloadpacket
        if operator is torch.ops.aten.copy_ and (args[0].is_cpu, args[1].is_meta) == (True, True):
            return args[0].fill_(1.0)
        if operator is torch.ops.aten._local_scalar_dense and args[0].is_meta:
            return 1.0
        return func(*args, **(kwargs or {}))


_READ, _COPY = "aten._local_scalar_dense.default", "aten.copy_.default meta -> cpu"


def test_a_stage_makes_its_device_wait_once_for_each_gradient() -> None:
    """Its norm is read before the gradient counts, and then the loss. Copies are asked for, see `HostCopier`."""

    async def live() -> None:
        first, last, (x, targets) = Crossing(0, META), Crossing(1, META), microbatch(0)

        async def reads_of(stage: Crossing, kind: Kind, payload: Any) -> tuple[list[str], Any]:
            asking = stage.ask(0, kind, payload)
            with OnesOfMeta(), DeviceReads() as reads:
                await stage.compute()
            assert all(each.endswith("cpu -> meta") for each in reads.sent)
            return reads.found, await asking

        found, out = await reads_of(first, "forward", x)
        assert found == [_COPY]
        found, tail = await reads_of(last, "tail", (out, targets))
        assert found == [_READ, _READ, _COPY]
        found, _ = await reads_of(first, "backward", tail.gradient)
        assert found == [_READ]
        assert out.is_cpu and tail.gradient.is_cpu
        with OnesOfMeta(), DeviceReads() as reads:
            first.loop._step(TakeStep(0, TOKENS, 1.0, ()), 0.5, 1.0)
        assert not reads.found and not reads.sent

    asyncio.run(live())


def test_what_is_on_a_device_is_refused_by_the_codec() -> None:
    with pytest.raises((ValueError, RuntimeError)):
        ActivationCodec("fp32").encode(torch.ones(2, 3, device=META))


def test_what_arrives_is_pinned_by_another_thread_and_sent_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, threads = list[str](), list[int]()
    to = Tensor.to

    def pin(tensor: Tensor) -> Tensor:
        calls.append("pins")
        threads.append(threading.get_ident())
        return tensor

    def sent(tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        calls.append(f"sends to {device}, waits: {not non_blocking}")
        return to(tensor, CPU)

    monkeypatch.setattr(host_copies.torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: tensor.dtype is torch.int64)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    transfer = StageTransfer(torch.device("cuda:0"))
    x, targets = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64)
    payload = asyncio.run(transfer.pinned((x, targets)))
    assert payload == (x, targets) and calls == ["pins"] and threads != [threading.get_ident()]
    monkeypatch.setattr(Tensor, "to", sent)
    transfer.to_device(payload)
    assert calls[1:] == ["sends to cuda:0, waits: False"] * 2


# ---------------------------------------------------------------- memory


def test_a_stage_whose_memory_runs_out_ends_with_one_line() -> None:
    def out_of_memory(session: Any) -> str:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    held: Any = StageReplica.__new__(StageReplica)
    held.number, held.site = 1, SimpleNamespace(compute=SimpleNamespace(device=torch.device("cuda:0")))
    held.trainer, held.session = SimpleNamespace(train=out_of_memory), None
    held.training = Future()
    held._train()
    with raises_code("out-of-memory", RunTimeError, "training stage 1 on cuda:0") as caught:
        _ = held.is_done
    assert "\n" not in str(caught.value)
