"""`swarmtrain check`: the arithmetic, the doubts, and what is printed."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import pytest
from codes import codes_in

from swarmtrain.cli.check import _batch_in_words, report, shards_in_words
from swarmtrain.cli.estimate import doubts
from swarmtrain.cli.main import run as run_command
from swarmtrain.data.prepare import FirstLook
from swarmtrain.data.tokenizer_json import tokenizer_json
from swarmtrain.machine_memory import Memory
from swarmtrain.model.base import resolved_run
from swarmtrain.model.export import export_model
from swarmtrain.model.gpt import build_model
from swarmtrain.model.language_model import ModelSpec
from swarmtrain.model.parameter_count import num_trained_parameters
from swarmtrain.peer.devices import expected_device as module
from swarmtrain.peer.estimate import Estimate, estimate
from swarmtrain.peer.lifecycle.preparation import summary_of
from swarmtrain.protocol.devices import FoundDevice
from swarmtrain.run import RunFile, load_run, parse_run
from swarmtrain.run_batch import BatchTarget
from swarmtrain.words import counted

P = 1_000_000


DILOCO = 'total_tokens = 30_720_000\n[merge]\nmethod = "diloco"\n'


def cost_of(text: str = "total_tokens = 30_720_000", num_peers: int = 3) -> Estimate:
    return estimate(parse_run("[run]\n" + text, "r"), P, num_peers)


def doubts_of(text: str, num_peers: int = 4, corpus_bytes: int | None = None, machine_bytes: int | None = None) -> str:
    run = parse_run("[run]\n" + text, "r")
    memory = None if machine_bytes is None else Memory(machine_bytes, machine_bytes)
    return "\n".join(doubts(run, estimate(run, P, num_peers), (corpus_bytes,), memory))


def test_rounds_and_tokens() -> None:
    cost = cost_of()
    assert cost.tokens_per_step == 16 * 128
    assert cost.tokens_per_round == 16 * 128 * 25 * 3
    assert cost.inner_steps_per_peer == 5000
    assert cost.num_rounds == 200


def test_batches_that_grow_are_told_by_their_first_and_their_largest() -> None:
    text = 'total_tokens = 30_720_000\n[merge]\nmethod = "batch"\ninner_steps = 10\n'
    fixed, grows = cost_of(text), cost_of(text + 'target_tokens = "auto"\n')
    assert (fixed.num_rounds, fixed.tokens_per_round) == (1500, 20_480)
    target = parse_run("[run]\n" + text + 'target_tokens = "auto"\n', "r").batch_target
    assert grows.num_rounds == pytest.approx(target.num_steps, abs=1) and target.num_steps == 222
    assert grows.tokens_per_round == pytest.approx(30_720_000 / target.num_steps, rel=1e-3)
    assert _batch_in_words(BatchTarget(20_480, 10**6), 2048) == (
        "10 inner steps of all volunteers together, 20.5 k tokens"
    )
    words = "10 inner steps of all volunteers together, 20.5 k tokens at first; grows with the run up to 602 k tokens"
    assert _batch_in_words(target, 2048) == words
    run = parse_run("[run]\n" + text + 'target_tokens = "auto"\n', "r")
    assert "one step together for every 20.5 k tokens, later for up to 602 k (batch)" in summary_of(run)


def test_large_batches_that_end_late_are_fewer_than_their_sizes_say() -> None:
    """Each of three equal volunteers may have two steps more in each batch. A step has 2048 tokens, and fewer if its
    part of the batch would else be less than four steps."""
    text = 'total_tokens = 3_072_000\n[merge]\nmethod = "batch"\n'
    large = cost_of(text + "inner_steps = 60\n")
    assert (large.num_rounds, large.fewest_rounds) == (25, -(-3_072_000 // (60 * 2048 + 2 * 3 * 2048)))
    tiny = cost_of(text + "inner_steps = 3\n")
    assert (tiny.num_rounds, tiny.fewest_rounds) == (500, -(-3_072_000 // (3 * 2048 + 2 * 3 * 512)))
    grows = cost_of(text + 'inner_steps = 1\ntarget_tokens = "auto"\n')
    tokens, batches = 0, 0
    while tokens < 3_072_000:
        wanted = max(2048, min(math.ceil(0.02 * tokens), 3_072_000 - tokens))
        tokens += wanted + 2 * 3 * 128 * max(1, min(16, wanted // 128 // 12))
        batches += 1
    assert grows.fewest_rounds == batches < 0.9 * grows.num_rounds
    assert cost_of(text + "inner_steps = 3\n", 1).fewest_rounds == 500, "who is alone ends when it has the batch"
    assert cost_of().fewest_rounds == cost_of().num_rounds


def test_of_few_large_batches_the_key_is_named_that_makes_them_smaller() -> None:
    text = 'total_tokens = 300_000\n[merge]\nmethod = "batch"\n'
    few = "only 5 steps with 4 peers: large batches need some too"
    assert f"{few}; lower merge.target_tokens = 65536 or raise" in doubts_of(text + "target_tokens = 65_536\n")
    for given in ("", "target_tokens = 0\n"):
        assert "; lower merge.inner_steps = 32 or raise" in doubts_of(text + "inner_steps = 32\n" + given)
    assert "lower merge.inner_steps = 32 or" in doubts_of(text + 'inner_steps = 32\ntarget_tokens = "auto"\n')


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
    table = 4 * 128 * 32  # of the positions, of one head
    assert cost.memory_parameters_bytes == (40 + 8) * P + table
    small = cost_of(DILOCO + "[inner]\nmicrobatch_sequences = 4")
    at_once = cost.memory_activations_bytes + round(0.2 * 4 * P)  # one microbatch: gradients come as activations go
    assert small.memory_activations_bytes == at_once // 4


@pytest.mark.parametrize(
    ("width", "layers", "heads", "peak_mb", "most_sent_mb"),
    [(128, 2, 4, 339, 4.9), (320, 8, 5, 788, 97.5), (512, 18, 8, 2915, 558.9)],
)
def test_what_real_volunteers_used_is_within_the_estimate_and_near_it(
    width: int, layers: int, heads: int, peak_mb: float, most_sent_mb: float
) -> None:
    """By `benchmarks/memory.py`, beside other programs, the most that was seen; docs/results/cost-to-a-volunteer.md."""
    run = parse_run(
        "[run]\ntotal_tokens = 100_000\n"
        f"[model]\ncontext_tokens = 64\nfeed_forward_ratio = 2.667\n"
        f"width = {width}\nnum_layers = {layers}\nnum_heads = {heads}\n"
        "[inner]\nbatch_sequences = 1\n[merge]\ninner_steps = 20\nmin_peers = 2\n[evaluation]\nbatch_sequences = 4\n",
        "r",
    )
    cost = estimate(run, num_trained_parameters(run), 2)
    assert peak_mb <= cost.memory_bytes / 1e6 <= 1.1 * peak_mb
    assert most_sent_mb <= cost.bytes_sent_most_per_round / 1e6 <= 1.1 * most_sent_mb


LIKE_DILOCO = 'total_tokens = 9_000_000\n[merge]\nmethod = "diloco"'
GOOD = "total_tokens = 50_000_000\n[merge]\nmomentum_ramp_rounds = 10\n"


def test_a_sound_run_raises_no_doubt() -> None:
    assert doubts_of(GOOD, corpus_bytes=10_000_000, machine_bytes=8_000_000_000) == ""


@pytest.mark.parametrize(
    ("num_tokens", "from_scratch", "is_doubtful"), [(32_000, False, True), (256, False, False), (32_000, True, False)]
)
def test_bytes_for_a_model_that_has_learnt_other_tokens_are_a_doubt(
    num_tokens: int, from_scratch: bool, is_doubtful: bool
) -> None:
    model = {"source": "huggingface", "base": "anna/tiny@" + "ab" * 20, "tokenizer": "bytes", "num_parameters": P}
    model |= {"vocabulary_size": num_tokens, "from_scratch": from_scratch}
    run = RunFile.model_validate({"run": {"total_tokens": 50_000_000}, "model": model})
    found = "\n".join(doubts(run, estimate(run, P, 4), (10_000_000,), None))
    assert ("the weights of a model of 32000 tokens" in found) == is_doubtful


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
        (GOOD + "[data]\nheld_out_bytes = 4096", "4096 bytes of held-out text are few"),
    ],
)
def test_schedule_and_held_out_doubts(text: str, expected: str) -> None:
    assert expected in doubts_of(text)


def test_one_of_a_thing_is_said_as_one() -> None:
    assert [counted(number, "round") for number in (0, 1, 2)] == ["0 rounds", "1 round", "2 rounds"]
    assert counted(1, "batch", "batches") == "1 batch" and counted(2, "batch", "batches") == "2 batches"
    assert "only 1 round with 1 peer: " in doubts_of("total_tokens = 40_000", num_peers=1)
    run = parse_run("[run]\ntotal_tokens = 3_000\n[merge]\ninner_steps = 1\n[model]\nnum_layers = 1\n", "r")
    text = "\n".join(report(run, estimate(run, P, 1), FirstLook((None,))))
    assert "(1 layer, width 128" in text and ": 2 rounds, 2 inner steps of each of 1 peer\n" in text
    assert "  round       1 inner step, 2.05 k tokens with 1 peer\n" in text


def test_of_samples_the_steps_are_told_as_the_least() -> None:
    data = '[data]\nsource = "jsonl"\npaths = ["x.jsonl"]\nformat = "prompt-completion"\n'
    run = parse_run(f"[run]\ntotal_tokens = 30_000\n{data}", "r")
    text = "\n".join(report(run, estimate(run, P, 1), FirstLook((None,))))
    assert "  whole run   30 k tokens: at least 1 round, 15 inner steps of each of 1 peer; only tokens that" in text


def test_doubts_about_the_corpus_and_the_machine() -> None:
    assert "each byte is read 50 times" in doubts_of(GOOD, corpus_bytes=1_000_000)
    assert "this machine has 256 MB" in doubts_of(GOOD, machine_bytes=256_000_000)


EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_no_example_raises_a_doubt(path: Path, tmp_path: Path) -> None:
    """Beyond what the data and the machine at hand say."""
    run = load_run(path)
    if not run.model.is_built_in:
        small = load_run(path.with_name("stdlib-gpt.toml")).model
        weights = dict(build_model(small, seed=0).named_parameters())
        export_model(tmp_path / run.model.base, weights, ModelSpec(small), 1, {"tokenizer.json": tokenizer_json(b"")})
        run = resolved_run(run, tmp_path)
    assert doubts(run, estimate(run, num_trained_parameters(run), 4), [None] * len(run.data.mixture), None) == ()


def test_the_command_prints_a_report_or_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("text " * 1000)
    path = tmp_path / "run.toml"
    path.write_text("[run]\ntotal_tokens = 3_000_000\n[data]\nsource = 'text'\npaths = ['*.txt']\n")
    assert run_command(["check", str(path), "--peers", "3"]) == 2
    first, error, *rest = capsys.readouterr().out.splitlines()
    assert first == "run stdlib-gpt" and not rest, "nothing is said of a run that cannot be published"
    assert error.startswith("  error: the corpus has 5000 bytes, of which an eighth is held out; give it more text")
    assert codes_in(error) == ["too-little-text"]
    assert run_command(["check", str(path), "--json"]) == 2
    table = json.loads(capsys.readouterr().out)
    assert table["num_parameters"] == 844_928
    assert table["num_peers"] == 3
    assert table["corpus_bytes"] == 5000
    assert table["doubts"] and len(table["errors"]) == 1 and table["error_codes"] == ["too-little-text"]
    (tmp_path / "a.txt").write_text("text " * 1_000_000)
    assert run_command(["check", str(path), "--peers", "3"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("run stdlib-gpt\n") and "845 k (4 layers, width 128, 4 heads; 256 tokens of bytes)" in text
    assert "text, 5 MB here" in text and " per peer with 3 peers: " in text


CPU = FoundDevice(name="cpu", title="")
SMALL = FoundDevice(name="cuda:0", title="Small", free_bytes=1_000_000)
LARGE = FoundDevice(name="cuda:1", title="Large", free_bytes=8_000_000_000)


@pytest.mark.parametrize(
    ("found", "missing", "row"),
    [
        ([CPU], "", "the processor: 4 sequences at once (no graphics card was found); on a graphics card"),
        ([CPU], "a card is here, but", "the processor: 4 sequences at once (a card is here, but); on a graphics card"),
        (
            [SMALL, CPU],
            "",
            "the processor: 4 sequences at once (cuda:0 (Small) has only 1 MB free); on a graphics card",
        ),
        ([SMALL, LARGE, CPU], "", "cuda:1 (Large), 8 GB free: 4 sequences at once, if it works; on a"),
    ],
)
def test_it_says_what_this_machine_would_train_on(
    found: list[FoundDevice],
    missing: str,
    row: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "find_devices", lambda parameters: found)
    monkeypatch.setattr(module, "missing_card", lambda: missing)
    monkeypatch.setattr("swarmtrain.data.prepare.first_look", lambda *_: FirstLook((None,)))  # it is not about the text
    assert run_command(["check", "stdlib-gpt"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  device ")]
    assert line.removeprefix("  device      ").startswith(row)
    assert run_command(["check", "stdlib-gpt", "--json"]) == 0
    on = json.loads(capsys.readouterr().out)["device"]
    assert on["name"] == ("cuda:1" if LARGE in found else "cpu") and on["microbatch_sequences"] == 4
    assert on["free_bytes"] == (8_000_000_000 if LARGE in found else None) and on["least_card_bytes"] > 1_000_000
    assert run_command(["check", "pipeline", "--json"]) == 0
    of_stage = json.loads(capsys.readouterr().out)["device"]
    assert of_stage["name"] == on["name"] and of_stage["microbatch_sequences"] == 2, "as many as drivers send"


def test_what_a_bootstrap_would_refuse_is_an_error_and_all_of_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("a", '{"story": "one"}'), ("b", "no JSON"), ("c", '{"text": "three"}')):
        (tmp_path / f"{name}.jsonl").write_text(text)
    path = tmp_path / "run.toml"
    section = "[data]\nsource = 'jsonl'\npaths = [%s]\n"
    text = f"[run]\ntotal_tokens = 50_000_000\n[merge]\nrobust = 'no-such-package:rule'\n{section}"

    def errors(paths: str) -> list[str]:
        path.write_text(text % paths)
        assert run_command(["check", str(path)]) == 2
        return [line[9:] for line in capsys.readouterr().out.splitlines() if line.startswith("  error: ")]

    there = ["merge.robust = ", "line 1 of ", "line 1 of "]
    small = "the corpus has 40 bytes, of which an eighth is held out"
    for found, expected in zip(errors("'*.jsonl'"), [*there, small], strict=True):
        assert expected in found
    missing = [there[0], "no file matches x/*.jsonl", "there is no file y.jsonl", *there[1:]]
    for found, expected in zip(errors("'x/*.jsonl', '*.jsonl', 'y.jsonl'"), missing, strict=True):
        assert expected in found
    path.write_text(section % "'y.jsonl'" + "[run]\ntotal_tokens = 50_000_000\n[merge]\nmin_peers = 9")
    assert run_command(["check", str(path), "--json"]) == 2
    table = json.loads(capsys.readouterr().out)
    assert (
        table["error_codes"][:1] == ["no-such-data"]
        and "y.jsonl" in table["errors"][0]
        and "min_peers = 9" in table["doubts"][0]
    )


def test_of_many_bad_files_the_first_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_bytes(b"\xff" * 1000)
    found = checked(tmp_path, "[data]\nsource = 'text'\npaths = ['*.txt']\n", capsys, code=2).splitlines()
    assert len(found) == 6 and "04.txt is not UTF-8" in found[4]
    assert found[5] == "  not checked: the files after these"


def test_it_and_plan_judge_a_number_of_volunteers_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = ["--step-s", "0.2"]
    assert run_command(["check", "pipeline", "--peers", "2"]) == run_command(["plan", "pipeline", "--peers", "2"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert (
        first.split(" (see ")[0] == second.split(" (see ")[0]
        and "--peers: 2 volunteers cannot hold 3 stages" in first
        and "allowed: 3 or more" in first
    )
    path = tmp_path / "run.toml"
    path.write_text("[run]\ntotal_tokens = 2_000_000\n[pipeline]\nstages = 5\n")
    assert run_command(["check", str(path)]) == 0, "as many as there are stages"
    assert " and held by 1 peer; " in capsys.readouterr().out
    for name, peers in (("stdlib-gpt", []), ("stdlib-gpt", ["--peers", "7"])):
        assert run_command(["check", name, *peers]) == run_command(["plan", name, *peers, *step]) == 0
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  memory ")]
        assert len({row.split("about ")[1].split(" per peer")[0].split(" of each")[0] for row in rows}) == 1, rows


def checked(path: Path, data: str, capsys: pytest.CaptureFixture[str], *more: str, code: int = 0) -> str:
    """Return what `check` prints for a run on `data`, without its estimate."""
    (path / "run.toml").write_text(f"[run]\ntotal_tokens = 50_000_000\n{data}")
    assert run_command(["check", str(path / "run.toml"), *more]) == code
    lines = capsys.readouterr().out.splitlines()
    kinds = ("  error: ", "  warning: ", "  not checked: ", "  no warnings")
    return "\n".join(line for line in lines if line.startswith(kinds))


def test_it_looks_at_the_text_as_a_bootstrap_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.dumps({"story": f"{number} is a number of {number**5} letters " * 40}) for number in range(4000)]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.jsonl").write_text("\n".join(rows))
    section = '[data]\nsource = "jsonl"\npaths = ["more/*.jsonl"]\nfield = "%s"\n'
    assert 'has no field "text" (it has: story)' in checked(tmp_path, section % "text", capsys, code=2)
    assert checked(tmp_path, section % "story", capsys) == "  no warnings"
    small = section % "story" + "held_out_bytes = 4_194_304\n"
    assert checked(tmp_path, small, capsys) == "  no warnings", "of less than eight times as much, an eighth"
    missing = (section % "story").replace("more", "less")
    assert "no file matches less/*.jsonl below" in checked(tmp_path, missing, capsys, code=2)
    elsewhere = (section % "story").replace("more/", "")
    assert "no file matches *.jsonl" in checked(tmp_path, elsewhere, capsys, code=2)
    assert checked(tmp_path, elsewhere, capsys, "--data", str(tmp_path / "more")) == "  no warnings"


def test_it_says_what_it_has_not_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from swarmtrain.data import prepare

    (tmp_path / "a.txt").write_text("".join(f"line {number * number}\n" for number in range(500_000)))
    text = '[data]\nsource = "text"\npaths = ["*.txt"]\n'
    monkeypatch.setattr(prepare, "STREAM_SAMPLE_BYTES", 1 << 20)
    assert checked(tmp_path, text, capsys).splitlines() == [
        "  no warnings",
        "  not checked: the text after its first 8 MiB",
    ]
    bpe = text + '[model]\ntokenizer = "bpe"\nvocabulary_size = 5000\n'
    assert "not checked: whether model.vocabulary_size = 5000 can be learnt" in checked(tmp_path, bpe, capsys)
    (tmp_path / "a.txt").write_text("ten words that are told again and again and again\n" * 400)
    few = bpe.replace("[model]", "held_out_bytes = 1024\n[model]")
    assert "model.vocabulary_size = 5000 is more than can be learnt" in checked(tmp_path, few, capsys, code=2)
    data_set = '[data]\nsource = "datasets"\ndataset = "stories"\n'
    assert 'there is no folder "stories" below' in checked(tmp_path, data_set, capsys, code=2)


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 3])
def test_it_reads_the_weights_of_a_folder_as_a_bootstrap_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stages: int
) -> None:
    from small_models import saved

    saved("llama", tmp_path / "tiny")
    config = (tmp_path / "tiny" / "config.json").read_text()
    text = '[model]\nsource = "huggingface"\nbase = "tiny"\ntokenizer = "bytes"\ncontext_tokens = 32\n'
    text += f"[data]\nheld_out_bytes = 32_768\n[pipeline]\nstages = {stages}\n"
    assert "error" not in (found := checked(tmp_path, text, capsys)) and "not checked" not in found
    (tmp_path / "tiny" / "config.json").write_text(config.replace('"intermediate_size": 48', '"intermediate_size": 64'))
    found = checked(tmp_path, text, capsys, code=2)
    assert "but config.json says" in found and codes_in(found) == ["checkpoint-mismatch"]
    monkeypatch.setattr("swarmtrain.cli.check._LOOK_WEIGHTS_BYTES", 1000)
    assert "not checked: the weights of model.base, " in checked(tmp_path, text, capsys)
    (tmp_path / "tiny" / "model.safetensors").unlink()
    scratch = text.replace("tokenizer", "from_scratch = true\ntokenizer")
    assert "not checked" not in checked(tmp_path, scratch, capsys)


def test_it_says_which_library_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    real = importlib.import_module

    def missing(name: str, package: str | None = None) -> object:
        if name.partition(".")[0] in ("datasets", "pyarrow", "tokenizers"):
            raise ImportError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    (tmp_path / "a.parquet").write_text("-")
    for section, needs in (
        ('[data]\nsource = "datasets"\ndataset = "a/b"\n', "needs datasets: pip install 'datasets>="),
        ('[data]\nsource = "parquet"\npaths = ["*.parquet"]\n', "needs pyarrow: pip install 'pyarrow>="),
        ('[model]\ntokenizer = "bpe"\nvocabulary_size = 1000\n', "needs tokenizers: pip install 'tokenizers>="),
    ):
        assert needs in checked(tmp_path, section, capsys, code=2)
    both = '[data]\nsource = "parquet"\npaths = ["*.parquet"]\n[model]\ntokenizer = "bpe"\nvocabulary_size = 1000\n'
    assert checked(tmp_path, both, capsys, code=2).count("  error: ") == 2


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
    found = shards_in_words(parse_run(f"[run]\ntotal_tokens = 30_720_000\n{text}", "r"), (corpus_bytes,))
    assert found.startswith(words) and bool(found) == bool(words)


def test_several_sources_are_told_with_their_shares_and_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps({"text": f"{number} is a number of {number**5} letters " * 40}) for number in range(1000)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode())[:-50])
    sources = (
        "[[data.sources]]\nname = 'code'\nweight = 3\n"
        "[[data.sources]]\nname = 'own'\nsource = 'jsonl'\npaths = ['%s.jsonl.gz']\n"
    )
    assert checked(tmp_path, sources % "a", capsys) == "  no warnings"
    assert run_command(["check", str(tmp_path / "run.toml")]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  data ")]
    assert re.fullmatch(r"  data +75% code \(python-stdlib, .* here\), 25% own \(jsonl, .* here\), in 64 shards", row)
    assert run_command(["check", str(tmp_path / "run.toml"), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [(each["name"], each["share"], each["source"]) for each in table["sources"]] == [
        ("code", 0.75, "python-stdlib"),
        ("own", 0.25, "jsonl"),
    ]
    assert table["corpus_bytes"] == sum(each["corpus_bytes"] for each in table["sources"])
    assert not table["corpus_bytes_estimated"]
    torn = checked(tmp_path, sources % "bad", capsys, code=2)
    assert "error: source own: data.paths: " in torn and codes_in(torn) == ["not-decompressed"]


def test_a_source_that_is_read_often_is_named() -> None:
    sources = "".join(
        f"[[data.sources]]\nname = '{name}'\nweight = {weight}\n" for name, weight in (("a", 9), ("b", 1))
    )
    run = parse_run(f"[run]\ntotal_tokens = 50_000_000\n{sources}[merge]\nmomentum_ramp_rounds = 10\n", "r")
    (found,) = doubts(run, estimate(run, P, 4), (10_000_000, 500_000), None)
    assert found.startswith("source b here has 500 kB and the run takes 5 M tokens of it: each byte is read 10 times")
    assert doubts(run, estimate(run, P, 4), (10_000_000, None), None) == ()
