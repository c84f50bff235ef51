"""Nothing in an inner step waits for the device: counted on the processor, and on devices whose numbers nobody reads.

Those are torch's `meta` tensors, which have shapes and no numbers: to read one raises, and so does to mix them with
others. `CopiesAsOnes` lets copies of them come to main memory all the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from device_reads import DeviceReads
from lone_exchange import lone_exchange
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swarmtrain.algorithm.inner import LentMoments, Moments
from swarmtrain.algorithm.outer import OuterConstants, OuterState
from swarmtrain.data.batches import Batches
from swarmtrain.model.gpt import GPT, build_model
from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.peer.devices.device_parameters import DeviceParameters
from swarmtrain.peer.merging.updates import LocalUpdate, OuterUpdate
from swarmtrain.peer.training import session as session_module
from swarmtrain.peer.training.loop import InnerStep, ModelLoop
from swarmtrain.peer.training.session import RoundReport, Session, Start
from swarmtrain.protocol.devices import Precision
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile

TEXT = np.frombuffer(b"it is the reading of a number that makes a trainer wait for its device. " * 20, dtype=np.uint8)


def run_file(method: str = "diloco", steps: int = 6) -> RunFile:
    merge: dict[str, Any] = {"method": method, "inner_steps": 2, "outer_momentum": 0.5, "momentum_ramp_rounds": 0}
    if method == "gossip":
        merge |= {"fragments": 2, "init": "common"}
    return RunFile.model_validate(
        {
            "run": {"total_tokens": 64 * steps},
            "model": {"context_tokens": 16, "num_layers": 2, "width": 16, "num_heads": 2},
            "data": {"source": "text", "paths": ("x",)},
            "inner": {"batch_sequences": 4},
            "merge": merge,
        }
    )


def batches() -> Batches:
    return Batches(TEXT, context_tokens=16, batch_sequences=4, run_sha256="ab" * 32, peer_id="me")


def loop_on(device: str, precision: Precision = "fp32", microbatch: int = 4, model: GPT | None = None) -> ModelLoop:
    run = run_file()
    model = build_model(run.model, 0).to(device) if model is None else model
    return ModelLoop(run, model, batches(), compute=ComputeDevice(torch.device(device), precision, microbatch))


class CopiesAsOnes(TorchDispatchMode):
    """Device of `meta` tensors of which copies in main memory are ones."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, operator = kwargs or {}, func.overloadpacket
        if operator is torch.ops.aten.copy_ and (args[0].is_cpu, args[1].is_meta) == (True, True):
            return args[0].fill_(1.0)
        if operator is torch.ops.aten._to_copy and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


# ---------------------------------------------------------------- the test itself


