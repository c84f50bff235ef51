"""Two ranks of one peer on processors: a real further process, equal weights, and what ends them."""

from __future__ import annotations

import io
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from codes import raises_code
from recorded_rank import DIGESTS, FITTING, digest
from torch import Tensor

from swarmtrain.algorithm.batch import join_rows, num_targets
from swarmtrain.algorithm.common_step import NUM_MOMENTS, CommonOptimizer, CommonStep
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.data.batches import Batches
from swarmtrain.errors import Problem, RunTimeError
from swarmtrain.model.gpt import build_model
from swarmtrain.peer.devices import compiled_loss, data_parallel, rank_process
from swarmtrain.peer.devices.compute import CACHE_VARIABLE, ComputeDevice
from swarmtrain.peer.devices.rank_group import RankGroup, loopback_interface
from swarmtrain.peer.devices.rank_process import RankWork
from swarmtrain.peer.lifecycle.stop import StopTraining
from swarmtrain.peer.training.gradients import add_gradient
from swarmtrain.peer.training.loop import ModelLoop, inner_constants
from swarmtrain.protocol.devices import Precision
from swarmtrain.run import RunFile

TEXT = np.frombuffer(
    b"two hands at one plough draw one furrow, and it is as straight as with one. " * 20, dtype=np.uint8
)
BATCH = 5
CPU = torch.device("cpu")
ROUNDING = 1e-6
"""Relative difference allowed between gradients that are summed in another order, fp32."""

RUN = RunFile.model_validate(
    {
        "run": {"total_tokens": 16 * BATCH * 100},
        "model": {"context_tokens": 16, "num_layers": 2, "width": 16, "num_heads": 2},
        "inner": {"batch_sequences": BATCH, "learning_rate": 1e-2, "gradient_clip": 0.5},
    }
)


def batches_at(position: int = 0) -> Batches:
    return Batches(
        TEXT, context_tokens=16, batch_sequences=BATCH, run_sha256="ab" * 32, peer_id="me", position=position
    )


class Pair:
    """Loop of two ranks, of which the second one records its weights in `digests`."""

    def __init__(
        self, digests: Path, position: int = 0, microbatch: int = BATCH, precision: Precision = "fp32"
    ) -> None:
        self.told: list[tuple[int, int]] = []
        self._recorded: dict[int, str] = {}
        compute = ComputeDevice(precision=precision, others=(CPU,), microbatch_sequences=microbatch)
        model = build_model(RUN.model, 0)
        self.loop = ModelLoop(RUN, model, batches_at(position), compute=compute, told_smaller=self._tell)
        assert self.loop.ranks is not None
        self.ranks, self._digests = self.loop.ranks, digests
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(DIGESTS, str(digests))
            self.ranks.start()
        assert self.ranks._folder is not None
        self.folder = self.ranks._folder

    def _tell(self, before: ComputeDevice, now: ComputeDevice) -> None:
        self.told.append((before.microbatch_sequences, now.microbatch_sequences))

    @property
    def process(self) -> psutil.Process:
        [process] = self.ranks._processes
        return psutil.Process(process.pid)

    def own_digest(self) -> str:
        return digest([*self.loop.model.parameters(), *self.loop.inner.moment_tensors()])

    def others_digest(self) -> str:
        """Return what the other rank recorded after as many steps as this one has taken; wait until it has."""
        num_steps = round(float(self.loop.inner.moment_tensors()[0]))
        while not (recorded := self._recorded.get(num_steps)):
            assert self.ranks._processes[0].poll() is None, self.ranks._errors_of(1).read_text()
            lines = self._digests.read_text().splitlines() if self._digests.exists() else []
            self._recorded = {int(number): found for number, _, found in (line.partition(" ") for line in lines)}
        return recorded

    def gradient(self, batch: Tensor) -> tuple[float, Tensor]:
        """Return loss and gradient of a batch, computed by both ranks."""
        return self._differentiated(
            self.ranks.differentiate(batch, self.loop.model.loss, self.loop.compute, lambda: False)
        )

    def gradient_alone(self, batch: Tensor) -> tuple[float, Tensor]:
        """Return loss and gradient of a batch at the same weights, computed by this process alone."""
        whole = ComputeDevice(microbatch_sequences=len(batch))
        loss_of, targets = self.loop.model.loss, num_targets(batch)
        return self._differentiated(add_gradient(loss_of, batch, targets, whole, None, lambda: False))

    def _differentiated(self, loss: Tensor | None) -> tuple[float, Tensor]:
        assert loss is not None
        found = torch.cat([each.reshape(-1) for each in self.loop.inner.gradients()])
        self.loop.inner.drop_gradients()
        return float(loss), found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Let further ranks record their weights in the folder."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        tests = str(Path(__file__).parents[2])
        patch.setenv("PYTHONPATH", os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]))
        patch.setattr(data_parallel, "_MODULE", "recorded_rank")
        yield folder


