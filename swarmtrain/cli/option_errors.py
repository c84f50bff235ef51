"""Errors of a command line that swarmtrain itself finds: Click's errors, with a code.

Errors that Click finds, such as an unknown option, have no code.
"""

from __future__ import annotations

import click


class OptionsError(click.UsageError):
    """Options that exclude each other, or that lack another one."""

    def __init__(self, message: str, ctx: click.Context | None = None, *, code: str) -> None:
        super().__init__(message, ctx)
        self.code = code


class OptionError(click.BadParameter):
    """Unusable value of an option."""

    def __init__(self, message: str, ctx: click.Context, param: click.Parameter, *, code: str) -> None:
        super().__init__(message, ctx, param)
        self.code = code
