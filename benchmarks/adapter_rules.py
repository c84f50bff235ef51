"""Compare ways to merge LoRA adapters of unequal ranks, on a small model that is really trained.

    python benchmarks/adapter_rules.py                     # three volunteers of ranks 4, 8 and 16, three seeds
    python benchmarks/adapter_rules.py --plain-outer       # the same by half of the grid
    python benchmarks/adapter_rules.py --rounds 4 --seeds 1 --pretrain 40     # whether it works, in a minute

A small GPT learns Python's standard library; then volunteers fine-tune it on the library's docstrings, in synchronous
rounds from common weights (`diloco`). Only the rule differs by which the rounds' results become the next ones' start:

- full fine-tuning: all weights, as a measure of what can be gained;
- equal: each trains all R components, and A and B are averaged (FedIT, arXiv 2305.05644);
- groups: each has all R components in the forward pass and trains whole groups worth its rank, a group is the mean of
  those who trained it (this project);
- zero padding: each has the first r_i components, and A and B are averaged as if the others were zero (HetLoRA without
  pruning, arXiv 2401.06432);
- FlexLoRA: each has r_i components; the mean of the products B A is cut into each volunteer's rank by SVD (arXiv
  2402.11505);
- FLoRA: each has r_i components; their products are added to the base, and new ones are drawn (arXiv 2409.05976);
- alone: the volunteer of the greatest rank by itself, with as many inner steps as it takes beside the others.

Inner learning rate and outer step are those of the same grid for each rule, chosen by the loss of the first seed.
Prints the held-out loss, what it fell beside full fine-tuning, and the bytes that a volunteer sends and receives in a
round.
"""

from __future__ import annotations

import argparse
import ast
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swarmtrain.algorithm.inner import InnerConstants, InnerOptimizer
from swarmtrain.data.batches import Batches, held_out_batches
from swarmtrain.data.documents import read_documents
from swarmtrain.model.evaluation import evaluate
from swarmtrain.model.gpt import GPT, build_model, uniform_weight
from swarmtrain.protocol.adapter_groups import trained_groups
from swarmtrain.run import DataSection, ModelSection

RANKS = (4, 8, 16)
RANK, GROUP_RANK, ALPHA = 16, 4, 32.0
GRID = tuple(itertools.product((1e-3, 3e-3, 1e-2), ((1.0, 0.0), (0.7, 0.8))))
"""Inner learning rate, and outer learning rate with momentum."""
PLAIN = tuple(each for each in GRID if each[1] == (1.0, 0.0))
HELD_OUT_BYTES = 65_536
Factors = list[tuple[Tensor, Tensor]]
"""A (r, in) and B (out, r) of each adapted layer."""


@dataclass(frozen=True)
class Budget:
    """What each rule may use."""

    rounds: int
    inner_steps: int
    batch: int
    ranks: tuple[int, ...] = RANKS


