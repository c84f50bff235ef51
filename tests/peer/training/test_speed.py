"""Guess of a machine's speed before its first round, and the warning that no round of it could be merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.peer.training import speed
from swarmtrain.peer.training.speed import most_steps_per_s, too_slow_in_words
from swarmtrain.run import RunFile


def run_file(width: int = 16, **merge: Any) -> RunFile:
    return RunFile.model_validate(
        {
            "run": {"total_tokens": 10**9},
            "model": {"context_tokens": 16, "num_layers": 8, "width": width, "num_heads": 2},
            "inner": {"batch_sequences": 16},
            "merge": {"inner_steps": 512, **merge},
        }
    )


def test_only_a_large_model_on_a_processor_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "operations_per_s", lambda compute: 6e12)
    assert most_steps_per_s(run_file(), ComputeDevice()) == 0.0
    assert most_steps_per_s(run_file(512), ComputeDevice(torch.device("cuda:0"))) == 0.0
    monkeypatch.setattr(speed, "num_parameters", lambda section: 100_000_000)
    monkeypatch.setattr(speed, "operations_per_token", lambda run: 6 * 100_000_000)
    assert most_steps_per_s(run_file(512), ComputeDevice()) == pytest.approx(1e4 / 256), "256 tokens a step"


@pytest.mark.parametrize(
    ("own", "others", "merge", "rounds"),
    [
        (1.0, [1.0, 1.0], {}, None),
        (1 / 256, [1.0, 1.0], {}, None),
        (1 / 2560, [1.0, 1.0], {}, 10),
        (1 / 2560, [0.0, 0.0], {}, None),  # nobody has told a speed
        (0.0, [1.0, 1.0], {}, None),  # no guess
        (1 / 2560, [1.0, 1.0], {"pacing": False}, None),
        (1 / 2560, [1.0, 1.0], {"method": "diloco", "pacing": True}, None),  # the others wait for it
    ],
)
def test_who_could_not_end_a_round_in_time_is_told_before_it_trains(
    own: float, others: list[float], merge: dict[str, Any], rounds: int | None
) -> None:
    said = too_slow_in_words(run_file(**merge), own, others)
    assert bool(said) == (rounds is not None)
    assert rounds is None or f"as long as {rounds} rounds of the others" in said
