"""Run all published comparisons again, and write their tables into docs/results/scenarios.md: `make results`.

    python benchmarks/results.py                 # each scenario of examples/scenarios
    python benchmarks/results.py equal churn     # these

Each is `swarmtrain simulate` with the file as it is, which continues where it was interrupted. The page is written
after each scenario; the text of the others stays.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from swarmtrain import __version__
from swarmtrain.cli.main import run
from swarmtrain.network.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def parts_of(page: str) -> tuple[str, dict[str, str], str]:
    """Split the page into (head, text by scenario, tail). Raises SystemExit if the two markers are missing."""
    before, begin, rest = page.partition(BEGIN)
    between, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"the page needs the lines {BEGIN} and {END}, in that order")
    found = re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", between, re.MULTILINE | re.DOTALL)
    return before, {name: text.strip() for name, text in found}, after


def with_scenario(page: str, name: str, text: str) -> str:
    """Return the page with a scenario's text, sorted by name among the others."""
    before, scenarios, after = parts_of(page)
    scenarios[name] = text
    between = "".join(f"## {name}\n\n{text}\n\n" for name, text in sorted(scenarios.items()))
    return f"{before}{BEGIN}\n\n{between}{END}{after}"


def made_by() -> str:
    """Return the versions that made the results."""
    commit = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = f"swarmtrain {__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}"
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {versions}, commit {commit or 'not known'}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", metavar="NAME", help="of the scenarios, without .toml; none: all")
    parser.add_argument("--scenarios", type=Path, default=ROOT / "examples" / "scenarios")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "scenarios.md")
    parser.add_argument("--jobs", help="runs at once; a core each unless said")
    parser.add_argument("--fresh", action="store_true", help="run all anew, also what was run before")
    asked = parser.parse_args(arguments)
    paths = {path.stem: path for path in sorted(asked.scenarios.glob("*.toml"))}
    if missing := [name for name in asked.only if name not in paths]:
        parser.error(f"there is no scenario {missing[0]}; there are {', '.join(paths)}")
    parts_of(asked.page.read_text(encoding="utf-8"))  # fail before hours of work
    options = [*(["--jobs", asked.jobs] if asked.jobs else []), *(["--fresh"] if asked.fresh else [])]
    names = asked.only or list(paths)
    for number, name in enumerate(names, 1):
        print(f"{number} of {len(names)}: {name}", file=sys.stderr)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = run(["simulate", str(paths[name]), *options])
        if code:
            return code
        page, table = asked.page.read_text(encoding="utf-8"), f"```text\n{printed.getvalue().rstrip()}\n```"
        if not parts_of(page)[1].get(name, "").endswith(table):  # otherwise the text keeps the versions that made it
            write_atomically(asked.page, with_scenario(page, name, f"{made_by()}:\n\n{table}").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
