"""Run files with changes, as benchmarks take them on their command lines."""

from __future__ import annotations

import tomllib
from pathlib import Path

from swarmtrain.run import RunFile


def read_run(path: Path, changes: list[str], seed: int) -> RunFile:
    """Read the run file with `section.key=value` changes, values as in TOML."""
    values = tomllib.loads(path.read_text())
    for change in [*changes, f"run.seed={seed}"]:
        key, _, value = change.partition("=")
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = tomllib.loads(f"value = {value}")["value"]
    return RunFile.model_validate(values)
