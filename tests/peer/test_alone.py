"""One volunteer alone: it trains on what a volunteer of the swarm would, and says so."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from codes import raises_code
from torch import Tensor

from swarmtrain import run_batch
from swarmtrain.algorithm.common_step import CommonOptimizer, CommonStep
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.errors import UserError
from swarmtrain.events import DeviceEvent, Event
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.peer.alone import TrainedAlone, train_alone
from swarmtrain.peer.lifecycle.node import PeerSettings
from swarmtrain.peer.training.loop import ModelLoop
from swarmtrain.protocol.devices import DeviceRequest, PrecisionRequest
from swarmtrain.protocol.limits import Limits
from swarmtrain.run import RunFile
from swarmtrain.run_data import DataSection

TOKENS = 12 * 64
WORDS = ["one", "volunteer", "alone", "learns", "what", "a", "swarm", "would"]
HELD_OUT = " ".join(random.Random(7).choices(WORDS, k=100)).encode()


@pytest.fixture
def published(tmp_path: Path) -> PublishedRun:
    """Publish a run whose text is in the test's folder."""
    (tmp_path / "text.txt").write_text(" ".join(random.Random(5).choices(WORDS, k=4000)))
    run = RunFile.model_validate(
        {
            "run": {"total_tokens": 10**6},
            "model": {"context_tokens": 16, "num_layers": 2, "width": 16, "num_heads": 2},
            "data": {"source": "text", "paths": ["text.txt"]},
            "inner": {"batch_sequences": 4, "learning_rate": 1e-2},
            "merge": {"inner_steps": 4},
        }
    )
    return PublishedRun(b"", "ab" * 32, run, HELD_OUT, b"")


def alone(
    published: PublishedRun, folder: Path, precision: PrecisionRequest
) -> tuple[TrainedAlone, list[Event], list[int]]:
    """Train; returns what came of it, what was told, and the tokens of each round."""
    told: list[Event] = []
    rounds: list[int] = []
    settings = PeerSettings(
        directory=folder,
        name="alone",
        data_folder=folder,
        cache_folder=folder / "cache",
        limits=Limits(threads=1),
        device=DeviceRequest("cpu"),
        precision=precision,
    )
    before = torch.get_num_threads()
    try:
        return train_alone(published, TOKENS, settings, rounds.append, told.append), told, rounds
    finally:
        torch.set_num_threads(before)


def test_it_computes_in_the_precision_asked_for_and_says_so(
    published: PublishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops: list[ModelLoop] = []
    train = ModelLoop.train
    monkeypatch.setattr(ModelLoop, "train", lambda loop, session: (loops.append(loop), train(loop, session))[1])
    losses = []
    for precision in ("fp32", "bf16", "fp32"):
        found, told, rounds = alone(published, tmp_path, precision)
        (event,) = told
        assert isinstance(event, DeviceEvent) and rounds == [256, 256, 256]
        assert (found.tokens, found.inner_steps) == (TOKENS, 12)
        assert (event.device, event.precision, event.microbatch_sequences) == ("cpu", precision, 4)
        assert loops[-1].compute.precision == precision
        losses.append(found.loss)
    full, lower, again = losses
    assert full == again != lower and lower == pytest.approx(full, rel=0.01) and full < 5.5


def test_of_a_large_batch_it_makes_the_same_steps_with_batches_as_large(
    published: PublishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[str, CommonStep]] = []
    step = CommonOptimizer.step

    def recorded(self: CommonOptimizer, state: OuterState, gradient: Tensor, at: CommonStep) -> OuterState:
        taken.append((self.name, at))
        return step(self, state, gradient, at)

    monkeypatch.setattr(CommonOptimizer, "step", recorded)
    losses = []
    for optimizer in ("adamw", "lamb"):
        update = {"method": "batch", "optimizer": optimizer}
        merge = published.run.merge.model_copy(update=update)
        run = published.run.model_copy(update={"merge": merge})
        found, _, rounds = alone(PublishedRun(b"", "ab" * 32, run, HELD_OUT, b""), tmp_path, "fp32")
        assert rounds == [256] * 3 and (found.tokens, found.inner_steps) == (TOKENS, 12)
        assert taken == [(optimizer, CommonStep(number + 1, number / 3)) for number in range(3)]
        losses.append(found.loss)
        taken.clear()
    assert losses[0] != losses[1] and max(losses) < 5.6


def test_of_batches_that_grow_it_makes_the_same(
    published: PublishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_batch, "GROWTH", 1.0)
    merge = published.run.merge.model_copy(update={"method": "batch", "target_tokens": "auto", "inner_steps": 2})
    run = published.run.model_copy(update={"merge": merge})
    _, _, rounds = alone(PublishedRun(b"", "ab" * 32, run, HELD_OUT, b""), tmp_path, "fp32")
    assert rounds == [128, 128, 256, 256], "as many as the run had, but no more than are left"


def test_a_precision_that_the_run_does_not_allow_is_refused(published: PublishedRun, tmp_path: Path) -> None:
    inner = published.run.inner.model_copy(update={"precision": "fp32"})
    demanding = PublishedRun(b"", published.sha256, published.run.model_copy(update={"inner": inner}), HELD_OUT, b"")
    with raises_code("precision-demanded", UserError):
        alone(demanding, tmp_path, "bf16")


def test_it_trains_on_as_many_tokens_that_count_as_it_is_told(published: PublishedRun, tmp_path: Path) -> None:
    rng = random.Random(3)
    pairs = [(" ".join(rng.choices(WORDS, k=6)), rng.choice(WORDS)) for _ in range(400)]
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    data = DataSection(source="jsonl", paths=("pairs.jsonl",), format="prompt-completion")
    run = published.run.model_copy(update={"data": data})
    held_out = json.dumps({"completion": "swarm", "prompt": "what learns?"}).encode()
    samples = PublishedRun(b"", published.sha256, run, held_out, b"")
    found, _, rounds = alone(samples, tmp_path, "fp32")
    assert sum(rounds) == found.tokens and TOKENS <= found.tokens < TOKENS + 64
    assert found.inner_steps > 2 * 12, "most of what is read is prompts"
    assert len(rounds) < found.inner_steps, "of more steps than one"
