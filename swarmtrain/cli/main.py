"""Entry point of `swarmtrain`: finds a command, runs it, and turns errors into one line and an exit code.

Rules of this folder: one file per command, named like it, with a click command called `command`. A command module
imports only click and light modules of this folder at its top, so that `swarmtrain --help` needs no torch. To add a
command, write the file and add its name to `COMMANDS`.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
import threading
from typing import Any, NoReturn

import click

from swarmtrain import __version__
from swarmtrain.cli.option_errors import OptionsError
from swarmtrain.cli.output import PrintableFormatter, echo
from swarmtrain.errors import INTERRUPTED, Problem, SwarmtrainError, UserError, with_code
from swarmtrain.words import one_line, printable

COMMANDS = (
    *("bootstrap", "join", "local"),
    *("status", "watch", "logs", "pause", "resume", "leave", "limits", "invite", "service"),
    *("init", "check", "plan", "doctor", "simulate", "export", "report", "eval", "generate", "explain"),
)

ALIASES = {
    "stop": ("leave",),
    **dict.fromkeys(("list", "ls", "ps"), ("status", "--all")),
    "log": ("logs",),
}
"""Words from habits with other programs, and the commands they stand for. Help does not list them."""

_RUN_WAYS = "local RUN.toml (train here), join INVITE (take part) or bootstrap RUN.toml (begin a run for others)"
_MEANT = {
    **dict.fromkeys(("train", "start", "run", "fit", "launch"), _RUN_WAYS),
    **dict.fromkeys(("serve", "host", "publish", "server", "master", "create"), "bootstrap RUN.toml"),
    **dict.fromkeys(("connect", "volunteer", "worker", "client"), "join INVITE"),
    **dict.fromkeys(("kill", "quit", "exit", "end", "down", "terminate"), "leave, which ends a peer cleanly"),
    "restart": "leave, and then join --dir FOLDER, which goes on as before",
    **dict.fromkeys(("download", "fetch", "pull", "save"), "export INVITE --to FOLDER, which fetches the model"),
    **dict.fromkeys(("chat", "sample", "complete", "infer"), "generate MODEL --prompt TEXT, which continues a text"),
    **dict.fromkeys(("evaluate", "test", "score"), "eval MODEL"),
    **dict.fromkeys(("info", "show", "top", "monitor"), "status or watch"),
    **dict.fromkeys(("validate", "lint", "verify"), "check RUN.toml"),
    **dict.fromkeys(("new", "config"), "init, which writes a run file"),
    **dict.fromkeys(("token", "share"), "invite"),
    "help": "--help, or COMMAND --help",
    "version": "--version",
}
"""Words that are no command, and what a person who types them may mean."""


class _Commands(click.Group):
    """Commands in the order of `COMMANDS`, each imported when it is used.

    Each option can be set by a variable, since containers have settings files: SWARMTRAIN_JOIN_UP=5 is `join --up 5`.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"swarmtrain.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        _name_variables(command, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        args = [*ALIASES.get(args[0], args[:1]), *args[1:]]
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            near = _MEANT.get(args[0]) or next(iter(difflib.get_close_matches(args[0], (*COMMANDS, *ALIASES), n=1)), "")
            meant = f"did you mean {near}?" if near else f"there are {', '.join(COMMANDS)}"
            raise OptionsError(f"No such command {args[0]!r}; {meant}", ctx, code="no-such-command")
        return super().resolve_command(ctx, args)


def _name_variables(command: click.Command, words: str) -> None:
    """Name the variable of each option of a command, and of those in a group of commands."""
    for option in command.params:
        if isinstance(option, click.Option):  # click itself would name the variable by the function's argument
            name = max(option.opts, key=len).strip("-")
            option.envvar = f"SWARMTRAIN_{words}_{name}".replace("-", "_").upper()
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            _name_variables(inner, f"{words}_{name}")


_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}


@click.group(cls=_Commands, invoke_without_command=True, context_settings=_SETTINGS)
@click.version_option(__version__, message="swarmtrain %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Train one model together, on ordinary machines, over the internet."""
    if ctx.invoked_subcommand is None:
        echo(ctx.get_help())


def run(arguments: list[str]) -> int:
    """Run one command line (without the program's name); returns the exit code. Errors are printed, never raised.

    A command ends with code 0 by returning None, with another code by `ctx.exit(code)`, with an error by raising a
    `SwarmtrainError`.
    """
    if logging.lastResort is not None:  # writes warnings to the terminal where a command sets up no log
        logging.lastResort.setFormatter(PrintableFormatter())
    try:
        returned = cli.main(arguments, prog_name="swarmtrain", standalone_mode=False)
        sys.stdout.flush()
    except SwarmtrainError as error:
        for problem in error.problems:
            _print_error(problem, problem.code)
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        see = f" (see {context.command_path} --help)" if context is not None else ""
        _print_error(f"{error.format_message()}{see}", getattr(error, "code", ""))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone; Python would complain again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # a bug
        problem = _logged_bug(error)
        _print_error(problem, problem.code)
        return 1
    return returned if isinstance(returned, int) else 0


def _print_error(message: str, code: str) -> None:
    """Print an error in one line, in which nothing controls the terminal, whoever wrote it."""
    echo(with_code(one_line(" ".join(f"error: {message}".split())), code), err=True)


def _logged_bug(error: Exception) -> Problem:
    """Write the traceback of a bug outside a peer's log to a file; returns one line about it."""
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="swarmtrain-error-", suffix=".log", delete=False) as log:
        log.write(printable("".join(traceback.format_exception(error))))
    from swarmtrain.peer.control.logs import bug_in_words

    return bug_in_words(error, log.name)


def main() -> None:
    """Entry point of the installed command."""
    code = run(sys.argv[1:])
    if code == UserError.exit_code and _is_under_launchd():
        code = 0  # it would start this again for ever, which changes nothing; the error is in its log
    if "torch" in sys.modules and hasattr(threading, "_shutdown"):
        _end_at_once(code)
    sys.exit(code)


def _is_under_launchd() -> bool:
    from swarmtrain.cli.service import UNDER_LAUNCHD

    return bool(os.environ.get(UNDER_LAUNCHD))


def _end_at_once(code: int) -> NoReturn:
    """End as Python does, but without tearing down its modules, which takes half a second with torch."""
    import atexit

    try:
        threading._shutdown()  # type: ignore[attr-defined]  # joins threads and ends thread pools
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, KeyboardInterrupt):  # let Python report it
        sys.exit(code)
    os._exit(code)