@pytest.fixture(scope="module")
def pair(recorded: Path) -> Iterator[Pair]:
    """Provide one pair for several tests, since a rank takes a second to start."""
    pair = Pair(recorded / "one", microbatch=1)
    yield pair
    pair.loop.close()


def test_two_ranks_have_equal_bits_after_each_step_and_merge(pair: Pair) -> None:
    loop = pair.loop
    for step in range(20):
        if step == 7:  # a merge, of everything and of a fragment
            loop.parameters.write(loop.parameters.read() * 0.9)
            some: Any = SimpleNamespace(tensors=(0, 2), pick=lambda tensors: [tensors[0], tensors[2]])
            size = sum(list(loop.parameters.named.values())[index].numel() for index in some.tensors)
            loop.parameters.write(torch.full((size,), 0.25), some)
        if step == 9:  # a measured loss writes the model's weights too, and restores them
            with torch.no_grad():
                loop.model.head.weight.mul_(0.5)
        before = pair.own_digest()
        loop.batch_sequences = 1 if step == 11 else 0  # fewer sequences than ranks
        done = loop.take_step(step / 100)
        assert done.tokens == 16 * (1 if step == 11 else BATCH)
        assert pair.others_digest() == pair.own_digest() != before, f"after step {step}"


@pytest.mark.parametrize("number", [BATCH, 4, 1])
def test_the_gradient_is_that_of_one_process(pair: Pair, number: int) -> None:
    batch = batches_at(3).next_batch()[:number]
    (loss, both), (right, alone) = pair.gradient(batch), pair.gradient_alone(batch)
    assert (both - alone).norm() <= ROUNDING * alone.norm() and loss == pytest.approx(right, rel=ROUNDING)


@pytest.mark.parametrize("targets", [[0, 0, 3, 16], [5, 0, 0, 0], [0, 0, 0, 0]])
def test_ranks_count_by_the_targets_of_their_parts(pair: Pair, targets: list[int]) -> None:
    tokens = batches_at(3).next_batch()[:4]
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = join_rows(tokens, places >= tokens.shape[1] - torch.tensor(targets)[:, None], places % 7)
    (loss, both), (right, alone) = pair.gradient(batch), pair.gradient_alone(batch)
    assert (both - alone).norm() <= ROUNDING * alone.norm() and loss == pytest.approx(right, rel=ROUNDING)
    assert bool(alone.any()) == bool(sum(targets))


def test_a_stop_within_a_step_leaves_both_where_they_were(pair: Pair) -> None:
    pair.loop.take_step(0.5)
    before, looks = pair.own_digest(), iter([False, False, True])
    with pytest.raises(StopTraining):
        pair.loop.take_step(0.5, lambda: next(looks))
    assert pair.own_digest() == before and all(each.grad is None for each in pair.loop.model.parameters())
    pair.loop.take_step(0.5)
    assert pair.others_digest() == pair.own_digest() != before