class AdaptedLinear(nn.Module):
    """Linear layer with a product of low rank beside it, whose components are in groups of parameters."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.parts_a, self.parts_b = nn.ParameterList(), nn.ParameterList()

    @property
    def a(self) -> Tensor:
        return torch.cat(list(self.parts_a))

    @property
    def b(self) -> Tensor:
        return torch.cat(list(self.parts_b), 1)

    def forward(self, x: Tensor) -> Tensor:
        if not len(self.parts_a):
            return self.base(x)
        return self.base(x) + ALPHA / RANK * F.linear(F.linear(x, self.a), self.b)


class Learner:
    """The adapted model of one volunteer, its optimizer and its text."""

    def __init__(self, base: GPT, tokens: np.ndarray, number: int, seed: int, budget: Budget) -> None:
        self.model = copy.deepcopy(base).requires_grad_(False)
        self.layers = list[AdaptedLinear]()
        for block in self.model.blocks:
            for part in (block.attention, block.feed_forward):
                for name, layer in list(part.named_children()):
                    setattr(part, name, adapted := AdaptedLinear(layer))
                    self.layers.append(adapted)
        self.batches = Batches(
            tokens,
            context_tokens=base.context_tokens,
            batch_sequences=budget.batch,
            run_sha256=f"adapters {seed}",
            peer_id=f"volunteer {number}",
        )
        self.optimizer: InnerOptimizer | None = None
        self.is_full = False

    def set(self, factors: Factors, num_groups: int = 1) -> None:
        """Continue with these factors, in so many groups; the optimizer stays if their shapes do."""
        for layer, (a, b) in zip(self.layers, factors, strict=True):
            parts = torch.chunk(a, num_groups), torch.chunk(b, num_groups, 1)
            for name, new in zip(("parts_a", "parts_b"), parts, strict=True):
                own = getattr(layer, name)
                if [each.shape for each in own] == [each.shape for each in new]:
                    for parameter, value in zip(own, new, strict=True):
                        parameter.data.copy_(value)
                else:
                    self.optimizer = None
                    setattr(layer, name, nn.ParameterList(each.clone() for each in new))

    def train_only(self, groups: Collection[int]) -> None:
        for layer in self.layers:
            for group, parameters in enumerate(zip(layer.parts_a, layer.parts_b, strict=True)):
                for parameter in parameters:
                    parameter.requires_grad_(group in groups)

    @property
    def factors(self) -> Factors:
        return [(layer.a.detach().clone(), layer.b.detach().clone()) for layer in self.layers]

    def train(self, steps: int, rate: float, progress: Iterator[float]) -> None:
        """Take inner steps on the parameters that want gradients."""
        if self.optimizer is None:
            named = [(name, each) for name, each in self.model.named_parameters() if self.is_full or "parts_" in name]
            self.optimizer = InnerOptimizer(named, constants(rate))
        for _ in range(steps):
            self.model.loss(self.batches.next_batch()).backward()
            self.optimizer.step(next(progress))


def constants(rate: float) -> InnerConstants:
    return InnerConstants(
        learning_rate=rate,
        weight_decay=0.0,
        beta1=0.9,
        beta2=0.95,
        gradient_clip=1.0,
        warmup_fraction=0.05,
        floor_fraction=0.1,
    )


class Outer:
    """Nesterov steps on a list of tensors (DiLoCo)."""

    def __init__(self, rate: float, momentum: float) -> None:
        self.rate, self.momentum, self._m = rate, momentum, list[Tensor]()

    def step(self, start: Sequence[Tensor], reached: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the tensors after a step from `start` towards `reached`; None: nobody trained it, and it stays."""
        self._m = self._m or [torch.zeros_like(each) for each in start]
        found = []
        for number, (before, after) in enumerate(zip(start, reached, strict=True)):
            if after is None:
                found.append(before)
                continue
            gradient = before - after
            self._m[number] = self.momentum * self._m[number] + gradient
            found.append(before - self.rate * (gradient + self.momentum * self._m[number]))
        return found


def first_factors(learner: Learner, rank: int, seed: str) -> Factors:
    """Return A as peft draws it and B of zeros."""
    return [
        (
            uniform_weight(
                f"{seed} {number}", torch.Size((rank, one.base.in_features)), 0, (3 * one.base.in_features) ** -0.5
            ),
            torch.zeros(one.base.out_features, rank),
        )
        for number, one in enumerate(learner.layers)
    ]


def numbers(factors: Factors) -> int:
    return sum(a.numel() + b.numel() for a, b in factors)


def mean(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).mean(0)


Rule = Callable[[GPT, np.ndarray, int, float, Outer, Budget], tuple[nn.Module, float]]
"""Maps (base, tokens, seed, inner rate, outer step, budget) to (the tuned model, bytes a volunteer and round)."""


def _progress(budget: Budget) -> list[Iterator[float]]:
    total = budget.rounds * budget.inner_steps
    return [iter([step / total for step in range(total)]) for _ in budget.ranks]


def _swarm(base: GPT, tokens: np.ndarray, seed: int, budget: Budget) -> list[Learner]:
    return [Learner(base, tokens, number, seed, budget) for number in range(len(budget.ranks))]


