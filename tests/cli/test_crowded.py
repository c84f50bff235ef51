"""`local` says before it starts that so many volunteers are too many for this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmtrain.cli import local
from swarmtrain.cli.local import crowded_in_words
from swarmtrain.cli.main import run


@pytest.mark.parametrize(
    ("volunteers", "threads", "slowdowns", "cores", "said"),
    [
        (2, 1, (), 2, ""),
        (3, 1, (2, 2.5, 4), 2, ""),
        (3, 1, (), 2, "3 volunteers want 3 cores and this machine has 2 cores: they take turns, and each trains 1.5"),
        (3, 1, (), 2, "times slower than it is told to; --peers 2 fits"),
        (8, 2, (), 4, "4.0 times slower than it is told to; --peers 2 fits"),
        (40, 1, (), 4, "10.0 times slower than it is told to, and may consider each other lost; --peers 4 fits"),
        (1, 3, (), 2, "--threads 2 is the most"),
        (2, 1, (1, 2), 1, "2 volunteers want 1.5 cores and this machine has 1 core"),
        (2, 1, (1, 2), 1, "--slowdown 1.5,3 fits"),
    ],
)
def test_too_many_volunteers(
    volunteers: int, threads: int, slowdowns: tuple[float, ...], cores: int, said: str
) -> None:
    words = crowded_in_words(volunteers, threads, slowdowns, cores)
    assert said in words and bool(said) == bool(words)


def test_what_is_said_to_fit_fits() -> None:
    words = crowded_in_words(3, 1, (1.0, 1.7, 2.3), 1)
    factors = tuple(map(float, words.partition("--slowdown ")[2].partition(" fits")[0].split(",")))
    assert not crowded_in_words(3, 1, factors, 1)


def test_it_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*args: object) -> None:
        assert "warning: 9 volunteers want 9 cores" in capsys.readouterr().err
        raise local.click.ClickException("started")

    monkeypatch.setattr(local, "_train", train)
    monkeypatch.setattr(local, "_num_cores", lambda: 2)
    (tmp_path / "run.toml").write_text("[run]\ntotal_tokens = 100_000\n")
    assert run(["local", str(tmp_path / "run.toml"), "--peers", "9", "--dir", str(tmp_path / "swarm")]) == 1
    assert "started" in capsys.readouterr().err