def test_ranks_listen_for_each_other_on_this_machine_alone(pair: Pair) -> None:
    pair.loop.take_step(0.5)
    for process in (psutil.Process(), pair.process):
        found = {each.laddr.ip for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN}
        assert found == {"127.0.0.1"}
    assert any(each.address == "127.0.0.1" for each in psutil.net_if_addrs()[loopback_interface()])
    assert pair.folder.stat().st_mode & 0o077 == 0, "and meet where nobody else can write"


def test_a_resumed_peer_has_the_bits_of_an_uninterrupted_one_until_its_rank_stands_still(
    pair: Pair, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its second rank has memory for one sequence at once only, and is stopped at the end."""
    loop = pair.loop
    loop.take_step(0.1)
    kept = loop.kept(torch.empty(2, loop.parameters.read().numel()))
    theta, position = loop.parameters.read(), loop.batches.position
    for step in range(3):
        loop.take_step(step / 100)
    loop.close()  # the last test of this pair: a process has one group at a time

    monkeypatch.setenv(FITTING, "1")
    monkeypatch.setattr(data_parallel, "_EXIT_S", 0.2)
    again = Pair(recorded / "again", position, microbatch=2)
    again.ranks.limit_s = 4.0
    try:
        again.loop.resume(kept)
        again.loop.parameters.write(theta)
        for step in range(3):
            again.loop.take_step(step / 100)
            assert again.others_digest() == again.own_digest()
        assert again.told == [(2, 1)] and again.loop.batches.position == position + 3, "told once, and no batch is lost"
        assert again.own_digest() == pair.own_digest()

        other = again.process
        other.send_signal(signal.SIGSTOP)
        with raises_code("rank-lost", RunTimeError, "cpu", "did not answer for 4 s", "--device cpu") as raised:
            again.loop.take_step(0.01)
        assert "\n" not in str(raised.value)
    finally:
        again.loop.end()
    assert not other.is_running() and not again.folder.exists()


def test_common_steps_of_two_ranks_are_those_of_one() -> None:
    merge = {"method": "batch", "target_tokens": 3 * 16 * BATCH}
    run = RunFile.model_validate({**RUN.model_dump(include={"run", "model", "inner"}), "merge": merge})
    after = []
    for others in ((), (CPU,)):
        compute = ComputeDevice(others=others, microbatch_sequences=2)
        loop = ModelLoop(run, build_model(run.model, 0), batches_at(), compute=compute)
        optimizer = CommonOptimizer(loop.parameters.shapes, inner_constants(run))
        theta = loop.parameters.read()
        state = OuterState(theta, torch.zeros(NUM_MOMENTS * len(theta)))
        for number in range(1, 6):
            before = loop.parameters.read()
            for _ in range(3):
                loop.take_step(number / 10)
            assert torch.equal(loop.parameters.read(), before), "its steps leave the weights as they are"
            gradient, targets = loop.mean_gradient()
            assert targets == run.batch_target.first_tokens
            state = optimizer.step(state, gradient, CommonStep(number, number / 10))
            loop.parameters.write(state.theta)
        loop.close()
        assert (state.theta - theta).abs().max() > 1e-2
        after.append(state.theta)
    assert (after[0] - after[1]).abs().max() <= 1e-6


def test_a_rank_that_does_not_start_is_told_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_parallel, "_MODULE", "no_such_module_of_ours")
    loop = ModelLoop(RUN, build_model(RUN.model, 0), batches_at(), compute=ComputeDevice(others=(CPU,)))
    assert loop.ranks is not None
    told: list[Problem] = []
    loop.ranks.on_lost = told.append
    with raises_code("rank-lost", RunTimeError, "has ended", "no_such_module_of_ours"):
        loop.take_step(0.0)
    loop.ranks.watcher.join()
    assert [problem.code for problem in told] == ["rank-lost"], "whoever waits elsewhere learns it too"
    loop.close()


def test_a_step_that_a_card_does_not_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_parallel, "_EXIT_S", 0.0)
    told: list[Problem] = []
    loop = ModelLoop(RUN, build_model(RUN.model, 0), batches_at(), compute=ComputeDevice(others=(CPU,)))
    assert loop.ranks is not None
    loop.ranks.on_lost, never = told.append, SimpleNamespace(query=lambda: False)
    loop.ranks._asked = (never, 0.0)  # type: ignore[assignment]
    loop.ranks.watcher.start()
    loop.ranks.watcher.join()
    assert [problem.code for problem in told] == ["rank-lost"] and "did not answer" in told[0]


def test_no_step_is_taken_from_gradients_that_were_not_summed_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card, where a sum that was broken off raises nothing."""
    summed = [True, False]

    def all_reduce(tensor: Tensor) -> None:
        tensor.mul_(2 if summed.pop(0) else 1)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: None)
    loop = ModelLoop(RUN, build_model(RUN.model, 0), batches_at())
    loop.inner.norm_of_all = RankGroup(0, 2, CPU).norm_of_all
    loop.take_step(0.0)
    before = loop.parameters.read()
    assert math.isinf(float(loop.take_step(0.0).grad_norm)) and torch.equal(loop.parameters.read(), before)


