"""Merge methods' objects fit the run file that they are named in, and a package can bring one."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from codes import codes_in, raises_code
from learnt import tiny

from swarmtrain.cli.main import run as run_command
from swarmtrain.compatibility import PROTOCOL
from swarmtrain.errors import BadBytesError, RunFileError, UserError
from swarmtrain.methods import METHODS, SERVER, MergeMethod, load_object, method_named, methods_of_keys
from swarmtrain.model.gpt import build_model
from swarmtrain.peer.bootstrap import publish_run
from swarmtrain.peer.merging.costs import MergeCosts, costs_of
from swarmtrain.peer.merging.roster_exchange import SwarmExchange, exchange_of
from swarmtrain.peer.merging.server import MergeServer
from swarmtrain.peer.training.loop import ModelLoop
from swarmtrain.peer.training.round_report import what_was_merged
from swarmtrain.peer.training.session import RoundReport, Session
from swarmtrain.rehearsal import LinksSection
from swarmtrain.run import MergeSection, RunFile, parse_published_untrusted, parse_run, run_sha256
from swarmtrain.simulate import comparison
from swarmtrain.simulate.comparison import Play, compare
from swarmtrain.simulate.planning.playback import PlaybackMachines, lived


def test_each_is_found_by_its_own_name() -> None:
    assert [method.name for method in METHODS.values()] == list(METHODS) == ["gossip", "diloco", "server", "batch"]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_keys_and_defaults_are_those_of_the_run_file(method: MergeMethod) -> None:
    assert method.keys <= set(MergeSection.model_fields)
    section = MergeSection.model_validate({"method": method.name})
    assert {key: getattr(section, key) for key in method.defaults} == dict(method.defaults)
    assert section.kind is method
    others = {key for other in METHODS.values() if other is not method for key in other.defaults} - set(method.defaults)
    assert all(getattr(section, key) == MergeSection.model_fields[key].default for key in others)


def test_keys_of_some_methods_name_those_that_read_them() -> None:
    assert methods_of_keys()["theta_format"] == ("gossip", "server")
    assert methods_of_keys()["share_above"] == ("diloco", "batch")
    assert "inner_steps" not in methods_of_keys()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_its_parts_are_there(method: MergeMethod) -> None:
    run = parse_run(f'run.total_tokens = 1_000_000\nmerge.method = "{method.name}"', "a test")
    assert issubclass(exchange_of(method), SwarmExchange)
    assert isinstance(costs_of(run), MergeCosts)
    assert method.has_server == (method is SERVER)
    assert not method.has_server or issubclass(load_object(method.server), MergeServer)
    found = lived(run, PlaybackMachines(step_s=(0.5, 0.5)), LinksSection(), seed=0)
    assert len(found.round_s) == 2


# ---------------------------------------------------------------- a package's

METHOD = "swarm-hermits:alone"
MODULE = """
from swarmtrain.methods import MergeMethod
from swarmtrain.peer.merging.roster_exchange import SwarmExchange
from swarmtrain.peer.merging.costs import MergeCosts
from swarmtrain.peer.training.session import Start
from swarmtrain.peer.merging.updates import Averaged
from swarmtrain.simulate.learning.synchronous import data_parallel as learn

ALONE = MergeMethod(
    name="alone",
    says="each trains by itself.",
    exchange="swarm_hermits:Alone",
    costs="swarm_hermits:Nothing",
    lives="swarmtrain.simulate.planning.playback:by_server",
    learns="swarm_hermits:learn",
    keys=frozenset({"share_above"}),
    defaults={"outer_momentum": 0.25},
)


class Nothing(MergeCosts):
    def merge_bytes(self, run, num_parameters, others):
        return 0, 0


