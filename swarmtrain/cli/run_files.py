"""Argument RUN.toml of several commands: a run file, or the name of an example that comes with swarmtrain."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import swarmtrain
from swarmtrain.errors import RunFileError

if TYPE_CHECKING:
    from swarmtrain.run import RunFile

_SCRIPTS = {"finetune": ("docstrings.py",)}
"""Scripts that write the text of an example."""

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class GivenRun:
    """Value given for RUN.toml."""

    argument: str
    """Argument as it was typed; it means the same to another command that is started in this folder."""
    path: Path
    base: Path
    """Folder to which the run's data paths are relative: the file's folder; for an example, the working directory."""

    @property
    def to_start_again(self) -> str:
        """Argument to type in another folder: the file's absolute path, or the example's name."""
        return str(self.path.absolute()) if Path(self.argument) == self.path else self.argument

    def load(self) -> RunFile:
        """Load the run.

        Raises RunFileError, which lists the examples if there is no such file.
        """
        from swarmtrain.model.base import with_base_path
        from swarmtrain.run import load_run
        from swarmtrain.words import one_line

        if self.path.exists() or not (names := list(examples())):
            return with_base_path(load_run(self.path), self.base)
        near = difflib.get_close_matches(Path(self.argument).stem, names, n=1, cutoff=0.8)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise RunFileError(
            f"{one_line(self.argument)}: no such run file; give the path of one, or the name of an example that comes "
            f"with swarmtrain{meant}: {', '.join(names)}",
            code="no-run-file",
        )

    def load_resolved(self) -> RunFile:
        """Load the run as `load` does, with the shape of its model, which may have to be asked of the hub.

        Raises RunFileError.
        """
        from swarmtrain.model.base import resolved_run

        return resolved_run(self.load(), self.base)


def examples() -> dict[str, Path]:
    """Map names to the run files that came with this installation; in a clone, to those in `examples`."""
    return {path.stem: path for path in sorted(_folder().glob("*.toml"))}


def example_scripts(name: str) -> list[Path]:
    """Return the scripts that belong to an example: they write its text."""
    return [_folder() / script for script in _SCRIPTS.get(name, ())]


def _folder() -> Path:
    package = Path(swarmtrain.__file__).resolve().parent
    clone = package.parent
    return clone / "examples" if (clone / "pyproject.toml").is_file() else package / "examples"


def _given(ctx: click.Context, param: click.Parameter, value: str) -> GivenRun:
    path = Path(value)
    if not path.is_file() and (found := examples().get(value)):
        return GivenRun(value, found, Path())
    return GivenRun(value, path, path.parent)


def run_argument(function: _F) -> _F:
    """Give a command the argument RUN.toml; it receives it as `given`."""
    return click.argument("given", metavar="RUN.toml", callback=_given)(function)


def run_examples() -> str:
    """Say what RUN.toml can be, for a command's help, before its own examples."""
    names = list(examples())
    halves = [", ".join(names[: len(names) // 2]), ", ".join(names[len(names) // 2 :])]
    head = "\b\nRUN.toml is a file, or the name of an example that comes with swarmtrain:\n  "
    return head + ",\n  ".join(halves) + "\n\n"
