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


DECISIONS = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
STATUS = re.compile(r"Status: (?:holds|replaced(?: in part)? by (?P<by>.+))")
ONE_OF_THEM = re.compile(r"\[(\d{4})\]\((\d{4}-[a-z0-9-]+\.md)\)")


@pytest.mark.parametrize("decision", DECISIONS, ids=lambda path: path.stem[:4])
def test_every_decision_has_a_status(decision: Path) -> None:
    title, _, status, blank, *_ = decision.read_text(encoding="utf-8").split("\n")
    assert title.startswith(f"# {decision.stem[:4]}: ") and not blank
    said = STATUS.fullmatch(status)
    assert said, f"{decision.name}: the third line is its status, not {status!r}"
    if said["by"] is not None:
        later = ONE_OF_THEM.findall(said["by"])
        assert later, f"{decision.name} names nothing that replaces it"
        for number, name in later:
            assert name.startswith(number) and number > decision.stem[:4]
            assert (decision.parent / name).exists(), f"{decision.name} is replaced by {name}, which does not exist"


def test_every_command_and_its_visible_options_are_in_their_page() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for heading in ("## `join`", "## `bootstrap`", "## `generate`"):
        assert heading in page
    join = page.split("## `join`")[1].split("\n## ")[0]
    assert "| `--up MBIT` |" in join and "`SWARMTRAIN_JOIN_UP`" in join
    assert "--only-announced" not in page, "hidden options are for programs"