def groups(
    base: GPT, tokens: np.ndarray, seed: int, rate: float, outer: Outer, budget: Budget
) -> tuple[nn.Module, float]:
    learners, progress = _swarm(base, tokens, seed, budget), _progress(budget)
    whole, num_groups, sent = first_factors(learners[0], RANK, f"{seed}"), RANK // GROUP_RANK, 0
    for round in range(budget.rounds):
        trained = [
            trained_groups(f"volunteer {number}", round, num_groups, rank // GROUP_RANK)
            for number, rank in enumerate(budget.ranks)
        ]
        for learner, its, way in zip(learners, trained, progress, strict=True):
            learner.set(whole, num_groups)
            learner.train_only(its)
            learner.train(budget.inner_steps, rate, way)
            sent += 4 * numbers(whole) * len(its) // num_groups
        start, reached = list[Tensor](), list[Tensor | None]()
        for index, (a, b) in enumerate(whole):
            start += [*torch.chunk(a, num_groups), *torch.chunk(b, num_groups, 1)]
            for name in ("parts_a", "parts_b"):
                for group in range(num_groups):
                    who = [learner for learner, its in zip(learners, trained, strict=True) if group in its]
                    reached += [
                        mean([getattr(one.layers[index], name)[group].detach() for one in who]) if who else None
                    ]
        new = iter(outer.step(start, reached))
        whole = [
            (torch.cat([next(new) for _ in range(num_groups)]), torch.cat([next(new) for _ in range(num_groups)], 1))
            for _ in whole
        ]
    learners[0].set(whole, num_groups)
    return learners[0].model, sent / budget.rounds / len(learners) + 4 * numbers(whole)


def equal(
    base: GPT, tokens: np.ndarray, seed: int, rate: float, outer: Outer, budget: Budget
) -> tuple[nn.Module, float]:
    return groups(
        base,
        tokens,
        seed,
        rate,
        outer,
        Budget(budget.rounds, budget.inner_steps, budget.batch, (RANK,) * len(budget.ranks)),
    )


def zero_padding(
    base: GPT, tokens: np.ndarray, seed: int, rate: float, outer: Outer, budget: Budget
) -> tuple[nn.Module, float]:
    learners, progress, sent = _swarm(base, tokens, seed, budget), _progress(budget), 0
    whole = first_factors(learners[0], RANK, f"{seed}")
    for _ in range(budget.rounds):
        for learner, rank, way in zip(learners, budget.ranks, progress, strict=True):
            learner.set([(a[:rank], b[:, :rank]) for a, b in whole])
            learner.train(budget.inner_steps, rate, way)
            sent += 2 * 4 * numbers(learner.factors)
        start = [each for pair in whole for each in pair]
        reached = list[Tensor | None]()
        for index in range(len(whole)):
            padded = [
                (F.pad(a, (0, 0, 0, RANK - len(a))), F.pad(b, (0, RANK - len(a))))
                for a, b in (one.factors[index] for one in learners)
            ]
            reached += [mean([a for a, _ in padded]), mean([b for _, b in padded])]
        new = iter(outer.step(start, reached))
        whole = [(next(new), next(new)) for _ in whole]
    learners[-1].set(whole)
    return learners[-1].model, sent / budget.rounds / len(learners)


def flex_lora(
    base: GPT, tokens: np.ndarray, seed: int, rate: float, outer: Outer, budget: Budget
) -> tuple[nn.Module, float]:
    learners, progress, sent = _swarm(base, tokens, seed, budget), _progress(budget), 0
    whole = first_factors(learners[0], RANK, f"{seed}")
    products = [b @ a for a, b in whole]
    for _ in range(budget.rounds):
        for learner, rank, way in zip(learners, budget.ranks, progress, strict=True):
            learner.optimizer = None  # the components are others than before
            learner.set([(a[:rank], b[:, :rank]) for a, b in whole])
            learner.train(budget.inner_steps, rate, way)
            sent += 2 * 4 * numbers(learner.factors)
        reached = [mean([b @ a for a, b in (one.factors[index] for one in learners)]) for index in range(len(whole))]
        products = outer.step(products, reached)
        whole = []
        for product in products:
            u, s, v = torch.linalg.svd(product, full_matrices=False)
            root = s[:RANK].sqrt()
            whole.append((root[:, None] * v[:RANK], u[:, :RANK] * root))
    learners[-1].set(whole)
    return learners[-1].model, sent / budget.rounds / len(learners)


def flora(
    base: GPT, tokens: np.ndarray, seed: int, rate: float, outer: Outer, budget: Budget
) -> tuple[nn.Module, float]:
    learners, progress, sent = _swarm(base, tokens, seed, budget), _progress(budget), 0
    weights = [layer.base.weight.clone() for layer in learners[0].layers]
    for round in range(budget.rounds):
        for number, (learner, rank, way) in enumerate(zip(learners, budget.ranks, progress, strict=True)):
            for layer, weight in zip(learner.layers, weights, strict=True):
                layer.base.weight.data.copy_(weight)
            learner.optimizer = None
            learner.set(first_factors(learner, rank, f"{seed} {round} {number}"))
            learner.train(budget.inner_steps, rate, way)
            sent += 4 * numbers(learner.factors)
        received = 4 * sum(numbers(learner.factors) for learner in learners) * len(learners)
        sent += received  # each receives the stack of all
        scale = ALPHA / RANK
        reached = [
            weight + scale * mean([b @ a for a, b in (one.factors[index] for one in learners)])
            for index, weight in enumerate(weights)
        ]
        weights = outer.step(weights, reached)
    for layer, weight in zip(learners[-1].layers, weights, strict=True):
        layer.base.weight.data.copy_(weight)
    learners[-1].set([(a[:1], b[:, :1]) for a, b in first_factors(learners[-1], 1, "none")])
    return learners[-1].model, sent / budget.rounds / len(learners)


def full(
    base: GPT, tokens: np.ndarray, seed: int, rate: float, outer: Outer, budget: Budget
) -> tuple[nn.Module, float]:
    learners, progress = _swarm(base, tokens, seed, budget), _progress(budget)
    for learner in learners:
        learner.model.requires_grad_(True)
        learner.is_full = True
    own = [list(learner.model.parameters()) for learner in learners]
    weights = [each.detach().clone() for each in own[0]]
    for _ in range(budget.rounds):
        for learner, its, way in zip(learners, own, progress, strict=True):
            for parameter, weight in zip(its, weights, strict=True):
                parameter.data.copy_(weight)
            learner.train(budget.inner_steps, rate, way)
        weights = outer.step(weights, [mean([its[index].detach() for its in own]) for index in range(len(weights))])
    for parameter, weight in zip(own[0], weights, strict=True):
        parameter.data.copy_(weight)
    return learners[0].model, 2 * 4 * sum(weight.numel() for weight in weights)


def alone(
    base: GPT, tokens: np.ndarray, seed: int, rate: float, outer: Outer, budget: Budget
) -> tuple[nn.Module, float]:
    learner = Learner(base, tokens, len(budget.ranks) - 1, seed, budget)
    learner.set(first_factors(learner, RANK, f"{seed}"))
    learner.train(budget.rounds * budget.inner_steps, rate, _progress(budget)[0])
    return learner.model, 0.0


RULES: dict[str, Rule] = {
    "full fine-tuning": full,
    "equal": equal,
    "groups": groups,
    "zero padding": zero_padding,
    "FlexLoRA": flex_lora,
    "FLoRA": flora,
    "alone": alone,
}


def docstrings(texts: Sequence[bytes]) -> bytes:
    """Return all docstrings of Python sources."""
    found = []
    for text in texts:
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
                said := ast.get_docstring(node)
            ):
                found.append(said)
    return "\n\n".join(found).encode()


