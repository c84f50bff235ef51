"""Names in `docs/architecture.md` exist: each file, each function or class in one, each folder of the package."""

from __future__ import annotations

import ast
import functools
import re

import pytest
from own_sources import PACKAGE, ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FILES = sorted(set(re.findall(r"(?<![\w/.(-])([\w/-]+\.(?:py|proto|toml|md))(?::([A-Za-z_][\w.]*))?", PAGE)))
FOLDERS = sorted(set(re.findall(r"`([\w/]+/)`", PAGE)))


def path_of(name: str) -> str | None:
    """Find a file or folder below the package or the root; returns its path from the root, or None."""
    found = next((path for path in (PACKAGE / name, ROOT / name, ROOT / "docs" / name) if path.exists()), None)
    return None if found is None else found.relative_to(ROOT).as_posix()


@functools.cache
def names_of(path: str) -> frozenset[str]:
    """Return what a module defines: `name`, and `Class.name` of methods and attributes, those of `__init__` too."""
    found = set[str]()

    def look(body: list[ast.stmt], within: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(within + node.name)
                if isinstance(node, ast.ClassDef):
                    look(node.body, f"{within}{node.name}.")
                elif within:
                    found.update(within + each.attr for each in ast.walk(node) if is_own(each))
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(within + each.id for each in targets if isinstance(each, ast.Name))

    look(ast.parse((ROOT / path).read_text(encoding="utf-8")).body, "")
    return frozenset(found)


def is_own(node: ast.AST) -> bool:
    """Return whether `self.x` is set."""
    is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    return is_set and isinstance(node.value, ast.Name) and node.value.id == "self"


@pytest.mark.parametrize(("file", "name"), FILES, ids=lambda value: value or "-")
def test_each_place_exists(file: str, name: str) -> None:
    path = path_of(file)
    assert path is not None, f"docs/architecture.md names {file}, which is not there"
    if name:
        assert name in names_of(path), f"docs/architecture.md names {file}:{name}, which is not there"


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_exists(folder: str) -> None:
    assert path_of(folder) is not None, f"docs/architecture.md names {folder}, which is not there"


def test_each_folder_of_the_package_is_named() -> None:
    folders = {path.parent.relative_to(PACKAGE).as_posix() + "/" for path in PACKAGE.rglob("__init__.py")} - {"./"}
    assert not folders - set(FOLDERS), f"docs/architecture.md says nothing of {sorted(folders - set(FOLDERS))}"


def test_rows_of_tables_stay_short() -> None:
    """Longer ones are hard to read: split them into rows, or write a list."""
    assert not [line for line in PAGE.splitlines() if line.startswith("|") and len(line) > 200]


def test_enough_is_looked_at() -> None:
    assert len(FILES) > 150
    assert sum(bool(name) for _, name in FILES) > 120
