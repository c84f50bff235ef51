"""Page of messages: each message that it lists exists, and none is missing."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest
from own_sources import ROOT, nodes

from swarmtrain.error_codes import CODES

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
GAP = "…"
END = "\0"
"""End mark of a string in the searched text."""
RAISED = {
    "ClockError", "ForeignError", "InviteError", "NoAnswerError", "OptionsError", "Problem", "RefusedError",
    "RunFileError", "RunTimeError", "UserError", "WarningEvent",
}  # fmt: skip
SHORTEST = 8


def literal(node: ast.expr) -> str:
    """Return a string as it is written, with a gap for each filled-in value; a gap alone if it is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
    if isinstance(node, ast.BinOp):
        return literal(node.left) + literal(node.right)
    return GAP


@cache
def written() -> tuple[str, dict[str, str]]:
    """Return all strings of the package in one, and messages of errors and warnings by place."""
    strings, messages = [], {}
    for name, node in nodes():
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
            strings.append(literal(node))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in RAISED:
            given = [*node.args[:1], *(item.value for item in node.keywords if item.arg == "message")]
            for message in map(literal, given):
                if len(message.replace(GAP, "").strip(": ")) >= SHORTEST:
                    messages[f"{name}:{node.lineno}"] = message
    return END.join(strings), messages


def stems() -> list[str]:
    """List the page's messages: words in backticks in the first cells of its tables, without the checks' names; in
    tables of codes, the second cells."""
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    written = [stem for row in rows for stem in re.findall(r"`([^`]+)`", row) if not re.fullmatch("[a-z]+", stem)]
    return [*written, *(stem for each in CODES.values() for stem in each.says)]


def says(stem: str, text: str) -> bool:
    """Return whether a string of `text` has the parts of `stem` between its gaps, in that order."""
    parts = (re.escape(part.strip()) for part in stem.strip(GAP).split(GAP))
    return re.search(f"[^{END}]*".join(parts), text) is not None


@pytest.mark.parametrize("stem", stems())
def test_what_the_page_lists_is_said_somewhere(stem: str) -> None:
    assert says(stem, written()[0]), f"nothing says this: reword docs/troubleshooting.md: {stem}"


def test_what_is_said_is_in_the_page() -> None:
    listed = stems()
    missing = {where: text for where, text in written()[1].items() if not any(says(stem, text) for stem in listed)}
    assert not missing, f"say in docs/troubleshooting.md what it means and what to do: {missing}"


NEXT_STEP = re.compile(
    r"\b(allow|allowed|ask|check|choose|convert|correct|create|delete|end (it|this)|export|fetch|give|"
    r"install|join|leave|let|look|lower|make|move|name|possible|raise|remove|report|restart|save|say|see|set|start|"
    r"supported|take|tell|there are|try|update|use|write)\b|example is|`swarmtrain|its name must"
)
"""Words by which a message names what to do, or what would do."""
OTHERS = ("the published run: ", "and … ")
"""Prefixes of messages about another peer's bytes, where the caller says what to do; and of "and 3 more problems"."""


def filled_in(name: str, message: ast.expr) -> Iterator[str]:
    """Yield what a message of the module `name` says in its filled-in values, as far as the source tells: the strings
    of a constant, of what a variable is set to, or of the function that is called."""
    for value in (node.value for node in ast.walk(message) if isinstance(node, ast.FormattedValue)):
        called = value.func if isinstance(value, ast.Call) else value
        yield from set_to(name).get(ast.unparse(called).split(".")[-1], ())


@cache
def strings_by_target() -> dict[str, dict[str, list[str]]]:
    """Return the strings in the values of each variable and in each function: by its name, then by module."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, node in nodes():
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            target, value = node.targets[0].id, node.value
        elif isinstance(node, ast.FunctionDef):
            target, value = node.name, ast.Module(node.body[ast.get_docstring(node) is not None :], [])
        else:
            continue
        strings = (one for one in ast.walk(value) if isinstance(one, ast.Constant) and isinstance(one.value, str))
        found.setdefault(target, {}).setdefault(name, []).extend(one.value for one in strings)
    return found


@cache
def imported_by() -> dict[str, set[str]]:
    """Return the names that each module imports from others."""
    found: dict[str, set[str]] = {}
    for name, node in nodes():
        if isinstance(node, ast.ImportFrom):
            found.setdefault(name, set()).update(alias.name for alias in node.names)
    return found


@cache
def set_to(module: str) -> dict[str, list[str]]:
    """Return the strings in the values of each variable of a module, and in each of its functions; those of other
    modules too for what it imports."""
    imported = imported_by().get(module, set())
    found: dict[str, list[str]] = {}
    for target, by_module in strings_by_target().items():
        for name, strings in by_module.items():
            if name == module or target in imported:
                found.setdefault(target, []).extend(strings)
    return found


def test_every_error_names_a_next_step() -> None:
    """But for scenario files, whose messages show what they refuse."""
    checked, without = 0, {}
    for name, node in nodes():
        if not isinstance(node, ast.Call) or not node.args or name.startswith("swarmtrain/simulate/"):
            continue
        if ast.unparse(node.func).split(".")[-1] not in (RAISED | {"OptionError"}) - {"WarningEvent"}:
            continue
        text = literal(node.args[0])
        if len(text.replace(GAP, "").strip(": ")) < SHORTEST or text.startswith(OTHERS):
            continue
        checked += 1
        if not any(map(NEXT_STEP.search, [text, *filled_in(name, node.args[0])])):
            without[f"{name}:{node.lineno}"] = text
    assert checked > 100 and not without, f"say what to do: {without}"


def test_every_check_of_doctor_has_a_name_in_the_page() -> None:
    paths = [ROOT / "swarmtrain" / "peer" / "doctor" / name for name in ("doctor.py", "machine.py", "devices.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in paths)
    names = set(re.findall(r'Finding\(\s*"([a-z]+)"', source))
    table = set(re.findall(r"^\| `([a-z]+)` \|", PAGE, re.MULTILINE))
    assert names == table
