"""A volunteer as a simulated run has it: the product's own loop and replica, which step and merge in virtual time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from swarmtrain.algorithm.outer import unflatten_into
from swarmtrain.data.batches import BatchSource
from swarmtrain.data.held_out import held_out_parts
from swarmtrain.data.mixture import PeerPlace
from swarmtrain.data.prepare import TrainingData, publishable_data, training_batches, training_data
from swarmtrain.model.base import base_files
from swarmtrain.model.evaluation import evaluate
from swarmtrain.model.run_model import build_run_model
from swarmtrain.network.codec import tensor_specs
from swarmtrain.network.snapshots.store import TensorSpec
from swarmtrain.peer.training.loop import ModelLoop
from swarmtrain.peer.training.replica import Replica
from swarmtrain.run import MergeSection, RunFile


@dataclass(frozen=True)
class Text:
    """Text that a simulated run trains on and is judged by, prepared as real peers do."""

    run: RunFile
    data: TrainingData
    held_out: bytes
    num_parts: int = 1
    """Equal parts of the corpus. Each volunteer learns from one, volunteer 0 from the first."""
    model_folder: Path | None = None
    """Folder of the files of the run's model; None if it is built in."""

    @classmethod
    def of(cls, run: RunFile, base: Path, num_parts: int = 1) -> Text:
        """Prepare the text of a run; `base` is the folder that the run file's paths are relative to."""
        model_files = None if run.model.is_built_in else base_files(run, base)
        published = publishable_data(run, base, model_files)
        held_out = published.held_out.text
        data = training_data(run, base, held_out, published.tokenizer_bytes, None)
        return cls(run, data, held_out, num_parts, model_files)

    def share_of(self, number: int) -> int:
        """Return which part of the corpus volunteer `number` learns from."""
        return number % self.num_parts

    def batches(self, number: int) -> BatchSource:
        """Return the batches of volunteer `number`."""
        # By the seed, not by the run file's hash: all methods of a comparison draw the same batches.
        place = PeerPlace(run_sha256=f"cold start, seed {self.run.run.seed}", peer_id=f"volunteer {number}")
        return training_batches(self.run, self.data.part(self.share_of(number), self.num_parts), place)

    def held_out_loss(self, theta: Tensor) -> float:
        """Return the held-out loss of weights (P,), in nats per byte."""
        model = build_run_model(self.run, self.model_folder)
        unflatten_into(theta, model.trained_tensors())
        sizes = self.run.model.context_tokens, self.run.evaluation.batch_sequences
        parts = held_out_parts(self.run, self.held_out, self.data.tokenizer).values()
        nats = sum(evaluate(model, part.batches(*sizes))[0] + part.unspelt_nats for part in parts)
        return nats / sum(part.num_bytes for part in parts)


class Learner:
    """Volunteer `number`: its model, optimizer, data and outer state.

    `seed` is the seed of its initial weights, by default the run's; with `warm` (P,) it begins with those weights
    instead.
    """

    def __init__(self, text: Text, number: int, seed: int | None = None, warm: Tensor | None = None) -> None:
        self.text, self.number = text, number
        model = build_run_model(text.run, text.model_folder, seed)
        if warm is not None:
            unflatten_into(warm, model.trained_tensors())
        self.loop = ModelLoop(text.run, model, text.batches(number))
        self.replica = Replica(text.run.merge, self.loop.parameters)
        self.losses: list[float] = []
        self.trained: frozenset[int] | None = None
        """Groups of an adapter that are trained in this round; None: everything."""

    def train_only(self, groups: frozenset[int] | None) -> None:
        """Train only these groups of an adapter from now on; None: everything, as before."""
        self.trained = groups
        if groups is not None:
            self.loop.parameters.train_only(groups)

    def enter(self, theta: Tensor) -> None:
        """Begin a round with these weights (P,)."""
        self.loop.parameters.write(theta)

    def step(self, progress: float, batch_sequences: int = 0) -> None:
        """Take an inner step at that share of the run's tokens, from 0 to 1, on so many sequences (0: the batch)."""
        self.loop.batch_sequences = batch_sequences
        self.losses.append(float(self.loop.take_step(progress).loss))

    def comes_late(self) -> None:
        """Record that the other volunteers began earlier: if this one has not trained yet, its moments count as
        young."""
        self.loop.weights_replaced()

    def train(self, theta: Tensor, steps: int, run_tokens: float, round_tokens: float) -> Tensor:
        """Train a round of `steps` inner steps from `theta` (P,), and return the weights it reaches.

        Meanwhile the run's tokens go from `run_tokens` up by `round_tokens`.
        """
        self.enter(theta)
        for step in range(steps):
            self.step((run_tokens + round_tokens * step / steps) / self.text.run.run.total_tokens)
        return self.reached

    @property
    def reached(self) -> Tensor:
        """Present weights (P,), as a copy."""
        return self.loop.parameters.read()

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Tensors of the model."""
        return tensor_specs(self.loop.parameters.named.items())


_STRANGER = 1_000_000
"""Number of a volunteer that trains alone, to which no volunteer of the run is equal, so that its batches are its
own."""


def warm_weights(run: RunFile, base: Path, tokens: int) -> Tensor:
    """Return the weights (P,) that one machine reaches alone after training on `tokens`.

    It starts from the run's initial weights, with the run's optimizer, schedule and data. `base` is the folder that the
    run file's paths are relative to.
    """
    alone = run.run.model_copy(update={"total_tokens": tokens})
    return _trained_alone(run.model_copy(update={"run": alone, "merge": MergeSection()}), base)


@lru_cache(8)
def _trained_alone(run: RunFile, base: Path) -> Tensor:
    learner, steps = Learner(Text.of(run, base), _STRANGER), run.run.total_tokens // run.tokens_per_step
    for step in range(steps):
        learner.step(step / steps)
    return learner.reached