class Alone(SwarmExchange):
    def start_round(self, progress, steps_per_s):
        return Start(inner_steps=self.run.merge.inner_steps, num_peers=1)

    def publish(self, contribution):
        self.own = contribution

    def collect(self, fragment=0):
        own = self.own
        return Averaged(gradient=own.gradient, partners=("me",), weights=(own.tokens,), signer="me", roster_sha256="")

    def present_state(self, progress):
        return None
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Installs the package as pip would, with its entry point so."""
    folder = tmp_path / "site-packages"

    def installed(entry: str = "alone = swarm_hermits:ALONE") -> None:
        info = folder / "swarm_hermits-0.1.0.dist-info"
        info.mkdir(parents=True)
        info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: swarm-hermits\nVersion: 0.1.0\n")
        info.joinpath("entry_points.txt").write_text(f"[swarmtrain.merge_methods]\n{entry}\n")
        (folder / "swarm_hermits.py").write_text(MODULE)
        monkeypatch.syspath_prepend(folder)

    yield installed
    sys.modules.pop("swarm_hermits", None)
    method_named.cache_clear()
    load_object.cache_clear()


def run_by(method: str, more: str = "") -> RunFile:
    sections = {
        "run": "total_tokens = 4096",
        "model": "context_tokens = 32\nnum_layers = 1\nwidth = 16\nnum_heads = 2",
        "inner": "batch_sequences = 4",
        "merge": f'method = "{method}"\ninner_steps = 2\n{more}',
    }
    return parse_run("\n".join(f"[{name}]\n{keys}" for name, keys in sections.items()), "r")


def test_a_whole_method_of_a_package_trains(install: Callable[..., None]) -> None:
    install()
    run, reports = run_by(METHOD), list[RoundReport]()
    assert (run.merge.kind.name, run.merge.outer_momentum) == (METHOD, 0.25)
    swarm: Any = SimpleNamespace(rounds=SimpleNamespace(inner_steps_done=0))
    unused: Any = None
    exchange = exchange_of(run.merge.kind)(unused, swarm, run, unused)
    batches: Any = SimpleNamespace(next_batch=lambda: torch.randint(0, 256, (4, 33)))
    loop = ModelLoop(run, build_model(run.model, 0), batches)
    session = Session(run=run, parameters=loop.parameters, loop=loop, exchange=exchange, report=reports.append)
    before = session.replica.state.theta.clone()
    assert loop.train(session) == "total_tokens"
    assert session.progress.round == len(reports) == 4096 // run.round_tokens == 16
    assert what_was_merged(reports[-1])["partners"] == ("me",)
    assert not torch.equal(before, session.replica.state.theta)


def test_what_a_package_s_method_costs_is_its_own(install: Callable[..., None]) -> None:
    install()
    assert costs_of(run_by(METHOD)).merge_bytes(run_by(METHOD), 1000, 3) == (0, 0)
    assert len(lived(run_by(METHOD), PlaybackMachines(step_s=(0.5, 0.5)), LinksSection(), seed=0).round_s) == 2


def test_a_package_s_method_is_compared(install: Callable[..., None], tmp_path: Path) -> None:
    scenario = tiny(tmp_path, set={"run.total_tokens": 3000}, scenario={"methods": [METHOD, "data-parallel"]})
    with raises_code("merge-package-missing", UserError, "swarm-hermits"):
        compare(scenario, jobs=1, kept=None)
    install()
    kept = tmp_path / "kept"
    ours, same = compare(scenario, jobs=1, kept=kept).rows()
    assert (ours.method, ours.loss) == (METHOD, same.loss)
    before = comparison._path(scenario, Play(METHOD, (), 0), kept)
    assert before is not None and before.exists()
    (tmp_path / "site-packages" / "swarm_hermits.py").write_text(MODULE + "# changed")
    after = comparison._path(scenario, Play(METHOD, (), 0), kept)
    assert after is not None and not after.exists(), "what is kept is by the function's file"


def test_a_method_that_does_not_learn_there_is_not_compared(install: Callable[..., None], tmp_path: Path) -> None:
    install()
    (tmp_path / "site-packages" / "swarm_hermits.py").write_text(MODULE.replace("    learns=", "    # learns="))
    scenario = tiny(tmp_path, scenario={"methods": [METHOD]})
    with raises_code("no-such-method", UserError, METHOD):
        compare(scenario, jobs=1, kept=None)


def test_only_the_keys_that_a_package_s_method_reads_are_allowed(install: Callable[..., None]) -> None:
    install()
    assert run_by(METHOD, "share_above = 9").merge.share_above == 9
    with raises_code("keys-disagree", RunFileError, "merge.fragments", METHOD):
        run_by(METHOD, "fragments = 2")
    with raises_code("keys-disagree", RunFileError, "pipeline.stages: 2", '"gossip"'):
        run_by(METHOD, "[pipeline]\nstages = 2")


def test_a_run_by_it_is_published_and_joined_where_it_is_installed(
    install: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'[run]\ntotal_tokens = 3_000_000\n[merge]\nmethod = "{METHOD}"\n')
    assert run_command(["check", str(path)]) == 2
    said = capsys.readouterr().err
    assert codes_in(said) == ["merge-package-missing"] and "swarm-hermits" in said
    install()
    assert run_command(["check", str(path)]) == 0
    published = publish_run(parse_run(path.read_text(), "r"), tmp_path, datetime.datetime.now(datetime.UTC))
    assert parse_published_untrusted(published.data, published.sha256) == published.run
    assert b"share_above" in published.data and b"fragments" not in published.data
    sys.path.pop(0)
    method_named.cache_clear()
    with raises_code("merge-package-missing", RunFileError, "swarm-hermits"):
        parse_published_untrusted(published.data, published.sha256)


@pytest.mark.parametrize(
    ("entry", "code", "says"),
    [
        ("hermit = swarm_hermits:ALONE", "merge-package-version", "it has hermit"),
        ("alone = swarm_hermits:Nobody", "merge-package-broken", "swarm_hermits:Nobody "),
        ("alone = swarm_hermits:Alone", "merge-package-broken", "swarm_hermits:Alone "),
    ],
)
def test_what_is_wrong_with_a_package_is_said(install: Callable[..., None], entry: str, code: str, says: str) -> None:
    install(entry)
    with raises_code(code, RunFileError, f'merge.method = "{METHOD}": ', says):
        run_by(METHOD)


@pytest.mark.parametrize("name", ["alone", "../x:alone", "x:", "x:a b", "X:alone", "x" * 99 + ":y"])
def test_other_names_are_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*args: object) -> None:
        raise AssertionError("no package is looked for")

    monkeypatch.setattr("swarmtrain.methods.find_external", nothing)
    with raises_code("bad-value", RunFileError, "merge.method", "PACKAGE:METHOD"):
        run_by(name)
    data = f'[merge]\nmethod = "{name}"\n[published]\nprotocol = {PROTOCOL}\n'.encode()
    with pytest.raises(BadBytesError, match=r"merge\.method"):
        parse_published_untrusted(data, run_sha256(data))
