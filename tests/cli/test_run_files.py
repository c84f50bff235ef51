"""RUN.toml: a file, or the name of an example that comes with swarmtrain."""

from __future__ import annotations

import resource
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from codes import codes_in
from own_sources import ROOT

from swarmtrain.cli import run_files
from swarmtrain.cli.main import cli
from swarmtrain.cli.main import run as run_command
from swarmtrain.cli.run_files import example_scripts
from swarmtrain.extras import EXTRAS
from swarmtrain.run import load_run

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAMES = ["batch", "diloco", "finetune", "gpt-124m", "own-text", "own-weights", "pipeline", "stdlib-gpt"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_an_example_is_found_from_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "diloco").mkdir()
    for name, run in (("stdlib-gpt", "run stdlib-gpt\n"), ("diloco", "run diloco-gpt\n")):
        assert run_command(["check", name]) == 0
        out = capsys.readouterr().out
        assert run in out and "no warnings" in out


def test_a_file_of_that_name_goes_first_and_nothing_but_the_bare_name_is_an_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stdlib-gpt").write_text('[run]\nname = "mine"\ntotal_tokens = 50_000_000\n')
    assert run_command(["check", "stdlib-gpt"]) == 0
    assert "run mine\n" in capsys.readouterr().out
    for given in ("own-text.toml", "./own-text", "examples/own-text.toml", "../own-text"):
        assert run_command(["check", given]) == 2
        error = capsys.readouterr().err
        assert codes_in(error) == ["no-run-file"] and f"{given}: " in error and "own-text?" in error


def test_a_wrong_name_lists_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("check", "plan", "bootstrap", "local"):
        assert run_command([command, "stdlip-gpt"]) == 2
        error = capsys.readouterr().err
        assert codes_in(error) == ["no-run-file"] and error.count("\n") == 1
        assert f"stdlib-gpt?): {', '.join(NAMES)}" in error
        text = " ".join(CliRunner().invoke(cli, [command, "--help"]).output.split())
        assert f"the name of an example that comes with swarmtrain: {', '.join(NAMES)}" in text


def test_an_examples_data_lie_where_the_command_is_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["check", "own-text"]) == 2
    assert f"no file matches texts/**/*.txt below {tmp_path};" in capsys.readouterr().out
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("".join(f"a line, number {number**3}\n" for number in range(60_000)))
    assert run_command(["check", "own-text"]) == 0
    assert "no warnings" in capsys.readouterr().out


def test_an_installation_without_its_clone_has_them_in_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid out as pip does; somebody else's folder `examples` beside the package is not ours."""
    for folder in ("examples", "swarmtrain/examples"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"of-{folder.replace('/', '-')}.toml").write_text("")
    (tmp_path / "swarmtrain" / "__init__.py").write_text("")
    monkeypatch.setattr(run_files.swarmtrain, "__file__", str(tmp_path / "swarmtrain" / "__init__.py"))
    assert list(run_files.examples()) == ["of-swarmtrain-examples"]


def test_init_writes_a_run_file_that_check_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["init"]) == 0
    out = capsys.readouterr().out
    assert out == "wrote run.toml; what it trains and costs: swarmtrain check run.toml\n"
    assert run_command(out.partition("swarmtrain ")[2].split()) == 0
    assert "no warnings" in capsys.readouterr().out
    text = (tmp_path / "run.toml").read_text()
    assert "#   swarmtrain local run.toml " in text and "examples/" not in text
    assert load_run(tmp_path / "run.toml") == load_run(ROOT / "examples" / "stdlib-gpt.toml")


@pytest.mark.parametrize("name", NAMES)
def test_init_writes_any_example_wherever_it_is_told(name: str, tmp_path: Path) -> None:
    (tmp_path / "my runs").mkdir()
    assert run_command(["init", "my runs", "--example", name]) == 0
    assert load_run(tmp_path / "my runs" / "run.toml") == load_run(ROOT / "examples" / f"{name}.toml")
    assert "swarmtrain check 'my runs/run.toml'" in (tmp_path / "my runs" / "run.toml").read_text()


def test_init_writes_the_script_that_writes_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("run.toml", "second.toml"):
        assert run_command(["init", name, "--example", "finetune"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("docstrings.py writes the example's text, in the folder where it is started\n")
        (tmp_path / "docstrings.py").write_text("mine")
    assert (tmp_path / "docstrings.py").read_text() == "mine"


def test_init_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text("mine")
    for path, code in (("run.toml", "file-exists"), ("nowhere/run.toml", "file-not-written")):
        assert run_command(["init", path]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {path}: ") and codes_in(said) == [code]
    assert (tmp_path / "run.toml").read_text() == "mine" and not (tmp_path / "nowhere").exists()


def test_init_leaves_no_part_of_a_file_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # bytes of any file
    try:
        assert run_command(["init"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert codes_in(capsys.readouterr().err) == ["file-not-written"]
    assert not (tmp_path / "run.toml").exists()
    assert run_command(["init"]) == 0


def test_the_wheel_has_each_example() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    files = {f"{name}.toml" for name in NAMES} | {path.name for name in NAMES for path in example_scripts(name)}
    assert included == {f"examples/{name}": f"swarmtrain/examples/{name}" for name in files}
    assert {path.name for path in (ROOT / "examples").iterdir() if path.is_file()} == files


def test_what_messages_say_to_install_is_what_the_extras_install() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert {name: libraries.split() for name, libraries in EXTRAS.items()} == {
        n: e for n, e in extras.items() if n not in ("dev", "docs")
    }
    said = [path for path in ROOT.glob("swarmtrain/**/*.py") if "swarmtrain[" in path.read_text()]
    assert not said, "no package of that name is published"
