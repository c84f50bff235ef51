"""The generated pages are what their generator writes, and links between pages lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_fresh() -> None:
    for page, write in generator().PAGES.items():
        written = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert written == write(), f"docs/{page} is stale: run `make docs`"


def test_every_field_has_a_sentence_in_its_page() -> None:
    pages = {page: write() for page, write in generator().PAGES.items() if page != "troubleshooting.md"}
    for page, text in pages.items():
        for line in text.splitlines():
            if line.startswith("| `"):
                assert line.rstrip(" |").endswith((".", ")")), f"{page}: {line}"


PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
