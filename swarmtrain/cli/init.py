"""`swarmtrain init`: write a run file to start from."""

from __future__ import annotations

from pathlib import Path

import click

from swarmtrain.cli.common import example
from swarmtrain.cli.output import echo
from swarmtrain.cli.run_files import example_scripts, examples
from swarmtrain.errors import UserError

_NAME = "run.toml"
_EXAMPLE = "stdlib-gpt"


@click.command(
    name="init", epilog=example("swarmtrain init", "swarmtrain init my-run.toml", "swarmtrain init --example own-text")
)
@click.argument("path", metavar="[PATH]", type=click.Path(path_type=Path), default=_NAME)
@click.option("--example", "name", type=click.Choice(list(examples())), default=_EXAMPLE, show_default=True, help="Example to start from.")  # fmt: skip
def command(path: Path, name: str) -> None:
    """Write a commented run file for you to edit.

    PATH is the file to write, or an existing folder, in which the file is called run.toml; without PATH, it writes
    run.toml here. A script that writes an example's text comes with it. It never overwrites a file.
    """
    import shlex

    from swarmtrain.words import one_line

    path = path / _NAME if path.is_dir() else path
    text = _begun(examples()[name].read_text(encoding="utf-8"), name, path)
    try:
        _write_new(path, text)
    except FileExistsError:
        raise UserError(
            f"{path}: already exists, and is not overwritten; give another PATH", code="file-exists"
        ) from None
    except OSError as error:
        raise _not_written(path, error) from None
    for script in example_scripts(name):
        beside = path.parent / script.name
        try:
            _write_new(beside, script.read_text(encoding="utf-8"))
        except FileExistsError:
            pass  # of an earlier `init`, or the person's own
        except OSError as error:
            path.unlink(missing_ok=True)
            raise _not_written(beside, error) from None
        echo(f"{shlex.quote(one_line(str(beside)))} writes the example's text, in the folder where it is started")
    where = shlex.quote(one_line(str(path)))
    echo(f"wrote {where}; what it trains and costs: swarmtrain check {where}")


def _not_written(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written: {error.strerror}; give another PATH", code="file-not-written")


def _write_new(path: Path, text: str) -> None:
    """Write a new file. Raises FileExistsError if there is one, and OSError if it cannot be written; no part of it is
    left then, which the next `init` would refuse to overwrite."""
    file = path.open("x", encoding="utf-8")
    try:
        with file:
            file.write(text)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _begun(text: str, name: str, path: Path) -> str:
    """Replace the command lines at the head of an example by what to do next."""
    import shlex

    from swarmtrain.words import one_line

    where = shlex.quote(one_line(str(path)))
    head = (
        f"# A run file, written by `swarmtrain init` from the example {name}. Change what you like, then:\n"
        "#\n"
        f"#   swarmtrain check {where}        # what it trains and costs, with warnings\n"
        f"#   swarmtrain local {where}        # trains here, with several volunteers\n"
        f"#   swarmtrain bootstrap {where}    # publishes it: others join with the line that this prints\n"
        "#\n"
        "# Keys that are not here have defaults: docs/run-file.md lists them all.\n"
        "\n"
    )
    return head + text[text.index("[run]") :]
