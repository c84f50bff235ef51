"""The page of messages: each it lists is one of ours, and none of ours is missing."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
GAP = "…"
RAISED = {
    "ClickException", "ForeignError", "InviteError", "NoAnswerError", "RefusedError", "RunFileError", "RunTimeError",
    "UsageError", "UserError", "WarningEvent",
}  # fmt: skip
SHORTEST = 8


def literal(node: ast.expr) -> str:
    """A string as it is written, with a gap for what is filled in; a gap alone for what is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
    if isinstance(node, ast.BinOp):
        return literal(node.left) + literal(node.right)
    return GAP


@cache
def written() -> tuple[list[str], dict[str, str]]:
    """Every string of the package; and of what is raised or warned of, the message by where it is."""
    strings, messages = [], {}
    for path in sorted((ROOT / "swarmtrain").rglob("*.py")):
        if path.parent.name == "v1":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                strings.append(literal(node))
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in RAISED:
                given = [*node.args[:1], *(item.value for item in node.keywords if item.arg == "message")]
                for message in map(literal, given):
                    if len(message.replace(GAP, "").strip(": ")) >= SHORTEST:
                        messages[f"{path.relative_to(ROOT)}:{node.lineno}"] = message
    return strings, messages


def stems() -> list[str]:
    """What the page lists: the words in backticks of the first cells of its tables, but for the checks' names."""
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    return [stem for row in rows for stem in re.findall(r"`([^`]+)`", row) if not re.fullmatch("[a-z]+", stem)]


def says(stem: str, message: str) -> bool:
    """Whether the parts of `stem` between its gaps are in `message`, in that order."""
    place = 0
    for part in (part.strip() for part in stem.split(GAP)):
        found = message.find(part, place)
        if found < 0:
            return False
        place = found + len(part)
    return True


@pytest.mark.parametrize("stem", stems())
def test_what_the_page_lists_is_said_somewhere(stem: str) -> None:
    assert any(says(stem, text) for text in written()[0]), f"nothing says this: reword docs/troubleshooting.md: {stem}"


def test_what_is_said_is_in_the_page() -> None:
    listed = stems()
    missing = {where: text for where, text in written()[1].items() if not any(says(stem, text) for stem in listed)}
    assert not missing, f"say in docs/troubleshooting.md what it means and what to do: {missing}"


def test_every_check_of_doctor_has_a_name_in_the_page() -> None:
    paths = [ROOT / "swarmtrain" / "peer" / name for name in ("doctor.py", "machine.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in paths)
    names = set(re.findall(r'Finding\(\s*"([a-z]+)"', source)) | {"disk"}
    table = set(re.findall(r"^\| `([a-z]+)` \|", PAGE, re.MULTILINE))
    assert names == table