def pretrained(section: ModelSection, tokens: np.ndarray, steps: int) -> GPT:
    """Train a base on tokens, alone."""
    model = build_model(section, 0)
    batches = Batches(
        tokens, context_tokens=section.context_tokens, batch_sequences=16, run_sha256="base", peer_id="base"
    )
    optimizer = InnerOptimizer(model.named_parameters(), constants(3e-3))
    for step in range(steps):
        model.loss(batches.next_batch()).backward()
        optimizer.step(step / steps)
    return model


def measured(model: nn.Module, held_out: np.ndarray) -> float:
    batches = held_out_batches(held_out, model.context_tokens, 16)
    return evaluate(model, batches)[0] / len(held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--pretrain", type=int, default=1000, help="steps of the base, of 16 sequences")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--inner-steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a volunteer's step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--plain-outer", action="store_true", help="outer steps of rate 1 alone: half of the grid")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sources = [document.text for document in read_documents(DataSection(), Path())]
    code, words = (np.frombuffer(each, dtype=np.uint8) for each in (b"\n".join(sources), docstrings(sources)))
    tokens, held_out = words[:-HELD_OUT_BYTES], words[-HELD_OUT_BYTES:]
    section = ModelSection(
        context_tokens=options.context, num_layers=options.layers, width=options.width, num_heads=options.width // 32
    )
    began_s = time.perf_counter()
    base = pretrained(section, code, options.pretrain)
    first = measured(base, held_out)
    budget = Budget(options.rounds, options.inner_steps, options.batch)
    size = sum(each.numel() for each in base.parameters())
    print(f"base: {size / 1e6:.2f} million parameters, {first:.4f} nats a byte; {time.perf_counter() - began_s:.0f} s")
    print(f"{len(RANKS)} volunteers, ranks {RANKS}, {options.rounds} rounds of {options.inner_steps} steps")
    print("rule               inner rate  outer        loss (seeds)                        mean    fall  bytes a round")
    falls = dict[str, float]()
    for name in options.rules:
        rule, tried = RULES[name], dict[tuple[float, tuple[float, float]], float]()
        for rate, outer in PLAIN if options.plain_outer or name == "alone" else GRID:
            tried[rate, outer] = measured(rule(base, tokens, 0, rate, Outer(*outer), budget)[0], held_out)
        rate, outer = min(tried, key=lambda constants: tried[constants])
        losses = [tried[rate, outer]]
        for seed in range(1, options.seeds):
            losses.append(measured(rule(base, tokens, seed, rate, Outer(*outer), budget)[0], held_out))
        used = rule(base, tokens, 0, rate, Outer(*outer), Budget(1, 1, 1))[1]
        falls[name] = first - statistics.mean(losses)
        share = falls[name] / falls.get("full fine-tuning", falls[name])
        print(
            f"{name:18} {rate:10g}  {outer!s:11}  {' '.join(f'{loss:.4f}' for loss in losses):34}  "
            f"{statistics.mean(losses):.4f}  {share:5.2f}  {used:13,.0f}",
            flush=True,
        )
    print(f"{time.perf_counter() - began_s:.0f} s")


if __name__ == "__main__":
    main()
