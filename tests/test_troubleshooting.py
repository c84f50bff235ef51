"""Page of messages: each message that it lists exists, and none is missing."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from own_sources import ROOT, nodes

from swarmtrain.error_codes import CODES

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
GAP = "…"
END = "\0"
"""End mark of a string in the searched text."""
RAISED = {
    "ClockError", "ForeignError", "InviteError", "NoAnswerError", "OptionsError", "RefusedError", "RunFileError",
    "RunTimeError", "UserError", "WarningEvent",
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
    r"\b(allow|allowed|ask|check|choose|convert|correct|create|delete|end (it|this)|export|fetch|give|install|"
    r"join|leave|let|look|lower|make|move|name|possible|raise|remove|restart|save|say|see|set|start|take|"
    r"tell|there are|try|update|use|write)\b|`swarmtrain|its name must"
)
"""Words by which a message names what to do, or what would do."""
OTHERS = ("the published run: ", "a Hugging Face model needs ")
"""Prefixes of messages about another peer's bytes, where the caller says what to do; and with an install command."""


def test_every_error_names_a_next_step() -> None:
    """But for scenario files, whose messages show what they refuse, and for what ends in another's words."""
    errors = {}
    for name, node in nodes():
        if not isinstance(node, ast.Call) or not node.args or name.startswith("swarmtrain/simulate/"):
            continue
        if ast.unparse(node.func).split(".")[-1] in (RAISED | {"OptionError"}) - {"WarningEvent"}:
            errors[f"{name}:{node.lineno}"] = literal(node.args[0])
    long = {where: text for where, text in errors.items() if len(text.replace(GAP, "").strip(": ")) >= SHORTEST}
    without = {where: text for where, text in long.items() if not (text.endswith(GAP) or NEXT_STEP.search(text))}
    without = {where: text for where, text in without.items() if not text.startswith(OTHERS)}
    assert len(long) > 100 and not without, f"say what to do: {without}"


def test_every_check_of_doctor_has_a_name_in_the_page() -> None:
    paths = [ROOT / "swarmtrain" / "peer" / "doctor" / name for name in ("doctor.py", "machine.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in paths)
    names = set(re.findall(r'Finding\(\s*"([a-z]+)"', source)) | {"disk"}
    table = set(re.findall(r"^\| `([a-z]+)` \|", PAGE, re.MULTILINE))
    assert names == table
