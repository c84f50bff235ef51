"""Parameters on a device, with the processor as the device: loans, merges as differences, and whole sessions against
those of parameters in main memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from swarmtrain.algorithm.fragments import Fragment, fragments_of
from swarmtrain.algorithm.gossip import layout_of
from swarmtrain.algorithm.inner import InnerOptimizer
from swarmtrain.peer.devices.device_parameters import DeviceParameters
from swarmtrain.peer.training.loop import inner_constants
from swarmtrain.peer.training.parameters import ParameterSource
from swarmtrain.run import RunFile


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) for name, shape in [("a", (3, 4)), ("b", (4,)), ("c", (2, 6))]
    }


def fragments() -> tuple[Fragment, ...]:
    """Return two fragments of the tensors."""
    both = fragments_of(layout_of([(3, 4), (4,), (2, 6)]), 2)
    assert len(both) == 2
    return both


def flat(named: dict[str, Tensor], fragment: Fragment | None = None) -> Tensor:
    picked = list(named.values()) if fragment is None else fragment.pick(list(named.values()))
    return torch.cat([each.reshape(-1) for each in picked]).clone()


def step(parameters: ParameterSource, by: float) -> None:
    """Take a step as an optimizer does."""
    parameters.take_back()
    for number, tensor in enumerate(parameters.named.values()):
        tensor.add_(by * (number + 1))


# ---------------------------------------------------------------- loans


def test_what_is_read_is_a_copy_that_stays() -> None:
    named = tensors()
    parameters, before = DeviceParameters(named.items()), flat(named)
    read = parameters.read()
    step(parameters, 0.5)
    assert read.dtype is torch.float32 and torch.equal(read, before) and not torch.equal(parameters.read(), before)


def test_a_loan_is_not_changed_by_later_steps() -> None:
    named = tensors()
    parameters = DeviceParameters(named.items())
    first, second = fragments()
    theta, before = torch.ones(first.layout.size), flat(named, first)
    asked, not_asked = parameters.lend(first, theta), parameters.lend(second, torch.zeros(second.layout.size))
    gradient, reached = asked.gradient().clone(), flat(named, second)
    for _ in range(3):
        step(parameters, 0.5)
    parameters.write(torch.full_like(theta, 7.0), first)
    parameters.write(torch.full((second.layout.size,), 7.0), second)
    assert torch.equal(asked.gradient(), gradient) and torch.equal(gradient, theta - before)
    assert torch.equal(not_asked.gradient(), -reached), "nobody had asked for it before"


def test_a_loan_is_read_by_several_threads_while_steps_are_taken() -> None:
    named = tensors()
    parameters = DeviceParameters(named.items())
    (fragment, _), found = fragments(), list[Tensor]()
    lent, before = parameters.lend(fragment, torch.zeros(fragment.layout.size)), flat(named, fragment)
    threads = [threading.Thread(target=lambda: found.append(lent.gradient())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        step(parameters, 0.25)
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(each is found[0] for each in found) and torch.equal(found[0], -before)


# ---------------------------------------------------------------- merges


def test_a_merge_with_no_step_since_the_loan_sets_the_weights_to_the_bit() -> None:
    named = tensors()
    parameters = DeviceParameters(named.items())
    first, second = fragments()
    untouched, theta = flat(named, second), 1e3 * torch.randn(first.layout.size)
    parameters.lend(first, torch.zeros(first.layout.size)).gradient()
    parameters.write(theta, first)
    assert torch.equal(flat(named, first), theta) and torch.equal(flat(named, second), untouched)


@pytest.mark.parametrize("steps_since", [1, 2, 5])
def test_a_merge_after_steps_keeps_those_steps(steps_since: int) -> None:
    """w += theta - lent, against that line in plain words, over rounds of two fragments."""
    named, plain = tensors(), tensors()
    parameters, generator = DeviceParameters(named.items()), torch.Generator().manual_seed(1)
    for _ in range(4):
        lent = {name: tensor.clone() for name, tensor in plain.items()}
        for fragment in fragments():
            parameters.lend(fragment, torch.zeros(fragment.layout.size))
        for number in range(steps_since):
            step(parameters, 0.1 * number)
            for index, tensor in enumerate(plain.values()):
                tensor.add_(0.1 * number * (index + 1))
        for fragment in fragments():
            thetas = {name: torch.randn(plain[name].shape, generator=generator) for name in fragment.pick([*plain])}
            parameters.write(flat(thetas), fragment)
            for name, theta in thetas.items():
                plain[name] += theta - lent[name]
        assert all(torch.equal(named[name], plain[name]) for name in named)


def test_steps_after_a_merge_belong_to_the_next_loan() -> None:
    """What was trained and not merged is in the next pseudo-gradient, and in no other."""
    named = tensors()
    parameters = DeviceParameters(named.items())
    first, _ = fragments()
    zero = torch.zeros(first.layout.size)
    parameters.lend(first, zero)
    before = flat(named, first)
    step(parameters, 0.5)
    trained, theta = flat(named, first) - before, zero + 2.0
    parameters.write(theta, first)
    torch.testing.assert_close(-parameters.lend(first, theta).gradient(), trained)
    assert torch.equal(theta, zero + 2.0), "the state is as it was"


def test_whole_weights_replace_everything_whatever_was_lent() -> None:
    named = tensors()
    parameters = DeviceParameters(named.items())
    first, second = fragments()
    lent, before = parameters.lend(first, torch.zeros(first.layout.size)), flat(named, first)
    step(parameters, 0.5)
    theta = torch.arange(28.0)
    parameters.write(theta)
    assert torch.equal(flat(named), theta) and torch.equal(lent.gradient(), -before)
    again = first.of(theta) * 3
    parameters.write(again, first)
    assert torch.equal(flat(named, first), again), "the loan before it is over"
    assert torch.equal(flat(named, second), second.of(theta))


def test_a_fragment_that_is_lent_again_is_merged_from_its_last_loan() -> None:
    named = tensors()
    parameters = DeviceParameters(named.items())
    first, _ = fragments()
    zero = torch.zeros(first.layout.size)
    parameters.lend(first, zero)
    step(parameters, 0.5)
    parameters.lend(first, zero)
    parameters.write(zero + 3.0, first)
    assert torch.equal(flat(named, first), zero + 3.0)


def test_sizes_that_do_not_fit_are_refused() -> None:
    parameters, (first, _) = DeviceParameters(tensors().items()), fragments()
    for theta, fragment in ((torch.zeros(27), None), (torch.zeros(first.layout.size + 1), first)):
        with pytest.raises(ValueError, match="a vector of"):
            parameters.write(theta, fragment)


# ---------------------------------------------------------------- streams, whose order is all that is shown


class Streams:
    """Stand-in for torch.cuda's streams and events, which writes down what waits for what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, empty = list[str](), torch.empty
        streams = self

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def wait_stream(self, other: Stream) -> None:
                streams.calls.append(f"{self.name} waits for {other.name}")

        class Event:
            def __init__(self, *, blocking: bool) -> None:
                assert blocking, "a thread that waits sleeps"

            def record(self, stream: Stream) -> None:
                streams.calls.append(f"{stream.name} records")

            def synchronize(self) -> None:
                streams.calls.append("a thread waits")

        self.copying, self.kept_for = Stream("copying"), set[str]()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("training"))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: self.kept_for.add(stream.name))

        def pinned(*sizes: Any, pin_memory: bool = False, **others: Any) -> Tensor:
            if pin_memory:
                self.calls.append("pinned memory")
            made: Tensor = empty(*sizes, **others)
            return made

        monkeypatch.setattr(torch, "empty", pinned)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    with monkeypatch.context() as patched:
        yield Streams(patched)


