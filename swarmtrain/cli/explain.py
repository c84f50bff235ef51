"""`swarmtrain explain`: say what the code of an error or a warning means, and what to do."""

from __future__ import annotations

import click

from swarmtrain.cli.common import example
from swarmtrain.cli.option_errors import OptionError
from swarmtrain.cli.output import echo
from swarmtrain.errors import with_code


def _code(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Read a code, with or without the brackets that it has at the end of a message."""
    from swarmtrain.error_codes import CODES

    code = value.strip().strip("[]").lower()
    if code and code not in CODES:
        import difflib

        near = difflib.get_close_matches(code, CODES, n=1)
        meant = f"did you mean {near[0]}?" if near else "`swarmtrain explain` lists them"
        raise OptionError(f"no error has the code {value!r}; {meant}", ctx, param, code="no-such-code")
    return code


@click.command(epilog=example("swarmtrain explain port-taken"))
@click.argument("code", metavar="[CODE]", default="", callback=_code)
def command(code: str) -> None:
    """Explain an error or a warning, and what to do.

    CODE is the word in brackets at the end of a message. Without CODE, lists all codes.
    """
    import re

    from swarmtrain.error_codes import CODES

    if not code:
        for name, each in CODES.items():
            echo(f"{name:<24}{each.says[0] if each.says else each.do}")
        return
    found = CODES[code]
    for message in found.says:
        echo(with_code(message, code))
    do = re.sub(r"\[([^]]+)\]\((?:[^)]+)\)", r"\1", found.do)
    echo(click.wrap_text(do, width=100, initial_indent="  ", subsequent_indent="  "))