def test_ranks_clip_as_one_process_does() -> None:
    one, two = (ModelLoop(RUN, build_model(RUN.model, 0), batches_at()) for _ in range(2))
    two.inner.norm_of_all = lambda norm: norm
    for step in range(3):
        first, second = one.take_step(step / 100), two.take_step(step / 100)
        assert first.grad_norm == second.grad_norm > RUN.inner.gradient_clip
    assert torch.equal(one.parameters.read(), two.parameters.read())


def test_all_ranks_scale_their_losses_by_rank_0s_factor(recorded: Path) -> None:
    """Of a large batch the others never hear of a step, by which they would adapt their own factors."""
    pair = Pair(recorded / "scaled", precision="fp16")
    try:
        scale, batch = pair.loop.inner.loss_scale, batches_at().next_batch()
        assert scale is not None
        for factor in (512.0, 1024.0):
            scale.factor.fill_(factor)
            _, together = pair.gradient(batch)
            _, whole = pair.gradient_alone(batch)
            assert float((together / factor - whole).norm()) < 0.01 * float(whole.norm())
    finally:
        pair.loop.close()


def test_a_rank_waits_for_rank_0_before_it_connects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A peer may wait for company before its first step, for longer than a collective may take."""

    class NoCommandError(Exception):
        pass

    class Commands:
        def __init__(self, stream: IO[bytes], folder: Path) -> None:
            pass

        def next(self) -> dict[str, Any]:
            raise NoCommandError

    task = {"folder": str(tmp_path), "rank": 1, "num_ranks": 2, "shards": False}
    stdin = SimpleNamespace(buffer=io.BytesIO(json.dumps(task).encode() + b"\n"))
    monkeypatch.setattr(rank_process, "sys", SimpleNamespace(stdin=stdin))
    monkeypatch.setattr(rank_process, "_Commands", Commands)
    with pytest.raises(NoCommandError):
        rank_process._work()
    assert dist.FileStore(str(tmp_path / rank_process.STORE), 2).check([rank_process.ready_key(1)]), "it is there"


def test_a_rank_compiles_its_loss_when_rank_0_has(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def compiled(model: Any, failed: Any, rows: int) -> Callable[[Tensor], Tensor]:
        made.append(os.environ[CACHE_VARIABLE])
        return lambda batch: batch

    monkeypatch.setattr(compiled_loss, "compiled", compiled)
    monkeypatch.setenv(CACHE_VARIABLE, "before")
    rank = object.__new__(RankWork)
    rank.model = build_model(RUN.model, 0)
    rank._loss_of = rank.model.loss
    rank._use_compiled(None)
    assert rank._loss_of == rank.model.loss and not made
    rank._use_compiled("its-cache")
    first = rank._loss_of
    rank._use_compiled("its-cache")
    assert rank._loss_of is first != rank.model.loss and made == ["its-cache"], "once"
    rank._use_compiled(None)
    assert rank._loss_of == rank.model.loss
