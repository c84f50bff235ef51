"""Recompute what peers of stages did, in one process, from their logs, and without the code that computed it first.

Each step copies the weights; a backward is the gradient of a forward with the copy that the forward had. A peer's
inputs are found by their digests among the others' outputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from stage_peer import BATCH_TOKENS, CONSTANTS, MICROBATCH_TOKENS, MICROBATCHES, MODEL, digest, microbatch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from swarmtrain.algorithm.inner import InnerOptimizer
from swarmtrain.model.stages import build_stage, stage_shapes

Weights = dict[str, Tensor]


class Peer:
    """Log of one peer, as far as it is recomputed."""

    def __init__(self, folder: Path, boundaries: tuple[int, ...], num_batches: int) -> None:
        recorded = json.loads((folder / "log.json").read_text())
        self.name, self.stage, self.log = recorded["peer"], recorded["stage"], recorded["log"]
        self.folder, self.num_batches = folder, num_batches
        self.module = build_stage(stage_shapes(MODEL, boundaries)[self.stage], 5)
        self.inner = InnerOptimizer(self.module.named_parameters(), CONSTANTS)
        self.weights = self._copy()
        self.forwards: dict[tuple[Any, ...], tuple[Tensor, Weights, int]] = {}
        self.sums: dict[int, Weights] = {}
        self.entered: dict[tuple[Any, ...], tuple[int, Weights]] = {}
        self.num_subtracted = 0
        self.next = self.num_steps = self.most_lag = 0
        self.loss_difference = 0.0

    def _copy(self) -> Weights:
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def go_on(self, made: dict[str, Tensor], numbers: dict[str, int]) -> bool:
        """Recompute as far as inputs exist; returns whether anything was recomputed."""
        began = self.next
        while self.next < len(self.log):
            entry = self.log[self.next]
            if entry["kind"] == "step":
                self._step(entry)
            elif entry["kind"] == "subtract":
                self._subtract(entry)
            elif entry["kind"] == "discard":
                self.sums.pop(entry["batch"], None)
            elif entry["kind"] != "forget":
                assert entry["kind"] in ("forward", "backward", "tail"), entry
                if entry["takes"] not in made:
                    break
                gives = self._compute(entry, made[entry["takes"]], numbers)
                if gives is not None:
                    made[entry["gives"]] = gives
            self.next += 1
        return self.next > began

    def _compute(self, entry: dict[str, Any], takes: Tensor, numbers: dict[str, int]) -> Tensor | None:
        key = tuple(entry["key"])
        if entry["kind"] == "forward":
            self.forwards[key] = takes, self.weights, self.num_steps
            return functional_call(self.module, self.weights, (takes,)).detach()
        if entry["kind"] == "backward":
            x, weights, step = self.forwards.pop(key)
            self.most_lag = max(self.most_lag, self.num_steps - step)
            leaves, x = _leaves(weights), _leaf(x)
            out = (functional_call(self.module, leaves, (x,)) * takes).sum()
            return self._differentiate(entry, out, leaves, x)
        leaves, x = _leaves(self.weights), _leaf(takes)
        targets = microbatch(numbers[key[0]] + key[1])[:, 1:]
        loss = cross_entropy(functional_call(self.module, leaves, (x,)).flatten(0, 1), targets.flatten())
        self.loss_difference = max(self.loss_difference, abs(float(loss.detach()) - entry["loss"]))
        return self._differentiate(entry, loss / MICROBATCHES, leaves, x)

    def _differentiate(self, entry: dict[str, Any], out: Tensor, leaves: Weights, x: Tensor) -> Tensor | None:
        inputs = [*leaves.values(), *([x] if x.requires_grad else [])]
        gradients = torch.autograd.grad(out, inputs)
        of_weights = dict(zip(leaves, gradients, strict=False))
        self.entered[tuple(entry["key"])] = entry["batch"], of_weights
        sums = self.sums.setdefault(entry["batch"], {})
        for name, gradient in of_weights.items():
            sums[name] = sums[name] + gradient if name in sums else gradient
        return gradients[-1] if x.requires_grad else None

    def _subtract(self, entry: dict[str, Any]) -> None:
        batch, of_weights = self.entered[tuple(entry["key"])]
        self.sums[batch] = {name: self.sums[batch][name] - gradient for name, gradient in of_weights.items()}
        self.num_subtracted += 1

    def _step(self, entry: dict[str, Any]) -> None:
        assert entry["tokens"] == MICROBATCH_TOKENS * len(entry["keys"])
        sums = self.sums.pop(entry["batch"])
        for name, parameter in self.module.named_parameters():
            parameter.grad = sums[name] * (BATCH_TOKENS / entry["tokens"])
        self.inner.step(self.num_steps / self.num_batches)
        self.num_steps += 1
        self.weights = self._copy()

    def weights_difference(self) -> float:
        """Return the largest difference from the peer's own final weights."""
        own = load_file(self.folder / "weights.safetensors")
        return max(float((own[name] - weight).abs().max()) for name, weight in self.weights.items())


def _leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_() if x.is_floating_point() else x


def _leaves(weights: Weights) -> Weights:
    return {name: weight.clone().requires_grad_() for name, weight in weights.items()}


def replay(folders: list[Path], boundaries: tuple[int, ...], num_batches: int) -> list[Peer]:
    """Recompute all peers whose logs are in these folders; returns them, drivers first, in the order of their data."""
    peers = [Peer(folder, boundaries, num_batches) for folder in folders]
    numbers = {peer.name: 1000 * index for index, peer in enumerate(peers) if peer.stage == 0}
    data = [microbatch(start + n)[:, :-1] for start in numbers.values() for n in range(MICROBATCHES * num_batches)]
    made = {digest(x): x for x in data}
    while sum(peer.go_on(made, numbers) for peer in peers):
        pass
    for peer in peers:
        assert peer.next == len(peer.log), f"nobody gave what {peer.log[peer.next]} took"
    return peers
