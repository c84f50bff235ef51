"""Modules of the package, read, parsed and walked once for all tests that inspect them."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "swarmtrain"


@functools.cache
def sources() -> dict[str, str]:
    """Map each module's path below the root to its text, without generated modules."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
        if PACKAGE / "v1" not in path.parents
    }


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Map each module's path to its syntax tree. Parsed on first use, since every test process collects all tests."""
    return {name: ast.parse(text) for name, text in sources().items()}


@functools.cache
def nodes() -> list[tuple[str, ast.AST]]:
    """List all syntax nodes, as (module, node)."""
    return [(name, node) for name, tree in modules().items() for node in ast.walk(tree)]
