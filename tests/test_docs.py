"""Generated pages are what their generator writes, and links between pages lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args, get_origin

import pytest

from swarmtrain.run import RunFile

ROOT = Path(__file__).resolve().parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generator() -> ModuleType:
    return script("generate")


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


@pytest.mark.parametrize("section", RunFile.model_fields)
def test_each_value_of_a_key_is_an_item_of_a_list(section: str) -> None:
    """A field that takes one of a few values says what each of them means (`problems.with_values`)."""
    for key, field in generator().section_of(RunFile.model_fields[section]).model_fields.items():
        _, *items = (field.description or "").split("\n")
        listed = re.findall(r'^- `"([\w:./-]+)"`: [A-Z0-9].*\.$', "\n".join(items), re.MULTILINE)
        assert len(listed) == len(items), f"{section}.{key}"
        if get_origin(field.annotation) is Literal:
            assert sorted(listed) == sorted(get_args(field.annotation)), f"{section}.{key}"
        elif isinstance(field.json_schema_extra, dict) and (allowed := field.json_schema_extra.get("allowed")):
            assert sorted(listed) == sorted(re.findall(r'"([^"]+)"', str(allowed))), f"{section}.{key}"


PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


DECISIONS = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
STATUS = re.compile(r"Status: (?:holds|withdrawn|replaced(?: in part)? by (?P<by>.+))")
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


def test_the_site_has_every_page() -> None:
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    for page in set((ROOT / "docs").glob("**/*.md")) - set((ROOT / "docs" / "archive").iterdir()):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert f"- {name}\n" in contents or page in DECISIONS, f"add {name} to `nav` of mkdocs.yml"
    for name in re.findall(r"- ([\w/-]+\.md)\n", contents):
        assert name == "changelog.md" or (ROOT / "docs" / name).exists(), f"mkdocs.yml has {name}, which does not exist"


@pytest.mark.parametrize(
    ("page", "link", "in_the_site"),
    [
        ("index.md", "[merging](docs/merging.md#one-bad-partner)", "[merging](merging.md#one-bad-partner)"),
        ("index.md", "[in\ntwo lines](docs/results/README.md)", "[in\ntwo lines](results/README.md)"),
        ("results/demo.md", "[log](../lab-log.md)", "[log](../lab-log.md)"),
        ("pipelines.md", "[readme](../README.md#read-on)", "[readme](index.md#read-on)"),
        (
            "control.md",
            "[its messages](../protos/a.proto)",
            "[its messages](https://example.org/r/blob/main/protos/a.proto)",
        ),
        (
            "control.md",
            "[there](#below) and [far](https://example.org/)",
            "[there](#below) and [far](https://example.org/)",
        ),
        ("control.md", "```\n[code](../protos/a.proto)\n```", "```\n[code](../protos/a.proto)\n```"),
    ],
)
def test_links_of_the_site_lead_to_its_pages_or_to_the_repository(page: str, link: str, in_the_site: str) -> None:
    assert script("site_hooks").with_links(link, page, "https://example.org/r/") == in_the_site


def test_files_of_a_repository_without_an_address_are_named() -> None:
    link = "[its messages](../protos/a.proto), [`a.proto`](../protos/a.proto)"
    assert script("site_hooks").with_links(link, "control.md", "") == "its messages (`protos/a.proto`), `a.proto`"


@pytest.mark.parametrize(
    ("written", "in_the_site"),
    [
        ("these:\n- one\n- two\n  more\n- three", "these:\n\n- one\n- two\n  more\n- three"),
        ("these:\n| a |\n|---|\n| 1 |", "these:\n\n| a |\n|---|\n| 1 |"),
        ("these:\n1. one\n2. two", "these:\n\n1. one\n2. two"),
        ("```sh\nls\n- no list\n```", "```sh\nls\n- no list\n```"),
    ],
)
def test_lists_and_tables_of_the_site_begin_after_an_empty_line(written: str, in_the_site: str) -> None:
    assert script("site_hooks").with_blank_lines(written) == in_the_site
