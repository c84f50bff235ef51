"""Scenario files of the chaos tests: what happens when, and what must hold."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from chaos.faults import ACTIONS


@dataclass(frozen=True, kw_only=True)
class Step:
    """Fault applied to the victims, some time after the previous step."""

    do: str
    after_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Swarm, its faults, and what must hold.

    - `files` extend the others in `docker compose`;
    - `total_tokens` must last until some time after `watch_s`, when the run ends by itself;
    - the first `victims` volunteers are the victims; or `victim` is "host", a host of the hidden volunteer;
    - `return_within_s` 0: the victims need not come back; `victims_train`: they too must not be delayed meanwhile;
    - `spread_rounds` 0: the spread of the weights is not checked.
    """

    name: str
    says: str
    steps: tuple[Step, ...] = ()
    files: tuple[str, ...] = ()
    volunteers: int = 4
    victims: int = 1
    victim: str = ""
    total_tokens: int = 500_000
    settle_s: float = 15.0
    watch_s: float = 35.0
    return_within_s: float = 30.0
    gap_s: float = 3.0
    stall_share: float = 0.01
    worse_share: float = 0.03
    spread_rounds: int = 0
    victims_train: bool = False

    @property
    def without(self) -> Scenario:
        """Return the same swarm without faults."""
        files = self.files if self.victim else ()
        return Scenario(
            name=" ".join(["none", str(self.volunteers), str(self.total_tokens), *files]),
            says="nothing",
            volunteers=self.volunteers,
            total_tokens=self.total_tokens,
            files=files,
        )


def read(path: Path) -> Scenario:
    """Read a scenario file. Raises ValueError for unknown keys and values."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    _check(path, set(data), {each.name for each in fields(Scenario)} - {"name"})
    steps = tuple(Step(**step) for step in data.pop("steps", ()))
    _check(path, {step.do for step in steps}, set(ACTIONS))
    scenario = Scenario(name=path.stem, steps=steps, files=tuple(data.pop("files", ())), **data)
    if not 0 <= scenario.victims <= scenario.volunteers:
        raise ValueError(f"{path}: {scenario.victims} victims of {scenario.volunteers} volunteers")
    return scenario


def _check(path: Path, given: set[str], known: set[str]) -> None:
    for name in sorted(given - known):
        near = difflib.get_close_matches(name, known, 1) or sorted(known)
        raise ValueError(f"{path}: {name!r} is not known: did you mean {', '.join(near)}?")
