"""Option by which a person chooses the trackers that draw a peer's curves: `--report-to`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from swarmtrain.cli.option_errors import OptionError

TRACKERS = ("tensorboard", "wandb", "trackio")
"""Trackers that there are; each is also the name of its package and of the extra that installs it."""


def report_to_option(kind: type[click.Option]) -> Callable[[Any], Any]:
    """Return the decorator that adds `--report-to`, of this class; the command receives a tuple of trackers."""
    return click.option(
        "--report-to",
        cls=kind,
        callback=_trackers,
        multiple=True,
        metavar="TRACKER",
        help="Draw curves in tensorboard, wandb or trackio; may be repeated, or several after commas. A volunteer draws its own, a bootstrap the whole run's.  [default: none]",
    )


def _trackers(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Parse the trackers, each given once; `none` alone is none."""
    names = tuple(dict.fromkeys(name.strip() for value in values for name in value.split(",") if name.strip()))
    if names == ("none",):
        return ()
    for name in names:
        if name not in TRACKERS:
            raise OptionError(
                f"{name!r} is not a tracker; write tensorboard, wandb or trackio, or none",
                ctx,
                param,
                code="bad-tracker",
            )
        if not _is_installed(name):
            from swarmtrain.extras import install_in_words

            raise OptionError(f"{name} is not installed: {install_in_words(name)}", ctx, param, code="package-missing")
    return names


def _is_installed(package: str) -> bool:
    from importlib.metadata import PackageNotFoundError, distribution

    try:  # not by its module: a folder of that name, such as the one that wandb leaves, would pass for it
        distribution(package)
    except PackageNotFoundError:
        return False
    return True
