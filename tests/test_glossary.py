"""Each thing has one word and each word one thing: the glossary against the names in the package."""

from __future__ import annotations

import ast
import collections
import functools
import io
import re
import tokenize

import pytest
from own_sources import ROOT, modules, sources

GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
TERMS = re.findall(r"^\*\*(.+?)\*\*:", GLOSSARY, flags=re.MULTILINE)

# Words of the glossary that once meant several things: where a name may have them, and so what they mean.
ONE_MEANING = {
    "guest": r"network/reachability/hosts|protocol/membership/hosts|simulate/systems/"
    r"|peer/control/session",
    "section": r"run|problems|rehearsal|cli/|data/|model/|peer/|methods|protocol/gossip/engine"
    r"|simulate/(scenario|comparison|links|planning/|learning/|pipeline/world|search/lives_server)",
    "settle": r"(peer|protocol|simulate)/pipeline/",
    "settlement": r"(peer|protocol|simulate)/pipeline/",
    "driver": r"(peer|protocol|simulate)/pipeline/",
}
ON_THE_WIRE = {
    "network/asynchronous/publications.py": {"section"},
    "network/discovery/records.py": {"settled"},
    "peer/pipeline/stage_service.py": {"life"},
}
"""Names that the protocol buffers have, which do not change: the adapters that translate them."""
NOT_OURS: dict[str, set[str]] = {
    "cli/doctor.py": {"mark"},
    "cli/plot.py": {"_MARK_EVERY", "mark", "marks", "marks_range"},
}
"""Other meanings of a word in the table: a tick at the end of a line, and marks on a curve."""
GERUNDS = frozenset({"accounting", "pacing", "sampling", "setting", "training"})
"""Nouns of the field that end in -ing."""


def words_of(name: str) -> list[str]:
    """Split an identifier into its words: `_OldName_of` -> old, name, of."""
    return [word.lower() for word in re.split(r"_+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)) if word]


@functools.cache
def identifiers() -> dict[str, frozenset[str]]:
    """Map each module below the package to every identifier in its code."""
    found = {}
    for path, text in sources().items():
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        found[path.removeprefix("swarmtrain/")] = frozenset(t.string for t in tokens if t.type == tokenize.NAME)
    return found


@functools.cache
def users() -> dict[str, dict[str, set[str]]]:
    """Map each word, and it without a plural's or a past tense's end, to the names that have it, by module."""
    found: dict[str, dict[str, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))
    for module, names in identifiers().items():
        for name in names:
            for word in words_of(name):
                for stem in {word, word.removesuffix("s"), word.removesuffix("ed"), word.removesuffix("ing")}:
                    found[stem][module].add(name)
    return found


def unwanted() -> list[str]:
    """List the words of the table's first column that have no other meaning which stays."""
    table = GLOSSARY.split("## Words that the code does not use")[1]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [word for row in rows if ", of " not in row for word in re.findall(r"`(\w+)`", row)]


@pytest.mark.parametrize("word", unwanted())
def test_a_word_that_was_given_up_stays_away(word: str) -> None:
    for module, names in users()[word].items():
        rest = names - ON_THE_WIRE.get(module, set()) - NOT_OURS.get(module, set())
        assert not rest, f"{module}: {sorted(rest)}; docs/glossary.md says which word to take in place of {word!r}"


@pytest.mark.parametrize("word", ONE_MEANING)
def test_a_word_means_one_thing(word: str) -> None:
    for module, names in users()[word].items():
        rest = names - ON_THE_WIRE.get(module, set())
        assert not rest or re.match(ONE_MEANING[word], module), (
            f"{module}: {sorted(rest)} has another meaning of {word!r}"
        )


@pytest.mark.parametrize("term", TERMS)
def test_the_code_has_the_glossarys_words(term: str) -> None:
    """A term that no name has is another word there, or is gone."""
    words = [word.lower() for word in re.findall(r"[A-Za-z]+", term)]
    assert all(word in users() or f"{word[:-1]}ies" in users() for word in words), term


def test_no_class_name_stands_in_two_modules() -> None:
    places: dict[str, list[str]] = collections.defaultdict(list)
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_a_module_is_named_by_a_noun() -> None:
    stems = [path.rsplit("/", 1)[1].removesuffix(".py") for path in modules()]
    assert not [stem for stem in stems if stem.endswith("ing") and stem.split("_")[-1] not in GERUNDS]
