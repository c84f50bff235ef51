"""The package's own modules, read, parsed and walked once for all tests that look at them."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "swarmtrain"


@functools.cache
def sources() -> dict[str, str]:
    """The text of each module by its path below the root; not of those that are generated."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
        if PACKAGE / "v1" not in path.parents
    }


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Each of them, parsed by whoever tests it first: every process that shares out the tests collects the tests."""
    return {name: ast.parse(text) for name, text in sources().items()}


@functools.cache
def nodes() -> list[tuple[str, ast.AST]]:
    """Everything in them, as (module, node)."""
    return [(name, node) for name, tree in modules().items() for node in ast.walk(tree)]
