"""What is wrong with a command line, where swarmtrain itself finds it: Click's errors, with a code.

What Click finds by itself, such as an option that does not exist, has none.
"""

from __future__ import annotations

import click

__all__ = ["OptionError", "OptionsError"]


class OptionsError(click.UsageError):
    """Options that do not go together, or lack one."""

    def __init__(self, message: str, ctx: click.Context | None = None, *, code: str) -> None:
        super().__init__(message, ctx)
        self.code = code


class OptionError(click.BadParameter):
    """An option's value that cannot be used."""

    def __init__(self, message: str, ctx: click.Context, param: click.Parameter, *, code: str) -> None:
        super().__init__(message, ctx, param)
        self.code = code
