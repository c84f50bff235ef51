"""Where text goes to the terminal: names, texts and errors in it may be others', and must not control the terminal.

Commands write with `echo`, screens with the `TerminalConsole` of `terminal.py`, which adds its styles afterwards.
"""

from __future__ import annotations

import logging

import click

from swarmtrain.words import printable


def echo(text: str, *, nl: bool = True, err: bool = False) -> None:
    """Write a text, which may have several lines, without what would control the terminal."""
    click.echo(printable(text), nl=nl, err=err)


class PrintableFormatter(logging.Formatter):
    """Formats log messages as Python does, without what would control a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
