"""Today's code decides what was recorded, and its weights are the recorded ones (README.md says how and why)."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from drive import drive, run_bytes
from lines import INNER, Line, Recording, all_files, load, typed
from make import text_sha256
from replay import ReplayedPeer, replay_lines, text_from
from simulated import LEARNING as LEARNT
from simulated import record_learning, record_systems, recorded_schedule
from swarm import write_run

from swarmtrain.protocol.gossip.merge_plans import MergePlan, MergePlanner, TrainersRound
from swarmtrain.run import RunFile, run_sha256

pytestmark = pytest.mark.slow

APART_SHARE = 0.01
"""Relative difference allowed if bits may differ: rounding to two bits amplifies differences. It was 0.0016 at most
when a processor with AVX2 played what one with AVX-512 had recorded."""
MOST_BYTES = 5_000_000
REAL, LEARNING, SYSTEMS = all_files("real"), all_files("learning"), all_files("systems")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute in one thread, as when it was recorded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def names(files: list[Path]) -> list[str]:
    return [path.name.partition(".")[0] for path in files]


def precision(recorded: Recording) -> str:
    header = recorded.header
    how = "to the bit" if header.is_to_the_bit else f"within {APART_SHARE:.0%}: this torch or processor computes others"
    return f"recorded by torch {header.torch_version} with {header.cpu_capability}; weights are compared {how}"


def test_there_are_six_real_runs_and_six_simulated_ones_whose_lines_are_known() -> None:
    files = [*REAL, *LEARNING, *SYSTEMS]
    assert (len(REAL), len(LEARNING), len(SYSTEMS)) == (6, 4, 2)
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    for path in files:
        for line in load(path).lines:
            if line["kind"] not in INNER:
                one = typed(line)
                unread = line.keys() - {"kind", "peer", "block", "number", "at_s"} - vars(one).keys()
                assert not unread, f"{path.name}: {type(one).__name__} has no {unread}"


@pytest.mark.parametrize("path", REAL, ids=names(REAL))
def test_gossip_decides_what_it_decided_when_it_is_fed_the_events_alone(path: Path) -> None:
    recorded, same = load(path), Counter[str]()
    for number, peer in enumerate(recorded.header.peers):
        for num_lines, difference in drive(recorded, number):
            assert difference is None, f"{peer['name']}: {difference}"
            same[peer["name"]] += num_lines
    print(f"the same lines: {dict(same)}")
    assert min(same.values()) > 100


@pytest.mark.parametrize("path", REAL, ids=names(REAL))
def test_the_trainer_tells_gossip_of_the_same_merges(path: Path) -> None:
    told = [line for line in load(path).lines if line["kind"] == "plans"]
    assert len(told) > 50
    for line in told:
        assert plain([asdict(plan) for plan in plans_of(line)]) == line["found"]


def plans_of(line: Line) -> list[MergePlan]:
    """Return the planner's plans after so many steps."""
    planner = MergePlanner(len(line["began_s"]))
    names = ("inner_steps", "merge_after", "gradient_format", "steps_per_s")
    of = TrainersRound(number=line["round"], **{name: line[name] for name in names})
    planner.round_began(of, line["round_began_s"])
    planner.began_s = line["began_s"]
    return planner._plans(line["done"], line["now"])


@pytest.mark.parametrize("path", REAL, ids=names(REAL))
def test_the_simulators_peer_does_what_real_ones_did(path: Path, tmp_path: Path) -> None:
    recorded = load(path)
    header, how = recorded.header, recorded.header.how
    write_run(tmp_path, how["text"]["number"])
    assert text_sha256(tmp_path) == how["text"]["sha256"], "`swarm.write_run` makes another text than it did"
    held_out = base64.b64decode(how["held_out"])
    text = text_from(run_bytes(how["run_toml"]), held_out, tmp_path, [peer["id"] for peer in header.peers])
    text = replace(text, sha256=run_sha256(how["run_toml"].encode()))  # of which its choices followed
    world = replay_lines(text, recorded.lines, is_to_the_bit=header.is_to_the_bit)
    print(f"{precision(recorded)}; the same decisions: {dict(world.decisions)}")
    for told, peer in zip(header.peers, world.peers, strict=True):
        assert isinstance(peer, ReplayedPeer)
        print(f"{told['name']}: {peer.num_rounds} merges, {peer.num_equal} equal to the bit")
        if header.is_to_the_bit:
            assert peer.num_equal == peer.num_rounds, f"of {told['name']}"
        if told["last"] is not None:
            assert peer.round == told["last"]["round"] and peer.learner.loop.batches.position == told["last"]["batches"]
            assert_same_weights(recorded, peer.trainer.state.theta, told["last"]["theta"])
            assert peer.num_rounds > 2, "it merged next to nothing"


@pytest.mark.parametrize("path", LEARNING, ids=names(LEARNING))
def test_the_learning_simulator_plays_what_it_played(path: Path, tmp_path: Path) -> None:
    recorded = load(path)
    header = recorded.header
    assert (header.how["sections"], header.how["changes"]) == tuple(plain(LEARNT[header.name])), (
        "make the recording anew"
    )
    found = record_learning(header.name, tmp_path)
    print(precision(recorded))
    now, then = (RunFile.model_validate(each.how["run"]) for each in (found.header, header))
    assert now == then, "the run file has other defaults than it had, or a key is gone"
    assert_same(recorded, found)
    for told, peer in zip(header.peers, found.header.peers, strict=True):
        assert (peer["name"], peer["rounds"]) == (told["name"], told["rounds"])
        assert_same_weights(recorded, vector(peer["theta"]), told["theta"])


@pytest.mark.parametrize("path", SYSTEMS, ids=names(SYSTEMS))
def test_the_systems_simulator_plays_what_it_played(path: Path) -> None:
    recorded = load(path)
    how = recorded.header.how
    found = record_systems(recorded.header.name, recorded_schedule(how["schedule"]))
    assert_same(recorded, found)
    assert found.header.how["fingerprint"] == how["fingerprint"]


def assert_same(recorded: Recording, found: Recording) -> None:
    """Line by line, hashes of weights too where they can be the same."""
    for told, line in zip_longest(recorded.lines, found.lines):
        if told is not None and line is not None and not recorded.header.is_to_the_bit:
            told, line = without_arithmetic(told), without_arithmetic(line)
        assert line == told, f"found\n  {line}\nand recorded was\n  {told}"
    print(f"the same lines: {dict(Counter(line['kind'] for line in found.lines))}")


def without_arithmetic(line: Line) -> Line:
    """Less what other bits change: hashes, and what a rule takes of a gradient, so how many tokens it counts for."""
    rest = {key: value for key, value in line.items() if not key.endswith("_sha256")}
    if line["kind"] == "decoded":
        del rest["tokens"]
    return {**rest, "found": bool(line["found"][1])} if line["kind"] == "accepted" else rest


def assert_same_weights(recorded: Recording, theta: torch.Tensor, told: str) -> None:
    """Check the last weights of a peer."""
    expected = vector(told)
    if recorded.header.is_to_the_bit:
        assert torch.equal(theta, expected)
    else:
        assert float((theta - expected).norm() / expected.norm()) <= APART_SHARE


def plain(value: Any) -> Any:
    """Convert a value as JSON does."""
    return json.loads(json.dumps(value if isinstance(value, dict) else list(value)))


def vector(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
