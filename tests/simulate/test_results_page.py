"""`make results`: a scenario is played once, and its table stands in the page between the markers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from learnt import write_scenario

from swarmtrain.simulate import comparison

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_page", ROOT / "benchmarks" / "results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_room_for_them(results: ModuleType) -> None:
    results.parts_of((ROOT / "docs" / "results" / "scenarios.md").read_text(encoding="utf-8"))
    with pytest.raises(SystemExit, match="the page needs the lines"):
        results.parts_of("<!-- results: end -->\n<!-- results: begin -->\n")


def test_a_scenario_replaces_its_own_and_no_other(results: ModuleType) -> None:
    page = f"# Results\n\n{results.BEGIN}\n\nnone yet\n\n{results.END}\nthe end\n"
    for name, text in ("b", "of b"), ("c", "of c\n\n```text\nmethod\n```"), ("a", "of a"), ("b", "of b, anew"):
        page = results.with_scenario(page, name, text)
    before, scenarios, after = results.parts_of(page)
    assert before == "# Results\n\n" and after == "\nthe end\n"
    assert scenarios == {"a": "of a", "b": "of b, anew", "c": "of c\n\n```text\nmethod\n```"}
    assert list(scenarios) == ["a", "b", "c"] and results.with_scenario(page, "a", "of a") == page


def test_what_was_played_is_not_played_again(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, page = tmp_path / "scenarios", tmp_path / "scenarios.md"
    folder.mkdir()
    written = write_scenario(tmp_path, scenario={"run": "../run.toml"}, set={"run.total_tokens": 3000})
    written.rename(folder / "tiny.toml")
    (folder / "hours.toml").write_text("nobody reads this\n")
    page.write_text(f"{results.BEGIN}\n\n## old\n\nkept\n\n{results.END}\n")
    arguments = ["tiny", "--scenarios", str(folder), "--page", str(page), "--jobs", "1"]
    assert results.main(arguments) == 0
    first = page.read_text()
    scenarios = results.parts_of(first)[1]
    assert scenarios["old"] == "kept" and "\ngossip" in scenarios["tiny"] and "nats/byte" in scenarios["tiny"]
    assert "1 of 1: tiny" in capsys.readouterr().err

    def play(*_: Any) -> Any:
        raise AssertionError("it was played before")

    monkeypatch.setattr(comparison, "_play", play)
    assert results.main(arguments) == 0 and page.read_text() == first
    with pytest.raises(SystemExit):
        results.main(["equals", *arguments[1:]])
    assert "there is no scenario equals; there are hours, tiny" in capsys.readouterr().err
    assert results.main(["hours", *arguments[1:]]) == 2 and page.read_text() == first
