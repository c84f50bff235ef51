"""Options that a peer's folder remembers: given once, they apply whenever the peer is started there again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from swarmtrain.cli.background import say
from swarmtrain.cli.option_errors import OptionsError
from swarmtrain.peer.lifecycle.folder_lock import is_in_use
from swarmtrain.peer.lifecycle.start_options import Started, StartedFile, option_words

_GIVEN = "swarmtrain.given_options"
_NOT_GIVEN = (ParameterSource.DEFAULT, None)


class KeptOption(click.Option):
    """Option whose value is stored as typed, and read from the folder if it is not given."""

    @property
    def flag(self) -> str:
        """Name of the option as it is typed."""
        return next(name for name in self.opts if name.startswith("--"))

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        processed = super().process_value(ctx, value)
        source = ctx.get_parameter_source(self.name or "")
        if source not in _NOT_GIVEN:
            # The environment keeps its own values: removed there, they must not come back from the folder.
            words = None if source is ParameterSource.ENVIRONMENT else self._words(value)
            ctx.meta.setdefault(_GIVEN, {})[self.flag] = words
        return processed

    def _words(self, value: Any) -> tuple[str, ...]:
        if self.is_flag:
            return ()
        values = value if isinstance(value, list | tuple) else (value,)
        is_path = isinstance(self.type, click.Path)
        return tuple(os.path.abspath(item) if is_path else str(item) for item in values)  # noqa: PTH100 - not resolved

    def read(self, ctx: click.Context, words: tuple[str, ...]) -> Any:
        """Parse the words that were typed for the option at an earlier start, and return its value."""
        return super().process_value(ctx, True if self.is_flag else list(words) if self.multiple else words[0])


def given_options(ctx: click.Context) -> Mapping[str, tuple[str, ...] | None]:
    """Return the options of a parsed command line that a folder remembers, as typed; None for a variable's value."""
    return ctx.meta.get(_GIVEN, {})  # type: ignore[no-any-return]


def restore(folder: Path, command: tuple[str, ...]) -> tuple[dict[str, Any], Started]:
    """Return remembered values by parameter, for options not given now, and all options of this start.

    The values are of the last start of `command[0]` in `folder`; it prints which ones it took. Raises a usage error if
    a value can no longer be used.
    """
    ctx = click.get_current_context()
    given = given_options(ctx)
    kept = StartedFile(folder).read()
    options = dict(kept.options) if kept.command[:1] == command[:1] else {}
    values: dict[str, Any] = {}
    taken: dict[str, tuple[str, ...]] = {}
    for param in ctx.command.params:
        if isinstance(param, KeptOption) and param.name and param.flag in options and param.flag not in given:
            taken[param.flag] = options[param.flag]
            try:
                values[param.name] = param.read(ctx, options[param.flag])
            except (click.UsageError, IndexError) as error:
                what = error.format_message() if isinstance(error, click.UsageError) else "it has no value"
                raise OptionsError(
                    f"{param.flag}, which {folder} remembers from last time: {what}; give {param.flag} again",
                    code="kept-option",
                ) from None
    if taken and not is_in_use(folder):  # else it is refused, in one line
        say(f"as last time in {folder}: {' '.join(option_words(taken))}")
    typed = {flag: words for flag, words in given.items() if words is not None}
    return values, Started(command, {**taken, **typed})