@pytest.mark.parametrize(
    "read",
    [
        float,
        int,
        bool,
        Tensor.item,
        Tensor.tolist,
        Tensor.numpy,
        np.asarray,
        lambda x: torch.equal(x, x),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x.isnan().any(), 0.0) if x.isnan().any() else x,
        torch.nonzero,
        lambda x: [each for each in torch.full((2,), 0.5) if each > x],
    ],
)
def test_a_number_that_is_read_is_seen(read: Callable[[Tensor], Any]) -> None:
    scalar = torch.full((), 0.25)
    with DeviceReads() as reads:
        scalar.mul_(2.0).clamp_(0, 1).isfinite().logical_not_()
        assert not reads.found, "this is arithmetic"
        read(scalar)
    assert reads.found and not reads.sent
    read(scalar)
    assert len(reads.found) <= 2, "what is read afterwards does not count"


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("microbatch", [4, 2, 1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_on_the_processor_reads_nothing(precision: Precision, microbatch: int) -> None:
    loop = loop_on("cpu", precision, microbatch)
    with DeviceReads() as reads:
        done = [loop.take_step(step / 10) for step in range(3)]
    assert not reads.found and not reads.sent
    assert all(isinstance(each.loss, Tensor) and isinstance(each.grad_norm, Tensor) for each in done)
    assert all(float(each.loss) > 0 and float(each.grad_norm) > 0 for each in done)


class _PlainCompute(ComputeDevice):
    """Device of which torch has no autocast."""

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.mark.parametrize("microbatch", [4, 2, 1])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_on_a_device_only_sends_it_the_batch(precision: Precision, microbatch: int) -> None:
    """Reading a `meta` tensor raises, so all that the optimizer and the scale decide is decided there."""
    run = run_file()
    model = build_model(run.model, 0).to("meta")
    loop = ModelLoop(run, model, batches(), compute=_PlainCompute(torch.device("meta"), precision, microbatch))
    assert isinstance(loop.parameters, DeviceParameters)
    for _ in range(3):
        with DeviceReads() as reads:
            done = loop.take_step(0.5)
        assert not reads.found
        assert reads.sent == ["aten._to_copy.default cpu -> meta"] * (4 // microbatch)
        assert isinstance(done.loss, Tensor) and isinstance(done.grad_norm, Tensor)
        assert done.loss.device.type == done.grad_norm.device.type == "meta"


def test_moments_are_read_at_once_and_not_parameter_by_parameter() -> None:
    loop = loop_on("meta")
    loop.take_step(0.5)
    number = len(loop.parameters.named)
    with CopiesAsOnes():
        with DeviceReads() as reads:
            loop.inner.copy_moments(torch.empty(2, sum(each.numel() for each in loop.parameters.named.values())))
        assert len(reads.found) == 2 * number + 1, "the counts of steps are one number more"
        with DeviceReads() as reads:
            loop.kept(None)
        assert "_local_scalar_dense" not in str(reads.found) and len(reads.found) == 2 * number + 1


# ---------------------------------------------------------------- whole rounds


def watched(loop: ModelLoop) -> list[InnerStep]:
    """Let the loop's steps be refused if they read anything; returns those that it has taken."""
    step, taken = loop.take_step, list[InnerStep]()

    def watched_step(progress: float, should_stop: Callable[[], bool] = lambda: False) -> InnerStep:
        with DeviceReads() as reads:
            taken.append(step(progress, should_stop))
        assert not reads.found, reads.found
        return taken[-1]

    loop.take_step = watched_step  # type: ignore[method-assign]
    return taken


@pytest.fixture
def numbers_read(monkeypatch: pytest.MonkeyPatch) -> list[list[float | Tensor]]:
    """Keep what sessions read, and let them read nothing but 1.0."""
    read = list[list[float | Tensor]]()

    def note(numbers: Sequence[float | Tensor]) -> list[float]:
        read.append(list(numbers))
        return [1.0 for _ in numbers]

    monkeypatch.setattr(session_module, "_read", note)
    return read


def test_rounds_read_losses_and_norms_once_at_their_end(numbers_read: list[list[float | Tensor]]) -> None:
    run, loop, reports = run_file(), loop_on("cpu"), list[RoundReport]()
    taken = watched(loop)
    session = Session(
        run=run, parameters=loop.parameters, loop=loop, exchange=lone_exchange(run, 2, 6), report=reports.append
    )
    told = list[int]()
    while (ahead := session.next_step()) is not None:
        with DeviceReads() as reads:
            loop.train_step(session, ahead)
        told.append(len(numbers_read))
        assert len(taken) % 2 == 0 or not reads.found, "within a round"
    assert len(reports) == 3 and told == [0, 2, 2, 4, 4, 6]
    for number in range(3):
        losses, norms = numbers_read[2 * number : 2 * number + 2]
        assert [id(each) for each in losses] == [id(each.loss) for each in taken[2 * number : 2 * number + 2]]
        assert [id(each) for each in norms] == [id(each.grad_norm) for each in taken[2 * number : 2 * number + 2]]


def test_a_rounds_numbers_are_read_all_at_once() -> None:
    numbers = [torch.tensor(1.5), 2.0, torch.tensor(3.5, dtype=torch.float64), float("inf")]
    with DeviceReads() as reads:
        assert session_module._read(numbers) == [1.5, 2.0, 3.5, float("inf")]
    assert reads.found == ["tolist"]
    assert session_module._read([2.0]) == [2.0] and session_module._read([]) == []


class _Moved(OuterUpdate):
    """Merge that moves a fragment's weights, and reads nothing."""

    def __init__(self, *, is_whole: bool) -> None:
        self.is_whole = is_whole  # type: ignore[misc]

    def next_state(
        self, state: OuterState, own: LocalUpdate, fragment: int, constants: OuterConstants, rule: str
    ) -> OuterState:
        gradient = own.gradient if self.is_whole else own.gradient_of(fragment)
        return OuterState(state.theta - 0.5 * gradient, state.momentum)

    def next_progress(self, progress: Progress) -> Progress:
        return Progress(round=progress.round + 1, run_tokens=progress.run_tokens + 128)

    def told(self, before: Sequence[Any]) -> Any:
        return {}


class _Partners:
    """Exchange that keeps what is published, and whose merges read nothing."""

    def __init__(self, num_fragments: int) -> None:
        self.num_fragments, self.published = num_fragments, list[LocalUpdate]()
        self.states = list[OuterState]()

    def hold(self, states: Sequence[OuterState]) -> None:
        self.states += states

    def merged(self, fragment: int, state: OuterState) -> None:
        self.states.append(state)

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        return Start(inner_steps=2, num_peers=1, num_parts=2, num_fragments=self.num_fragments)

    def step_done(self, inner_steps_done: int) -> None:
        pass

    def publish(self, contribution: LocalUpdate) -> None:
        self.published.append(contribution)

    def collect(self, fragment: int = 0) -> OuterUpdate:
        return _Moved(is_whole=self.num_fragments == 1)


@pytest.mark.parametrize(("method", "num_fragments"), [("diloco", 1), ("gossip", 2)])
def test_what_a_session_publishes_and_keeps_of_a_device_is_in_main_memory(
    numbers_read: list[list[float | Tensor]], method: str, num_fragments: int
) -> None:
    run, exchange, reports = run_file(method), _Partners(num_fragments), list[RoundReport]()
    model = build_model(run.model, 0).to("meta")
    loop = ModelLoop(run, model, batches(), compute=ComputeDevice(torch.device("meta"), "fp32", 2))
    watched(loop)
    with CopiesAsOnes():
        session = Session(run=run, parameters=loop.parameters, loop=loop, exchange=exchange, report=reports.append)
        assert loop.train(session) == "total_tokens" and len(reports) == 3 and len(numbers_read) == 6
        published = list[Tensor]()
        for each in exchange.published:
            lent = [each.gradient_of(fragment) for fragment in range(num_fragments)] if each.lent else [each.gradient]
            published += [*lent, *each.thetas, *([] if each.reached is None else [each.reached])]
        for state in (*exchange.states, session.replica.state):
            published += [state.theta, state.momentum]
        assert len(published) > 12
        assert {(each.device.type, each.dtype) for each in published} == {("cpu", torch.float32)}
        weights = list(loop.parameters.named.values())
        assert {each.device.type for each in weights} == {"meta"}, "and training is not"
        room = torch.empty(2, sum(each.numel() for each in weights))
        moments = loop.inner.copy_moments(room)
        assert isinstance(moments, Moments) and moments.vectors is room and moments.steps.is_cpu
        for given in (None, room):
            lent_moments = loop.kept(given).moments
            assert isinstance(lent_moments, LentMoments) and lent_moments.steps.is_cpu
            assert all(piece.is_cpu for piece in lent_moments.read())
        loop.resume(dataclasses.replace(loop.kept(room), moments=moments))
        loop.take_step(0.5)
        session.end()
