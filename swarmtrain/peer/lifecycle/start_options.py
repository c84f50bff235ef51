"""Options with which a folder's peer was last started (`started.json`), so that they need not be repeated.

Options are kept as they were typed, by their names; the command line parses them again. Imports nothing heavy, since
commands that only look print from it how to start a peer again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from swarmtrain.network.files import write_atomically

_log = logging.getLogger(__name__)
_NAME = "started.json"


@dataclass(frozen=True)
class Started:
    """Command line of a peer: the command with its arguments, and its options with their values (none for a flag).

    `paused` is True if a person paused the peer and has not resumed it since.
    """

    command: tuple[str, ...] = ()
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    paused: bool = False

    def line(self, folder: Path | None = None) -> str:
        """Return the command line that starts the peer again, in `folder` if given."""
        words = ["swarmtrain", *self.command, *option_words(self.options)]
        return shlex.join([*words, "--dir", str(folder)] if folder is not None else words)


def option_words(options: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return options as they are typed."""
    words: list[str] = []
    for name, values in options.items():
        words += [word for value in values for word in (name, value)] if values else [name]
    return words


class StartedFile:
    """File in a peer's folder. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME
        self._lock = threading.Lock()

    def read(self) -> Started:
        """Return its contents; empty if there is no file or it cannot be read."""
        try:
            table = json.loads(self._path.read_bytes())
            options = {str(name): tuple(map(str, values)) for name, values in table["options"].items()}
            return Started(tuple(map(str, table["command"])), options, table["paused"] is True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return Started()

    def keep_command(self, started: Started | None) -> None:
        """Keep the command and its options, if known; the pause stays."""
        if started is not None:
            self._change(command=started.command, options=started.options)

    def keep_options(self, changed: Mapping[str, tuple[str, ...] | None]) -> None:
        """Keep these options; a value of None removes the option."""
        options = {**self.read().options, **changed}
        self._change(options={name: values for name, values in options.items() if values is not None})

    def keep_pause(self, paused: bool) -> None:
        """Keep whether a person has paused the peer."""
        self._change(paused=paused)

    def _change(self, **changes: object) -> None:
        with self._lock:
            before = self.read()
            after = dataclasses.replace(before, **changes)  # type: ignore[arg-type]
            if after == before:
                return
            try:
                write_atomically(self._path, json.dumps(dataclasses.asdict(after), indent=1).encode())
            except OSError as error:  # a full disk: the options must be given again next time
                _log.warning("%s cannot be written: %s", self._path, error.strerror)
