"""A scenario whose runs take a second, for the tests of what is learnt in virtual time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import tomli_w

from swarmtrain.simulate.learning.learner import Text
from swarmtrain.simulate.learning.setting import Setting, setting_of
from swarmtrain.simulate.scenario import Scenario, load_scenario

_RUN: dict[str, dict[str, Any]] = {
    "run": {"name": "tiny", "seed": 5, "total_tokens": 12_000},
    "model": {"context_tokens": 32, "num_layers": 1, "width": 16, "num_heads": 2, "feed_forward_ratio": 2.0},
    "data": {"source": "text", "paths": ["*.txt"], "held_out_bytes": 4096},
    "inner": {"batch_sequences": 4, "learning_rate": 1e-2, "warmup_fraction": 0.0},
    "merge": {"method": "gossip", "inner_steps": 8, "outer_momentum": 0.5},
}
_SCENARIO: dict[str, dict[str, Any]] = {
    "scenario": {"name": "tiny", "run": "run.toml", "methods": ["gossip"]},
    "peers": {"number": 3, "slowdowns": [1.0, 1.5, 3.0]},
    "links": {"up_mbit": 10.0, "down_mbit": 10.0, "rtt_ms": 20.0},
}


def write_scenario(folder: Path, **sections: Any) -> Path:
    """A scenario file with `sections` over what it says; its run file and text are beside it."""
    words = ["".join(random.Random(n).choices("abcdefghiklmnoprstuvw", k=2 + n % 7)) for n in range(100)]
    chance = random.Random(1)
    for number in range(4):
        text = "\n".join(" ".join(chance.choices(words, k=10)) for _ in range(200))
        (folder / f"{number}.txt").write_text(text + "\n")
    (folder / "run.toml").write_text(tomli_w.dumps(_RUN))
    table = {
        key: {**_SCENARIO.get(key, {}), **value} if isinstance(value, dict) else value
        for key, value in sections.items()
    }
    path = folder / "scenario.toml"
    path.write_text(tomli_w.dumps({**_SCENARIO, **table}))
    return path


def setting(scenario: Scenario, **changes: Any) -> Setting:
    """Of its first seed, with changes of the run file's keys (`merge__pacing=True`)."""
    pairs = tuple((key.replace("__", "."), value) for key, value in changes.items())
    run = scenario.run(scenario.scenario.seeds[0], pairs)
    return setting_of(scenario, Text.of(run, scenario.base))


def tiny(folder: Path, **sections: Any) -> Scenario:
    """Written and read."""
    return load_scenario(write_scenario(folder, **sections))