def test_the_trainer_asks_for_a_copy_and_others_wait_for_it(streams: Streams) -> None:
    parameters, (first, _) = DeviceParameters(tensors().items()), fragments()
    parameters.copier.stream = streams.copying  # type: ignore[assignment]
    theta = torch.zeros(first.layout.size)
    lent = parameters.lend(first, theta)
    assert streams.calls == ["pinned memory", "copying waits for training", "copying records"]
    assert streams.kept_for == {"copying"}, "memory of what is copied is not used again before"
    streams.calls.clear()
    parameters.take_back()
    assert streams.calls == ["training waits for copying"], "the device, and not the thread"
    streams.calls.clear()
    lent.gradient()
    lent.gradient()
    assert streams.calls == ["a thread waits"]
    streams.calls.clear()
    change = parameters.change_to(theta, first)
    assert streams.calls == ["a thread waits", "pinned memory"], "it subtracts what was lent"
    streams.calls.clear()
    parameters.write_change(theta, first, change)
    assert streams.calls == ["training waits for copying"] * 2, "also for the change, and the thread for nothing"
    streams.calls.clear()
    parameters.read()
    assert streams.calls[-1] == "a thread waits"


def test_moments_of_a_checkpoint_are_copied_beside_the_next_step(streams: Streams) -> None:
    parameters = DeviceParameters(tensors().items())
    parameters.copier.stream = streams.copying  # type: ignore[assignment]
    optimizer = InnerOptimizer(parameters.named.items(), inner_constants(run_file(1)), parameters.take_back)

    def step() -> None:
        for tensor in parameters.named.values():
            tensor.grad = torch.ones_like(tensor)
        optimizer.step(0.5)

    step()
    expected = optimizer.copy_moments(torch.empty(2, 28))
    streams.calls.clear()
    lent = optimizer.lend_moments(parameters.copier.copy)
    assert "copying waits for training" in streams.calls and "a thread waits" not in streams.calls
    streams.calls.clear()
    step()
    assert streams.calls == ["training waits for copying"], "the device, and not the thread"
    streams.calls.clear()
    read = torch.cat([piece.clone() for piece in lent.read()])
    assert set(streams.calls) == {"a thread waits"}, "the one that reads"
    streams.calls.clear()
    assert lent.steps.tolist() == [1.0, 1.0, 1.0] and set(streams.calls) == {"a thread waits"}
    assert torch.equal(read, expected.vectors.reshape(-1)), "those before the step"


# ---------------------------------------------------------------- sessions


def run_file(inner_steps: int) -> RunFile:
    return RunFile.model_validate(
        {
            "run": {"total_tokens": 64 * 12},
            "model": {"context_tokens": 16, "num_layers": 1, "width": 16, "num_heads": 2},
            "inner": {"batch_sequences": 4, "learning_rate": 1e-2},
            "merge": {"method": "diloco", "inner_steps": inner_steps, "outer_momentum": 0.5},
        }
    )
