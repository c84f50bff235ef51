"""Merge rule of another package: the one of docs/simulating.md, as pip would install it."""

from __future__ import annotations

import datetime
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from codes import raises_code
from learnt import tiny
from test_gossip_exchange import World, run_file, worlds  # noqa: F401 - a fixture

from swarmtrain.cli.main import run as run_command
from swarmtrain.errors import RunFileError, RunTimeError, UserError
from swarmtrain.peer.bootstrap import publish_run
from swarmtrain.peer.merging.robustness import robust_mean
from swarmtrain.peer.merging.rules import GROUP, mean_of
from swarmtrain.run import parse_run
from swarmtrain.simulate import comparison
from swarmtrain.simulate.comparison import Play, compare, plays_of

PAGE = (Path(__file__).parents[2] / "docs" / "simulating.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## A merge rule of your own")[2].partition("\n## ")[0]
MODULE, PROJECT = (re.findall(rf"```{kind}\n(.*?)```", SECTION, re.DOTALL)[0] for kind in ("python", "toml"))
RULE = "swarm-median:median"
RUN = f'[run]\ntotal_tokens = 3_000_000\n[merge]\nrobust = "{RULE}"\n'


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Installs a package as the page's, with `changed` in its module or project; gives the module's path."""
    folder = tmp_path / "site-packages"

    def installed(*changed: tuple[str, str]) -> Path:
        module, project = MODULE, PROJECT
        for old, new in changed:
            assert old in module + project
            module, project = module.replace(old, new), project.replace(old, new)
        table = tomllib.loads(project)["project"]
        info = folder / f"{table['name'].replace('-', '_')}-{table['version']}.dist-info"
        info.mkdir(parents=True)
        info.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {table['name']}\nVersion: {table['version']}\n"
        )
        ((group, entries),) = table["entry-points"].items()
        lines = [f"[{group}]", *(f"{name} = {place}" for name, place in entries.items())]
        info.joinpath("entry_points.txt").write_text("\n".join(lines))
        (folder / "swarm_median.py").write_text(module)
        monkeypatch.syspath_prepend(folder)
        return folder / "swarm_median.py"

    yield installed
    sys.modules.pop("swarm_median", None)
    mean_of.cache_clear()


def test_the_page_s_rule_is_short_and_the_median(install: Callable[..., Path]) -> None:
    assert len((MODULE + PROJECT).splitlines()) <= 30
    install()
    rows = [torch.full((3,), value) for value in (4.0, 1.0, 9.0, 2.0)]
    for number, expected in (2, 2.5), (3, 4.0), (4, 3.0):
        mean = robust_mean(RULE, rows[:number], [100] * number)
        assert mean is not None and mean.tolist() == [expected] * 3
    assert robust_mean(RULE, rows[:1], [100]) is None, "nobody else is there"
    whole_and_half = robust_mean(RULE, [torch.full((3,), 4.0), torch.full((3,), 2.0)], [200, 100])
    assert whole_and_half is not None and bool((whole_and_half == whole_and_half[0]).all())
    assert whole_and_half[0] == 4.0 * (200 * 200 + 100 * 100) / 300 / 200, "as of equally many tokens"


@pytest.mark.slow  # whole runs
def test_it_is_compared_and_what_is_kept_is_by_its_file(install: Callable[..., Path], tmp_path: Path) -> None:
    module, kept = install(), tmp_path / "kept"
    scenario = tiny(tmp_path, grid={"merge.robust": ["clip", RULE]}, set={"run.total_tokens": 6000})
    clip, median = compare(scenario, jobs=1, kept=kept).rows()
    assert dict(median.point) == {"merge.robust": RULE} and clip.loss != median.loss < 4.5
    path = comparison._path(scenario, Play("gossip", median.point, 0), kept)
    assert path is not None and path.exists()
    module.write_text(MODULE + "\n# changed\n")
    changed = comparison._path(scenario, Play("gossip", median.point, 0), kept)
    assert changed is not None and not changed.exists()


@pytest.mark.parametrize("changed", [(), (("/ 2\n", "* 0\n"),)], ids=["the median", "a rule of zero"])
def test_real_peers_merge_by_it(
    install: Callable[..., Path],
    worlds: list[World],  # noqa: F811
    changed: tuple[tuple[str, str], ...],
) -> None:
    install(*changed)
    worlds.append(World(run_file(robust=RULE, outer_momentum=0.0), 3))
    peers = worlds[-1].everyone()
    for partners in 0, 2:
        for peer in peers:
            peer.round(partners)
    for peer in peers[1:]:
        arrived = peer.reports[-1].arrived
        assert isinstance(arrived, tuple) and {len(each.merged) for each in arrived} == {2} == {len(arrived[-1].apart)}
        for fragment, each in enumerate(arrived):
            moved = float((peer.trainer.state_of(fragment).theta - each.prepared.theta_mean).norm())
            assert moved == 0 if changed else moved > 0, "nobody's gradient counts, nor its own"


def test_a_run_file_with_it_is_accepted_where_it_is_installed(
    install: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    assert run_command(["check", str(path)]) == 2
    assert f'merge.robust = "{RULE}" is a rule of the package swarm-median, which is not' in capsys.readouterr().out
    with raises_code("merge-package-missing", RunFileError, "ask the person who invited you"):
        mean_of(parse_run(RUN, "r").merge.robust)  # as `join` does before anything takes long
    install()
    assert run_command(["check", str(path)]) == 0 and mean_of(parse_run(RUN, "r").merge.robust)


@pytest.mark.parametrize(
    ("changed", "code", "says"),
    [
        ([("median = ", "mean = ")], "merge-package-version", "swarm-median 0.1.0; it has mean"),
        ([(GROUP, "others")], "merge-package-version", "it has none"),
        ([("def median", "def medians")], "merge-package-broken", "swarm_median:median "),
        ([("import torch\n", "import torsh\n")], "merge-package-broken", "torsh"),
        ([("import torch\n", "import torch torch\n")], "merge-package-broken", "SyntaxError"),
        ([('"swarm_median:median"', '"swarm_median:Sequence.__name__"')], "merge-package-broken", "Sequence.__name__"),
    ],
)
def test_what_is_wrong_with_a_package_is_said(
    install: Callable[..., Path], changed: list[tuple[str, str]], code: str, says: str
) -> None:
    install(*changed)
    with raises_code(code, RunFileError, f'merge.robust = "{RULE}": ', says):
        mean_of(RULE)


@pytest.mark.parametrize("result", ["[0.0]", "ordered", "ordered[0].double()"])
def test_a_rule_that_is_wrong_whatever_is_sent_ends_the_process(install: Callable[..., Path], result: str) -> None:
    install(("return (", f"return {result} # ("))
    with raises_code("merge-package-broken", RunTimeError, "fp32"):
        robust_mean(RULE, [torch.ones(3)] * 2, [100, 100])


def test_a_rule_that_writes_into_gradients_ends_the_process(install: Callable[..., Path]) -> None:
    install(("return (", "return gradients[0].mul_(2) # ("))
    with raises_code("merge-package-broken", RunTimeError, "arguments"):
        robust_mean(RULE, [torch.ones(3), torch.ones(3)], [100, 100])


@pytest.mark.parametrize("result", ["ordered[0] / 0", "ordered[7]"], ids=["not finite", "an exception"])
def test_what_others_send_ends_no_process(
    install: Callable[..., Path], result: str, caplog: pytest.LogCaptureFixture
) -> None:
    install(("return (", f"return {result} # ("))
    mean = robust_mean(RULE, [torch.ones(3), torch.zeros(3)], [100, 100])
    assert mean is not None and mean.tolist() == [1, 1, 1], "its own"
    assert "this merge leaves out the other peers" in caplog.text


def test_where_it_is_not_installed_nothing_is_begun(tmp_path: Path) -> None:
    with raises_code("merge-package-missing", UserError, "method gossip", "swarm-median"):
        plays_of(tiny(tmp_path, set={"merge.robust": RULE}), {})
    with raises_code("merge-package-missing", RunFileError, "swarm-median"):
        publish_run(parse_run(RUN, "r"), tmp_path, datetime.datetime.now(datetime.UTC))


@pytest.mark.parametrize("name", ["medain", "../x:median", "x:", "x:a b", "X:median", "x:os.system", "x" * 99 + ":y"])
def test_other_names_are_none(name: str) -> None:
    with raises_code("bad-value", RunFileError, "merge.robust", "PACKAGE:RULE"):
        parse_run(RUN.replace(RULE, name), "r")
