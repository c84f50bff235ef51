"""Memory that a process may use: the machine's, or its container's if that is less, wherever memory is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from codes import raises_code

from swarmtrain.cli.estimate import doubts
from swarmtrain.errors import UserError
from swarmtrain.machine_memory import Memory, machine_memory
from swarmtrain.model import run_model
from swarmtrain.model.run_model import check_positions
from swarmtrain.peer.estimate import estimate
from swarmtrain.run import parse_run
from swarmtrain.run_model import ModelSection


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/outer/inner\n")
    groups = tmp_path / "groups"
    (groups / "outer" / "inner").mkdir(parents=True)
    whole = machine_memory(groups, own)
    assert whole.limited_by == "this machine"
    (groups / "outer" / "memory.max").write_text("300000000\n")
    (groups / "outer" / "memory.current").write_text("200000000\n")
    (groups / "outer" / "memory.stat").write_text("anon 5\ninactive_file 50000000\n")
    (groups / "outer" / "inner" / "memory.max").write_text("max\n")
    assert machine_memory(groups, own) == Memory(300_000_000, 150_000_000, "the container")

    own.write_text("5:cpu:/x\n4:memory:/docker/abc\n")
    (groups / "memory").mkdir()
    (groups / "memory" / "memory.limit_in_bytes").write_text("200000000\n")
    (groups / "memory" / "memory.usage_in_bytes").write_text("150000000\n")
    assert machine_memory(groups, own) == Memory(200_000_000, 50_000_000, "the container")
    assert machine_memory(groups, tmp_path / "nowhere").limited_by == "this machine"


def test_what_does_not_fit_a_container_is_refused_with_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    section = ModelSection(context_tokens=100_000)
    check_positions(section)
    monkeypatch.setattr(run_model, "machine_memory", lambda: Memory(50_000_000, 10, "the container"))
    with raises_code("too-little-memory", UserError, "the container has 50 MB"):
        check_positions(section)
    run = parse_run("[run]\ntotal_tokens = 1_000_000\n", "r")
    cost = estimate(run, 10**6, 3)
    assert "the container has 50 MB" in doubts(run, cost, (10**7,), run_model.machine_memory())[-1]
