"""What a run that trains an adapter is said to cost: bytes are those of its factors, and the base is held once."""

from __future__ import annotations

import pytest
from codes import raises_code

from swarmtrain.cli.check import report
from swarmtrain.data.prepare import FirstLook
from swarmtrain.errors import RunFileError, UserError
from swarmtrain.model.parameter_count import num_frozen_parameters, num_trained_parameters
from swarmtrain.peer.control.session import adapter_in_words
from swarmtrain.peer.devices.machine import least_bytes
from swarmtrain.peer.estimate import estimate
from swarmtrain.peer.lifecycle.preparation import summary_of
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.run import RunFile, parse_run
from swarmtrain.run_adapter import AdapterSection

MODEL = {
    "source": "huggingface",
    "base": "owner/base@" + "ab" * 20,
    "num_layers": 24,
    "width": 1024,
    "num_heads": 16,
    "num_parameters": 400_000_000,
}
ADAPTER = {"method": "lora", "rank": 16, "modules": ("q_proj", "v_proj"), "num_parameters": 4_000_000}


def run_with(adapter: bool, **merge: str) -> RunFile:
    tables = {"model": MODEL, "adapter": ADAPTER if adapter else {}, "merge": merge, "run": {"total_tokens": 10**8}}
    return RunFile.model_validate(tables)


@pytest.mark.parametrize("method", ["gossip", "diloco"])
def test_bytes_are_those_of_the_factors_and_what_is_frozen_takes_its_weights_alone(method: str) -> None:
    full, tuned = run_with(False, method=method), run_with(True, method=method)
    assert (num_trained_parameters(tuned), num_frozen_parameters(tuned)) == (4_000_000, 400_000_000)
    assert (num_trained_parameters(full), num_frozen_parameters(full)) == (400_000_000, 0)
    whole, factors = (estimate(run, num_trained_parameters(run), 4) for run in (full, tuned))
    assert factors.bytes_sent_per_round == pytest.approx(whole.bytes_sent_per_round / 100, rel=0.01)
    assert factors.state_bytes == 8 * 4_000_000
    frozen_bytes = 4 * 400_000_000
    assert frozen_bytes < factors.memory_parameters_bytes < frozen_bytes + 100 * 4_000_000
    assert whole.memory_parameters_bytes > 16 * 400_000_000
    assert least_bytes(full) - least_bytes(tuned) == 16 * 400_000_000 - (frozen_bytes + 16 * 4_000_000)


def test_a_person_is_told_of_it_before_and_while_it_trains() -> None:
    run = run_with(True)
    text = "\n".join(report(run, estimate(run, 4_000_000, 4), FirstLook((None,))))
    assert "rank 16 in 4 groups of rank 4, beside q_proj, v_proj" in text and "400 M (24 layers" in text
    assert "an adapter of rank 16 (4 M parameters) beside a model of 400 M parameters" in summary_of(run)
    whole, some = (PeerInfo(peer="ada", training=True, round=3, adapter_groups=groups) for groups in (0, 2))
    assert adapter_in_words(run.adapter, whole) == "rank 16 in 4 groups"
    assert adapter_in_words(run.adapter, some).startswith("rank 16 in 4 groups; trains 8 of it a round, now group")
    assert adapter_in_words(AdapterSection(), whole) == ""


def test_its_groups_are_the_fragments() -> None:
    for rank, group_rank, num_groups in ((16, 0, 4), (6, 0, 3), (5, 0, 1), (16, 1, 16), (8, 8, 1)):
        run = run_with(True).model_dump() | {"merge": {}, "adapter": ADAPTER | {"rank": rank, "group_rank": group_rank}}
        read = RunFile.model_validate(run)
        assert read.adapter.num_groups == read.merge.fragments == read.merge.num_fragments == num_groups
        assert read.adapter.rank_of_group * num_groups == rank


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ('[adapter]\nmethod = "lora"', "built-in"),
        ("[adapter]\nrank = 8", 'adapter.rank: has no meaning with adapter.method = "none"'),
        ('HF[adapter]\nmethod = "lora"\n[merge]\nmethod = "server"', 'allowed: with "gossip" or "diloco"'),
        ('HF[adapter]\nmethod = "lora"\n[pipeline]\nstages = 2', "allowed: with 1"),
        ('HF[adapter]\nmethod = "lora"\n[merge]\ninit = "own"', 'allowed: "common"'),
        ('HF[adapter]\nmethod = "lora"\n[merge]\nmethod = "batch"\noptimizer = "lamb"', 'allowed: "adamw"'),
        ('HF[adapter]\nmethod = "lora"\n[merge]\nfragments = 3', "allowed: 4"),
        ('HF[adapter]\nmethod = "lora"\nrank = 8\ngroup_rank = 3', "allowed: 0, or what divides"),
        ('HF[adapter]\nmethod = "lora"\nrank = 32\ngroup_rank = 1', "at most 16 groups"),
        ('HF[adapter]\nmethod = "lora"\ntargets = ["all-linear", "q_proj"]', "alone, or names"),
        ('HF[adapter]\nmethod = "lora"\ntargets = ["q proj"]', "such as q_proj"),
        ('HF[adapter]\nmethod = "lora"\nmodules = ["q_proj"]', "only `swarmtrain bootstrap` writes this key"),
    ],
)
def test_what_does_not_fit_an_adapter_is_one_line(keys: str, says: str) -> None:
    text = keys.replace("HF", '[model]\nsource = "huggingface"\nbase = "x"\n')
    with pytest.raises(RunFileError) as raised:
        parse_run(f"[run]\ntotal_tokens = 1_000_000\n{text}\n", "run.toml")
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_rank_is_worth_whole_groups() -> None:
    section = run_with(True).adapter
    assert [section.groups_worth(rank) for rank in (0, 4, 7, 8, 16, 64)] == [4, 1, 1, 2, 4, 4]
    with raises_code("rank-not-possible", UserError, "--rank 3", "at least 4"):
        section.groups_worth(3)
    with raises_code("rank-not-possible", UserError, "no adapter"):
        AdapterSection().groups_worth(4)
