"""Scenario files: what happens when, and what must hold."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from chaos.faults import ACTIONS

__all__ = ["Scenario", "Step", "read"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """Something done to the victims, so long after the step before it."""

    do: str
    after_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A swarm, what is done to it, and what must hold. `files` lie over the others in `docker compose`; the run is of
    `total_tokens`, which take it so long that it ends by itself some time after `watch_s` are over. The first `victims`
    are they; or the `victim` is "host", one through which the work of the volunteer behind the firewall goes.
    `return_within_s` 0: the victims are not to come back. `victims_train`: nor do they stand still meanwhile.
    `spread_rounds` 0: how near all weights are is not looked at."""

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
        """The same swarm, to which nothing happens."""
        files = self.files if self.victim else ()
        return Scenario(
            name=" ".join(["none", str(self.volunteers), str(self.total_tokens), *files]),
            says="nothing",
            volunteers=self.volunteers,
            total_tokens=self.total_tokens,
            files=files,
        )


def read(path: Path) -> Scenario:
    """A scenario file; ValueError for what is not known."""
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
