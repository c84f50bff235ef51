"""`swarmtrain check`: the arithmetic, the doubts, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swarmtrain.cli.check import shards_in_words
from swarmtrain.cli.estimate import Estimate, doubts, estimate
from swarmtrain.cli.main import run as run_command
from swarmtrain.model.gpt import num_parameters
from swarmtrain.run import load_run, parse_run

P = 1_000_000


DILOCO = 'total_tokens = 30_720_000\n[merge]\nmethod = "diloco"\n'


def cost_of(text: str = "total_tokens = 30_720_000", num_peers: int = 3) -> Estimate:
    return estimate(parse_run("[run]\n" + text, "r"), P, num_peers)


def doubts_of(text: str, num_peers: int = 4, corpus_bytes: int | None = None, machine_bytes: int | None = None) -> str:
    run = parse_run("[run]\n" + text, "r")
    return "\n".join(doubts(run, estimate(run, P, num_peers), corpus_bytes, machine_bytes))


def test_rounds_and_tokens() -> None:
    cost = cost_of()
    assert cost.tokens_per_step == 16 * 128
    assert cost.tokens_per_round == 16 * 128 * 25 * 3
    assert cost.inner_steps_per_peer == 5000
    assert cost.num_rounds == 200


def test_few_peers_send_their_whole_pseudo_gradient_to_each() -> None:
    assert cost_of(DILOCO, num_peers=1).bytes_sent_per_round == 0
    assert cost_of(DILOCO, num_peers=1).times_below_allreduce is None
    cost = cost_of(DILOCO, num_peers=4)
    assert cost.bytes_sent_per_round == cost.bytes_received_per_round == 3 * 4 * P
    assert cost.times_below_allreduce == pytest.approx(25 * 8 / 12)


def test_many_peers_send_what_an_allreduce_of_the_round_sends() -> None:
    assert cost_of(DILOCO, num_peers=5).bytes_sent_per_round == 16 * P
    assert cost_of(DILOCO, num_peers=6).bytes_sent_per_round == pytest.approx(2 * 4 * P * 5 / 6, abs=1)
    assert cost_of(DILOCO, num_peers=1000).times_below_allreduce == pytest.approx(25, rel=0.01)


def test_gossip_costs_the_same_with_any_number_of_peers() -> None:
    """In each round the pseudo-gradients of eight partners and the weights of one, or of as many as there are."""
    gossip = 'total_tokens = 30_720_000\n[merge]\nmethod = "gossip"'
    four = cost_of(gossip, num_peers=4).bytes_sent_per_round
    assert 1.1 * (1 + 3 / 4) * P < four < 1.1 * (1 + 3 / 2) * P, "three gradients in int4"
    assert cost_of(gossip, num_peers=6).bytes_sent_per_round < 1.1 * (1 + 5 / 4) * P, "five in int2"
    assert (
        four
        < cost_of(gossip, num_peers=9).bytes_sent_per_round
        == cost_of(gossip, num_peers=9_000).bytes_sent_per_round
    )
    gossip += '\ngradient_format = "int8"'
    sent = cost_of(gossip, num_peers=9).bytes_sent_per_round
    assert 9 * P < sent < 1.05 * 9 * P
    assert cost_of(gossip, num_peers=1000).bytes_sent_per_round == sent
    assert cost_of(gossip, num_peers=2).bytes_sent_per_round == pytest.approx(sent * 2 / 9, abs=1)
    assert cost_of(gossip, num_peers=1).bytes_sent_per_round == 0
    wide = cost_of(gossip.replace("int8", "bf16") + '\ntheta_format = "fp32"', num_peers=4)
    assert wide.bytes_sent_per_round == (3 * 2 + 4) * P
    assert wide.memory_parameters_bytes > cost_of(gossip, num_peers=4).memory_parameters_bytes


@pytest.mark.parametrize("num_peers", range(2, 40))
def test_it_is_always_at_least_half_a_round_below_an_allreduce(num_peers: int) -> None:
    for text in ("total_tokens = 30_720_000", DILOCO):
        below = cost_of(text, num_peers).times_below_allreduce
        assert below is not None
        assert below >= 25 / 2


def test_memory_adds_up_and_microbatches_lower_it() -> None:
    cost = cost_of(DILOCO)
    parts = cost.memory_program_bytes + cost.memory_parameters_bytes + cost.memory_activations_bytes
    assert cost.memory_bytes == parts
    assert cost.memory_parameters_bytes == (40 + 8) * P
    small = cost_of(DILOCO + "[inner]\nmicrobatch_sequences = 4")
    assert small.memory_activations_bytes == cost.memory_activations_bytes // 4


LIKE_DILOCO = 'total_tokens = 9_000_000\n[merge]\nmethod = "diloco"'
GOOD = "total_tokens = 50_000_000\n[merge]\nmomentum_ramp_rounds = 10\n"


def test_a_sound_run_raises_no_doubt() -> None:
    assert doubts_of(GOOD, corpus_bytes=10_000_000, machine_bytes=8_000_000_000) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("total_tokens = 1_000_000", "only 5 rounds with 4 peers"),
        ("total_tokens = 1_000_000", "the warm-up (inner.warmup_fraction = 0.05) ends within the first round"),
        (LIKE_DILOCO, "merge.outer_momentum = 0.9 from the first round on, in a run of 44 rounds"),
        ("total_tokens = 9_000_000\n[merge]\nmomentum_ramp_rounds = 50", "momentum_ramp_rounds = 50 is longer than"),
        (GOOD + "min_peers = 9", "round 0 begins with merge.min_peers = 9 peers; 4 assumed"),
        (GOOD + "[inner]\nbatch_sequences = 15", "inner.batch_sequences = 15 is odd"),
        (GOOD + "[pipeline]\nstages = 5", "a batch is 16 microbatches, and drivers have a quarter of that under way"),
        (GOOD + "[data]\nheld_out_bytes = 4096", "data.held_out_bytes = 4096 is small"),
    ],
)
def test_schedule_and_held_out_doubts(text: str, expected: str) -> None:
    assert expected in doubts_of(text)


def test_doubts_about_the_corpus_and_the_machine() -> None:
    assert "less than ten times data.held_out_bytes" in doubts_of(GOOD, corpus_bytes=100_000)
    assert "each byte is read 50 times" in doubts_of(GOOD, corpus_bytes=1_000_000)
    assert "this machine has 256 MB" in doubts_of(GOOD, machine_bytes=256_000_000)


EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_no_example_raises_a_doubt(path: Path) -> None:
    """Beyond what the data and the machine at hand say."""
    run = load_run(path)
    assert doubts(run, estimate(run, num_parameters(run.model), 4), None, None) == ()


def test_the_command_prints_a_report_or_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("text " * 1000)
    path = tmp_path / "run.toml"
    path.write_text("[run]\ntotal_tokens = 3_000_000\n[data]\nsource = 'text'\npaths = ['*.txt']\n")
    assert run_command(["check", str(path), "--peers", "3"]) == 0
    text = capsys.readouterr().out
    assert "run stdlib-gpt\n" in text
    assert "845 k (4 layers, width 128, 4 heads; 256 tokens of bytes)" in text
    assert "text, 5 kB here" in text
    assert "doubt: the corpus here has 5 kB" in text
    assert run_command(["check", str(path), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["num_parameters"] == 844_928
    assert table["num_peers"] == 4
    assert table["corpus_bytes"] == 5000
    assert table["doubts"]


def test_missing_data_is_a_doubt_not_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[run]\ntotal_tokens = 3_000_000\n[data]\nsource = 'text'\npaths = ['nowhere.txt']\n")
    assert run_command(["check", str(path)]) == 0
    assert "doubt: data.paths: there is no file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "corpus_bytes", "words"),
    [
        ('[merge]\nmethod = "diloco"', 10**9, ""),
        ("", 10**9, ", in 64 shards"),
        ('[merge]\nmethod = "gossip"\n[data]\nshards = 0', 10**9, ""),
        ('[merge]\nmethod = "gossip"', 10**9, ", in 64 shards"),
        ('[merge]\nmethod = "gossip"', 7 * 25 * 16 * 128 + 99, ", in 7 shards"),
        ('[merge]\nmethod = "gossip"', 25 * 16 * 128, "; too little for shards"),
        ('[merge]\nmethod = "gossip"', None, ", in 64 shards at most"),
        (
            '[merge]\nmethod = "gossip"\n[data]\nsource = "datasets"\ndataset = "d"\nstreaming = true',
            None,
            "; streamed",
        ),
    ],
)
def test_shards_are_named_where_there_are_any(text: str, corpus_bytes: int | None, words: str) -> None:
    found = shards_in_words(parse_run(f"[run]\ntotal_tokens = 30_720_000\n{text}", "r"), corpus_bytes)
    assert found.startswith(words) and bool(found) == bool(words)
