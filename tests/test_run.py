"""Run file: what is accepted, how each problem is reported, and the identity of a published run."""

from __future__ import annotations

import math
import string
from pathlib import Path

import pytest
import tomli_w
from codes import codes_in, raises_code
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmtrain import __version__
from swarmtrain.algorithm.pacing import most_inner_steps
from swarmtrain.cli.main import run as run_command
from swarmtrain.errors import BadBytesError, RunFileError, with_code
from swarmtrain.problems import section_fields
from swarmtrain.run import (
    MAX_RUN_FILE_BYTES,
    MergeSection,
    PublishedSection,
    RunFile,
    load_run,
    parse_published_untrusted,
    parse_run,
    published_bytes,
    run_sha256,
)

NAMES = "up to 64 lower-case letters a to z, digits and hyphens, the first no hyphen"
MINIMAL = "[run]\ntotal_tokens = 1_000_000\n"


def published(text: str = MINIMAL, version: str = __version__) -> RunFile:
    section = PublishedSection(
        created="2030-01-02T03:04:05+00:00", swarmtrain=version, held_out_sha256="ab" * 32, held_out_bytes=65_536
    )
    return parse_run(text, "run.toml").model_copy(update={"published": section})


def test_the_smallest_run_file_has_every_default() -> None:
    run = parse_run(MINIMAL, "run.toml")
    assert run.run.total_tokens == 1_000_000
    assert run.tokens_per_step == 16 * 128
    assert (run.merge.method, run.merge.outer_momentum, run.merge.pacing) == ("gossip", 0.8, True)
    assert run.published is None


def test_a_method_may_have_defaults_of_its_own() -> None:
    def merge(text: str) -> tuple[float, bool]:
        section = parse_run(MINIMAL + "[merge]\n" + text, "run.toml").merge
        return section.outer_momentum, section.pacing

    assert merge("method = 'diloco'") == (0.9, False)
    assert merge("method = 'server'") == merge("method = 'gossip'") == merge("") == (0.8, True)
    assert merge("method = 'diloco'\npacing = true\nouter_momentum = 0.5") == (0.5, True)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "direction"),
        ("method = 'server'", "clip"),
        ("init = 'own'", "clip"),  # gradients of weights that have nothing in common have no common direction
        ("init = 'own'\nrobust = 'direction'", "direction"),
    ],
)
def test_against_bad_partners_there_is_a_rule_by_default(text: str, rule: str) -> None:
    run = parse_run(MINIMAL + "[merge]\n" + text, "run.toml")
    assert run.merge.robust == rule
    written_out = tomli_w.dumps({"merge": run.merge.model_dump()})
    assert parse_run(MINIMAL + written_out, "run.toml").merge == run.merge


def test_how_gradients_travel_goes_by_partners_only_where_there_are_some() -> None:
    def merge(text: str) -> MergeSection:
        return parse_run(MINIMAL + "[merge]\n" + text, "run.toml").merge

    assert merge("").gradient_formats == ("int2", "int4")
    assert merge("method = 'server'").gradient_formats == ("int2",)
    assert merge("gradient_format = 'bf16'").gradient_formats == ("bf16",)
    assert merge("method = 'diloco'").gradient_format == "auto"


def test_lists_fill_tuples_and_integers_fill_numbers() -> None:
    run = parse_run(MINIMAL + "[data]\nsource = 'text'\npaths = ['a', 'b/**']\n[merge]\nround_limit_s = 3\n", "r")
    assert run.data.paths == ("a", "b/**")
    assert run.merge.round_limit_s == 3.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "run.total_tokens: missing; allowed: an integer above 0 and below 2^63"),
        ("[run]\ntotal_token = 5\n", "run.total_token: unknown key; did you mean run.total_tokens?"),
        (MINIMAL + "[merg]\ninner_steps = 4\n", "merg: unknown section; did you mean merge?"),
        (MINIMAL + "[merge]\ninner_step = 4\n", "merge.inner_step: unknown key; did you mean merge.inner_steps?"),
        (MINIMAL + "inner_steps = 4\n", "run.inner_steps: belongs in [merge]"),
        ("inner_steps = 4\n" + MINIMAL, "inner_steps: belongs in [merge]"),
        (MINIMAL + "[merge]\nbatch_sequences = 4\n", "merge.batch_sequences: belongs in [inner] or [evaluation]"),
        (MINIMAL + "[model]\nhidden_size = 64\n", "model.hidden_size: unknown key; did you mean model.width?"),
        (MINIMAL + "[inner]\nmax_steps = 9\n", "inner.max_steps: unknown key; did you mean run.total_tokens?"),
        (MINIMAL + "[merge]\nlayers_num = 4\n", "merge.layers_num: unknown key; did you mean model.num_layers?"),
        (MINIMAL + "[evaluation]\nzzz = 4\n", "evaluation.zzz: unknown key; allowed: every_rounds, batch_sequences"),
        (MINIMAL + "model.width = 8\n", "run.model: is a section of its own; write [model]"),
        (MINIMAL + "[merge]\ninner_steps = '4'\n", 'merge.inner_steps: "4" is refused; allowed: an integer from 1 to'),
        (MINIMAL + "[merge]\ninner_steps = true\n", "merge.inner_steps: true is refused; allowed: an integer from 1"),
        (MINIMAL + "[merge]\ninner_steps = 2.5\n", "merge.inner_steps: 2.5 is refused; allowed: an integer from 1"),
        (
            MINIMAL + '[merge]\nrobust = "clipp"\n',
            'merge.robust: "clipp" is refused; allowed: "none", "clip", "direction"',
        ),
        (MINIMAL + "[merge]\nround_limit_s = true\n", "merge.round_limit_s: true is refused; allowed: a number above"),
        (MINIMAL + "[merge]\nround_limit_s = nan\n", "merge.round_limit_s: NaN is refused; allowed: a number above 0"),
        (MINIMAL + "[merge]\nround_limit_s = inf\n", "merge.round_limit_s: Infinity is refused; allowed: a number"),
        (MINIMAL + "[merge]\nround_limit_s = 1" + "0" * 400, "... is refused; allowed: a number above 0"),
        (MINIMAL + "[merge]\npacing = 1\n", "merge.pacing: 1 is refused; allowed: true or false"),
        (MINIMAL + "[merge]\nmethod = 'dilocoo'\n", 'merge.method: "dilocoo" is refused; allowed: "gossip" or'),
        (MINIMAL + "[merge]\nshare_above = 6\n", "merge.share_above: has no meaning with merge.method"),
        (MINIMAL + "[data]\nsource = 'csv'\n", 'data.source: "csv" is refused; allowed: "python-stdlib" or "text" or'),
        (MINIMAL + "[data]\nsource = 'text'\npaths = 'a'\n", 'data.paths: "a" is refused; allowed: a list of strings'),
        (MINIMAL + "[data]\nsource = 'text'\npaths = [1]\n", "data.paths.0: 1 is refused; allowed: a list of strings"),
        (MINIMAL + "[data]\nsource = 'text'\npaths = ['']\n", "data.paths: contains an empty string"),
        (MINIMAL + "name = 'My Run'\n", f'run.name: "My Run" is refused; allowed: {NAMES}, such as my-run'),
        (MINIMAL + "name = 'Größe_1'\n", f'run.name: "Größe_1" is refused; allowed: {NAMES}, such as groe-1'),
        (MINIMAL + "name = '-'\n", f'run.name: "-" is refused; allowed: {NAMES}'),
        (MINIMAL + "name = 3\n", f"run.name: 3 is refused; allowed: {NAMES}"),
        ("[run]\ntotal_tokens = 1e30\n", "1e+30 is refused; allowed: an integer above 0 and below 2^63"),
        (MINIMAL + '"a\\nb" = 1\n', "run.a\\nb: unknown key"),
        (MINIMAL + "[data]\nfield = ''\n", 'data.field: "" is refused; allowed: a non-empty string'),
        ("run = 3\n", "run: 3 is not a section; allowed: [run] with keys below it"),
        ("[[run]]\ntotal_tokens = 5\n", "is not a section; allowed: [run] with keys below it"),
        ("[run]\ntotal_tokens = 1999-01-01\n", 'run.total_tokens: "1999-01-01" is refused; allowed: an integer'),
        ("[run]\ntotal_tokens = 9223372036854775808\n", "is refused; allowed: an integer above 0 and below 2^63"),
        ("[run]\ntotal_tokens = 1" + "0" * 5000, "not TOML"),
        (MINIMAL + "[published]\ncreated = 'x'\n", "published: only `swarmtrain bootstrap` writes this section"),
    ],
)
def test_each_problem_names_the_key_and_what_is_allowed(text: str, expected: str) -> None:
    with pytest.raises(RunFileError) as caught:
        parse_run(text, "my.toml")
    message = str(caught.value)
    assert message.startswith("my.toml: ")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize("number", ["3e5", "300_000.0", "3.0e+5", "300_000"])
def test_a_whole_number_may_be_written_short(number: str) -> None:
    run = parse_run(f"[run]\ntotal_tokens = {number}\n[merge]\ninner_steps = 2.0\n", "r")
    assert (run.run.total_tokens, run.merge.inner_steps) == (300_000, 2)
    assert all(type(value) is int for value in (run.run.total_tokens, run.merge.inner_steps))
    assert b"total_tokens = 300000\n" in published_bytes(run), "as peers of before read it"


MANY = """# a run
[run]
name = "My Run"  # [model]
total_tokens = \"""
[merge] inner_steps = 1
\"""

[merge]
inner_steps = 2.5
pacing = 1
[model]
width = 30
[data]
paths = [
    "a", 3,
]
[inner]
beta1 = 2
"beta3" = 0.5
[[network]]
"""


def test_all_problems_are_told_with_their_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunFileError) as caught:
        parse_run(MANY.replace("[[network]]", ""), "my.toml")
    problems = [line.removeprefix("my.toml: ") for line in caught.value.problems]
    first = [" ".join(line.split(": ")[:2]) for line in problems[:5]]
    assert first == ["line 3 run.name", "line 4 run.total_tokens", "line 9 merge.inner_steps", "line 10 merge.pacing", "line 12 model.width"]  # fmt: skip
    assert problems[5:] == ["and 3 more problems"]
    assert str(caught.value) == "; also ".join(caught.value.problems)
    with pytest.raises(RunFileError) as caught:
        parse_run("inner.beta1 = 2\nrun.total_tokens = 'x'\n[network]\nmax_readers = 1\n[[publish]]\n", "my.toml")
    assert [line.split(": ")[1:3] for line in caught.value.problems] == [
        ["line 1", "inner.beta1"], ["line 2", "run.total_tokens"], ["line 5", "publish"],
    ]  # fmt: skip
    (tmp_path / "run.toml").write_text("[run]\ntotal_tokens = 'x'\n[merge]\npacing = 1\n")
    assert run_command(["check", str(tmp_path / "run.toml")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [error.split(": ")[:3:2] for error in errors] == [["error", "line 2"], ["error", "line 4"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[model]\nwidth = 30\nnum_heads = 4\n", "model.width: 30 does not give model.num_heads = 4 heads"),
        ("[model]\nwidth = 12\nnum_heads = 4\n", "allowed: a multiple of 8"),
        ("[model]\nvocabulary_size = 300\n", 'model.vocabulary_size: 300 with model.tokenizer = "bytes"; allowed: 256'),
        ("[model]\ntokenizer = 'bpe'\n", 'model.vocabulary_size: 256 with model.tokenizer = "bpe"; allowed: 257'),
        ("[model]\nfeed_forward_ratio = 1e-6\n", "model.feed_forward_ratio: too small; allowed: at least 0.0078125"),
        ("[data]\nsource = 'text'\n", 'data.paths: missing; data.source = "text" needs it'),
        ("[data]\nsource = 'jsonl'\n", 'data.paths: missing; data.source = "jsonl" needs it'),
        ("[data]\nsource = 'datasets'\n", 'data.dataset: missing; data.source = "datasets" needs it'),
        ("[data]\npaths = ['a']\n", 'data.paths: has no meaning with data.source = "python-stdlib"; allowed: with "text"'),
        ("[data]\ndataset = 'a'\n", 'data.dataset: has no meaning with data.source = "python-stdlib"'),
        ("[data]\nstreaming = true\n", "data.streaming: has no meaning"),
        ("[data]\nsource = 'text'\npaths = ['a']\nfield = 'body'\n", 'data.field: has no meaning with data.source = "text"'),
        ("[data]\nsplit = 'a\\u001b[31m'\n".replace("'", '"'), "data.split: contains a control character"),
        ("[inner]\nmicrobatch_sequences = 5\n", "does not divide inner.batch_sequences = 16; allowed: 0 or a divisor"),
        ("[inner]\nmicrobatch_sequences = 32\n", "inner.microbatch_sequences: 32 does not divide"),
        ("[inner]\nbatch_sequences = 100000\n", "run.total_tokens: 1000000 is less than one inner step; allowed: at least"),
        ("[model]\ncontext_tokens = 2048\n[data]\nheld_out_bytes = 2048\n", "data.held_out_bytes: 2048 holds no training"),
        ("[pipeline]\nstages = 0\n", "pipeline.stages: 0 is refused; allowed: an integer from 1 to 512"),
        ("[pipeline]\nstages = 513\n", "pipeline.stages: 513 is refused; allowed: an integer from 1 to 512"),
        ("[pipeline]\nstages = 7\n", "pipeline.stages: 7 with model.num_layers = 4; allowed: at most 6 (only the first"),
        ("[pipeline]\nstages = 3\nboundaries = [2]\n", "pipeline.boundaries: 1 with pipeline.stages = 3; allowed: 2, or none"),
        ("[pipeline]\nboundaries = [2]\n", "pipeline.boundaries: 1 with pipeline.stages = 1; allowed: 0, or none"),
        ("[pipeline]\nstages = 3\nboundaries = [2, 2]\n", "pipeline.boundaries: [2, 2]; allowed: each larger than the one"),
        ("[pipeline]\nstages = 3\nboundaries = [3, 1]\n", "pipeline.boundaries: [3, 1]; allowed: each larger than the one"),
        ("[pipeline]\nstages = 3\nboundaries = [1, 5]\n", "pipeline.boundaries: [1, 5]; allowed: at most model.num_layers = 4"),
        ("[pipeline]\nstages = 2\nboundaries = [-1]\n", "pipeline.boundaries.0: -1 is refused"),
        ("[pipeline]\nstages = 2\nboundaries = ['1']\n", 'pipeline.boundaries.0: "1" is refused'),
        ("[pipeline]\nstages = 2\n[inner]\nprecision = 'fp16'\n", 'inner.precision: "fp16" with pipeline.stages = 2; allowed: "any", "fp32" or "bf16"'),
        ("[pipeline]\nstages = 2\n[merge]\nmethod = 'diloco'\n", 'pipeline.stages: 2 with merge.method = "diloco"; allowed: with "gossip"'),
        ("[pipeline]\nstages = 2\n[evaluation]\nevery_rounds = 4\n", "evaluation.every_rounds: 4 with pipeline.stages = 2; allowed: 0"),
        ("[pipeline]\nstages = 2\n[merge]\nmethod = 'server'\n", 'pipeline.stages: 2 with merge.method = "server"; allowed: with "gossip"'),
        ("[pipeline]\nactivations = 'int4'\n", 'pipeline.activations: "int4" is refused; allowed: "fp32" or "bf16" or "int8"'),
        ("[pipeline]\nwiring = 'random'\n", 'pipeline.wiring: "random" is refused; allowed: "round-robin" or "least-completion"'),
        ("[pipeline]\nbalance = 'always'\n", 'pipeline.balance: "always" is refused; allowed: "rates" or "queues" or "none"'),
        ("[pipeline]\nbalance_every_s = 0.5\n", "pipeline.balance_every_s: 0.5 is refused; allowed: a number from 1 to 3600"),
        ("[pipeline]\nin_flight = 1025\n", "pipeline.in_flight: 1025 is refused; allowed: an integer from 0 to 1024"),
        ("[pipeline]\nin_flight = -1\n", "pipeline.in_flight: -1 is refused; allowed: an integer from 0 to 1024"),
        ("[pipeline]\nstage = 2\n", "pipeline.stage: unknown key; did you mean pipeline.stages?"),
    ],
)  # fmt: skip
def test_impossible_combinations_are_refused(text: str, expected: str) -> None:
    with pytest.raises(RunFileError) as caught:
        parse_run(MINIMAL + text, "my.toml")
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[run]\ntotal_tokens\n", "line 2, column 13: not TOML: Expected '=' after a key"),
        ("[run]\na = 1\na = 2\n", "line 3, column 6: not TOML: Cannot overwrite a value"),
        ("[run", "line 1, column 5: not TOML"),
        ("x = [1,\n 2", "line 2, column 3: not TOML"),
        ("x = " + "[" * 30_000, "nested too deeply"),
    ],
)
def test_a_toml_error_names_line_and_column(text: str, expected: str) -> None:
    with raises_code("not-toml", RunFileError, "my.toml: ") as caught:
        parse_run(text, "my.toml")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_loading_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    with raises_code("no-run-file", RunFileError, "examples/stdlib-gpt.toml"):
        load_run(path)
    with raises_code("path-is-folder", RunFileError):
        load_run(tmp_path)
    path.write_bytes(b"[run]\n# \xff\xfe\ntotal_tokens = 5\n")
    with raises_code("not-utf8", RunFileError, "line 2"):
        load_run(path)
    path.write_bytes(b"#" * (MAX_RUN_FILE_BYTES + 1))
    with raises_code("file-too-long", RunFileError, "65536"):
        load_run(path)
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_run(str(path)) == parse_run(MINIMAL, "x")


def test_published_bytes_hold_every_default_and_nothing_absent() -> None:
    data = published_bytes(published())
    text = data.decode()
    for name, field in RunFile.model_fields.items():
        assert f"[{name}]" in text, field
    assert "inner_steps = 25" in text
    assert "tokenizer_sha256" not in text


def test_publishing_twice_gives_the_same_bytes_and_round_trips() -> None:
    run = published()
    data = published_bytes(run)
    assert data == published_bytes(run.model_copy(deep=True))
    assert len(run_sha256(data)) == 64
    again = parse_published_untrusted(data, run_sha256(data))
    assert again == run
    assert published_bytes(again) == data


def refused(data: bytes, sha256: str = "") -> str:
    """Return the line that a person sees, with the code at its end."""
    with pytest.raises(BadBytesError) as caught:
        parse_published_untrusted(data, sha256 or run_sha256(data))
    assert "\n" not in str(caught.value)
    return with_code(str(caught.value), caught.value.code)


def test_published_bytes_are_hashed_before_they_are_read() -> None:
    data = published_bytes(published())
    assert codes_in(refused(data, "00" * 32)) == ["bad-hash"]
    assert codes_in(refused(b"\xff not even text", "00" * 32)) == ["bad-hash"]
    too_long = refused(b" " * (MAX_RUN_FILE_BYTES + 1))
    assert codes_in(too_long) == ["bad-size"] and "65537 bytes; at most 65536 " in too_long


def test_malformed_published_bytes_are_refused() -> None:
    assert codes_in(refused(b"\xff\xfe")) == ["bad-format"]
    assert codes_in(refused(b"[run")) == ["not-toml"]
    assert codes_in(refused(b"x = " + b"[" * 60_000)) == ["not-toml"]
    assert codes_in(refused(MINIMAL.encode())) == ["published-section"]
    assert codes_in(refused(b"published = 3\n" + MINIMAL.encode())) == ["published-section"]
    assert "published.created" in refused(published_bytes(published()).replace(b"2030-01-02T", b"yesterday"))
    assert codes_in(refused(published_bytes(published()).replace(b"inner_steps = 25", b"inner_steps = -1"))) == [
        "out-of-range"
    ]


def test_a_tokenizer_must_fit_the_model() -> None:
    run = published()
    assert run.published is not None
    learnt = run.published.model_copy(update={"tokenizer_sha256": "cd" * 32, "tokenizer_bytes": 10})
    data = published_bytes(run.model_copy(update={"published": learnt}))
    assert "published.tokenizer_sha256: " in refused(data) and codes_in(refused(data)) == ["keys-disagree"]


# ---------------------------------------------------------------- pipelines


@pytest.mark.parametrize("stages", [2, 5, 6])
def test_a_model_can_be_cut_before_each_block_and_before_the_head(stages: int) -> None:
    run = parse_run(MINIMAL + f"[pipeline]\nstages = {stages}\n", "r")
    assert run.pipeline.stages == stages and run.pipeline.boundaries == ()
    cut = list(range(stages - 1))
    run = parse_run(MINIMAL + f"[pipeline]\nstages = {stages}\nboundaries = {cut}\n", "r")
    assert run.pipeline.boundaries == tuple(cut)


def test_the_defaults_are_no_pipeline() -> None:
    section = parse_run(MINIMAL, "r").pipeline
    assert (section.stages, section.boundaries, section.in_flight) == (1, (), 0)
    assert (section.activations, section.wiring) == ("bf16", "round-robin")
    assert (section.balance, section.balance_every_s) == ("rates", 10.0)


@pytest.mark.parametrize(
    ("batch", "microbatch", "stages", "expected"),
    [
        (16, 0, 1, 16),
        (16, 4, 1, 4),
        (64, 0, 2, 2),
        (16, 4, 2, 4),
        (16, 16, 2, 16),
        (8, 0, 2, 1),
        (7, 0, 2, 1),
        (1, 0, 2, 1),
        (100, 0, 3, 3),
    ],
)
def test_so_many_sequences_are_computed_at_once(batch: int, microbatch: int, stages: int, expected: int) -> None:
    inner = f"[inner]\nbatch_sequences = {batch}\nmicrobatch_sequences = {microbatch}\n"
    assert parse_run(f"{MINIMAL}{inner}[pipeline]\nstages = {stages}\n", "r").microbatch_sequences == expected


@pytest.mark.parametrize(
    ("stages", "merge", "steps"),
    [
        (1, 'method = "diloco"', 25),
        (1, "pacing = false", 25),
        (1, "", most_inner_steps(25)),
        (2, "pacing = false", 29),
        (6, "pacing = false", 29),
        (2, "", most_inner_steps(25) + 4),
        (1, 'method = "batch"', 26),
    ],
)
def test_a_round_may_end_when_those_of_others_do_and_after_a_large_step(stages: int, merge: str, steps: int) -> None:
    run = parse_run(f"{MINIMAL}[merge]\n{merge}\n[pipeline]\nstages = {stages}\n", "r")
    assert run.max_round_tokens == steps * run.tokens_per_step


def pipeline_bytes(stages: int = 3, **fields: object) -> bytes:
    """Return a published run of so many stages, as anybody could write it."""
    run = published(MINIMAL + f"[pipeline]\nstages = {stages}\n")
    table = run.model_dump(mode="json", exclude_none=True)
    table["published"] |= {"boundaries": [1, 3], "stage_costs": [0.25, 0.5, 0.25]} | fields
    table["published"] = {key: value for key, value in table["published"].items() if value is not None}
    return tomli_w.dumps(table).encode()


def test_a_pipeline_survives_publication() -> None:
    data = pipeline_bytes()
    run = parse_published_untrusted(data, run_sha256(data))
    assert run.published is not None
    assert (run.published.boundaries, run.published.stage_costs) == ((1, 3), (0.25, 0.5, 0.25))
    again = published_bytes(run)
    assert parse_published_untrusted(again, run_sha256(again)) == run
    data = pipeline_bytes(6, boundaries=[0, 1, 2, 3, 4], stage_costs=[1e-9, 0.2, 0.2, 0.2, 0.2, 0.2])
    assert parse_published_untrusted(data, run_sha256(data)).pipeline.stages == 6
    assert b"boundaries = []" in published_bytes(published()) and b"stage_costs" not in published_bytes(published())


@pytest.mark.parametrize(
    "fields",
    [
        {"boundaries": None},
        {"stage_costs": None},
        {"boundaries": None, "stage_costs": None},
        {"boundaries": []},
        {"boundaries": [1]},
        {"boundaries": [1, 2, 3]},
        {"boundaries": [2, 2]},
        {"boundaries": [3, 1]},
        {"boundaries": [1, 5]},
        {"boundaries": [-1, 3]},
        {"boundaries": [1, 2**62]},
        {"boundaries": [1.5, 3]},
        {"boundaries": ["1", "3"]},
        {"boundaries": [True, 3]},
        {"boundaries": 3},
        {"stage_costs": [0.5, 0.5]},
        {"stage_costs": [0.25] * 4},
        {"stage_costs": [0.0, 0.5, 0.5]},
        {"stage_costs": [-0.5, 0.5, 1.0]},
        {"stage_costs": [1.5, 0.5, 0.5]},
        {"stage_costs": [math.nan, 0.5, 0.5]},
        {"stage_costs": [math.inf, 0.5, 0.5]},
        {"stage_costs": ["\x1b[2J", 0.5, 0.5]},
        {"stage_costs": [0.1] * 100_000},
        {"stages": 1},
        {"stages": 4},
    ],
    ids=lambda fields: str(fields)[:50],
)
def test_published_stages_must_fit_the_model_and_each_other(fields: dict[str, object]) -> None:
    stages = fields.pop("stages", 3)
    assert isinstance(stages, int)
    message = refused(pipeline_bytes(stages, **fields))
    assert len(message.splitlines()) == 1 and message.isprintable()
    assert "boundaries" in message or "stage_costs" in message or codes_in(message) == ["bad-size"]


@pytest.mark.parametrize("key", ["boundaries", "stage_costs"])
def test_a_whole_model_is_published_without_stages(key: str) -> None:
    only = {"boundaries": [1], "stage_costs": [0.5, 0.5]}[key]
    fields: dict[str, object] = {"boundaries": None, "stage_costs": None} | {key: only}
    assert codes_in(refused(pipeline_bytes(1, **fields))) == ["keys-disagree"]


SOURCES = """\
[[data.sources]]
name = "code"
weight = 3
[[data.sources]]
name = "web"
source = "datasets"
dataset = "anna/pages"
streaming = true
[[data.sources]]
name = "talks"
weight = 0.004
source = "jsonl"
paths = ["talks/*.jsonl.gz"]
"""


def test_several_sources_have_weights() -> None:
    data = parse_run(MINIMAL + SOURCES, "r").data
    assert [source.name for source in data.mixture] == ["code", "web", "talks"]
    assert [round(share, 4) for share in data.shares] == [0.7493, 0.2498, 0.001]
    assert sum(data.held_out_limits) <= 65_536 and data.held_out_limits[2] == 4096, "enough to say something"
    assert data.held_out_limits[0] == pytest.approx(3 * data.held_out_limits[1], abs=3)
    assert [source.is_streamed for source in data.mixture] == [False, True, False]
    one = parse_run(MINIMAL + '[data]\nsource = "text"\npaths = ["a"]\n', "r").data
    assert one.shares == (1.0,) and one.held_out_limits == (65_536,)
    assert (one.mixture[0].name, one.mixture[0].source, one.mixture[0].paths) == ("", "text", ("a",))
    assert b"held_out_source_bytes" not in published_bytes(published())


def of_sources(**fields: object) -> RunFile:
    run = published(MINIMAL + SOURCES)
    assert run.published is not None
    told = {"held_out_source_bytes": (40_000, 20_000, 5_536), "dataset_revisions": ("", "a" * 40, ""), **fields}
    return run.model_copy(update={"published": run.published.model_copy(update=told)})


def test_what_is_published_of_several_sources_says_which_part_and_which_commit_is_of_each() -> None:
    run = of_sources()
    data = published_bytes(run)
    assert b'source = "python-stdlib"' not in data.partition(b"[[data.sources]]")[0], "it has no meaning there"
    assert parse_published_untrusted(data, run_sha256(data)) == run
    assert run.dataset_revisions == ("", "a" * 40, "") and published().dataset_revisions == ("",)


@pytest.mark.parametrize(
    "fields",
    [
        {"held_out_source_bytes": None},
        {"held_out_source_bytes": (40_000, 25_536)},
        {"held_out_source_bytes": (40_000, 20_000, 5_000)},
        {"dataset_revisions": ("a" * 40, "", "")},
        {"dataset_revisions": ("", "a" * 40)},
        {"dataset_revision": "a" * 40},
    ],
)
def test_parts_and_commits_that_do_not_fit_the_sources_are_refused(fields: dict[str, object]) -> None:
    data = published_bytes(of_sources(**fields))
    with pytest.raises(BadBytesError) as caught:
        parse_published_untrusted(data, run_sha256(data))
    assert "published." in str(caught.value)
    for old, new in ((b'"' + b"a" * 40 + b'"', b'"main"'), (b"    40000,\n    20000,", b"    60000,\n    0,")):
        data = published_bytes(of_sources()).replace(old, new)
        with pytest.raises(BadBytesError, match="is refused; allowed"):
            parse_published_untrusted(data, run_sha256(data))
    text = published_bytes(published()).decode() + "held_out_source_bytes = [65536]\n"
    with raises_code("keys-disagree", BadBytesError, "published.held_out_source_bytes"):
        parse_published_untrusted(text.encode(), run_sha256(text.encode()))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("weight = 3", "weight = 0", "line 5: data.sources.1.weight: 0 is refused; allowed: a number above 0 and at"),
        ("weight = 3", "wieght = 3", "line 5: data.sources.1.wieght: unknown key; did you mean data.sources.1.weight?"),
        ("weight = 3", "shards = 3", "line 5: data.sources.1.shards: belongs in [data]"),
        (
            "weight = 3",
            "colour = 3",
            "line 5: data.sources.1.colour: unknown key; allowed: name, weight, source, paths",
        ),
        ("weight = 3", 'subset = "x"', 'line 5: data.sources.1.subset: has no meaning with source = "python-stdlib"'),
        ('name = "web"\n', "", "line 6: data.sources.2.name: missing; allowed: up to 32 lower-case letters"),
        ('"web"', '"Web pages"', 'line 7: data.sources.2.name: "Web pages" is refused; allowed: up to 32 lower-case'),
        ('"web"', '"code"', "line 3: data.sources: two are called code; allowed: a name of its own for each"),
        ('paths = ["talks/*.jsonl.gz"]', "", 'line 11: data.sources.3.paths: missing; source = "jsonl" needs it'),
        ('["talks/*.jsonl.gz"]', '["a", 7]', "line 15: data.sources.3.paths.1: 7 is refused; allowed: a list of str"),
        (
            "[[data.sources]]",
            "[data]\nfield = 'x'\n[[data.sources]]",
            "line 4: data.field: has no meaning beside [[data.s",
        ),
        (
            "[[data.sources]]",
            "[data]\nweight = 2\n[[data.sources]]",
            "line 4: data.weight: belongs in [[data.sources]]",
        ),
        (
            "[[data.sources]]",
            "[data]\nheld_out_bytes = 9000\n[[data.sources]]",
            "line 4: data.held_out_bytes: 9000 with 3 ",
        ),
    ],
)
def test_a_mistake_in_a_source_names_its_number_its_line_and_what_is_allowed(old: str, new: str, expected: str) -> None:
    with pytest.raises(RunFileError) as caught:
        parse_run(MINIMAL + SOURCES.replace(old, new, 1), "r")
    assert expected in str(caught.value), caught.value


def test_what_is_no_list_of_tables_is_said() -> None:
    for text in ("[data.sources]\nname = 'code'\n", "[data]\nsources = 3\n", "[data]\nsources = [3]\n"):
        with raises_code("wrong-type", RunFileError, "data.sources", "allowed: tables `[[data.sources]]`"):
            parse_run(MINIMAL + text, "r")


def test_each_source_has_as_many_shards_as_rounds_of_its_share_fit_into_it() -> None:
    run = parse_run(MINIMAL + SOURCES.replace("streaming = true\n", ""), "r")  # a round reads 51,200 tokens
    assert run.num_shards(10 * 51_200, 0, 3 * 256) == (13, 0, 3)
    assert run.num_shards(100 * 51_200, 51_200, 256) == (64, 4, 0), "what one round reads is in no shards"
    assert parse_run(MINIMAL + SOURCES + "[merge]\nmethod = 'diloco'\n", "r").num_shards(10**6, 0, 10**6) == (0, 0, 0)


def test_a_newer_publisher_asks_for_an_upgrade() -> None:
    data = published_bytes(published(version="99.1.0")) + b"\n[telepathy]\nrange_m = 3\n"
    told = refused(data)
    assert codes_in(told) == ["run-needs-newer"] and "99.1.0" in told and __version__ in told
    data = published_bytes(published()) + b"\n[telepathy]\nrange_m = 3\n"
    assert codes_in(refused(data)) == ["unknown-key"]
    hostile = published_bytes(published()).replace(f'"{__version__}"'.encode(), b'"99 \\u001b[2J\\n"')
    assert "\x1b" not in refused(hostile)


def test_a_run_too_big_to_publish_is_said_at_once() -> None:
    paths = [f"folder/{index}.txt" for index in range(5000)]
    run = parse_run(MINIMAL + tomli_w.dumps({"data": {"source": "text", "paths": paths}}), "r")
    with raises_code("file-too-long", RunFileError, "data.paths"):
        published_bytes(run)


_PRINTABLE = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=20)
_RUNS = st.fixed_dictionaries(
    {
        "run": st.fixed_dictionaries(
            {
                "total_tokens": st.integers(2048, 2**63 - 1),
                "seed": st.integers(0, 2**63 - 1),
                "name": st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=64),
            }
        ),
        "data": st.fixed_dictionaries(
            {"source": st.just("text"), "paths": st.lists(_PRINTABLE, min_size=1, max_size=3)}
        ),
        "inner": st.fixed_dictionaries({"learning_rate": st.floats(1e-12, 10), "beta1": st.floats(0, 0.999)}),
    }
)


@given(_RUNS)
@settings(max_examples=60)
def test_any_accepted_run_survives_publication(table: dict[str, object]) -> None:
    run = published(tomli_w.dumps(table))
    data = published_bytes(run)
    assert parse_published_untrusted(data, run_sha256(data)) == run


@given(st.one_of(st.binary(max_size=300), st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))))
@settings(max_examples=200)
def test_any_bytes_give_a_run_or_one_error(data: bytes) -> None:
    refused(data)


_KEYS = st.sampled_from(["run", "model", "data", "inner", "merge", "published", "zzz", "a\nb", "paths", "total_tokens"])
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=8,
).filter(lambda value: value is not None)


def _without_none(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value if item is not None]
    return value


@given(st.dictionaries(_KEYS, _VALUES, max_size=5))
@settings(max_examples=200)
def test_any_table_gives_one_line(table: dict[str, object]) -> None:
    text = tomli_w.dumps(_without_none(table))  # type: ignore[arg-type]
    with pytest.raises(RunFileError) as caught:
        parse_run(text, "r")
    assert str(caught.value).isprintable()


def test_every_example_is_a_run() -> None:
    for path in (Path(__file__).resolve().parent.parent / "examples").glob("*.toml"):
        load_run(path)


def test_a_limit_of_the_link_must_leave_transfers_fast_enough() -> None:
    run = {"run": {"total_tokens": 100_000}}
    for key in ("up_mbit", "down_mbit"):
        RunFile.model_validate(run | {"network": {key: 0.0}})
        RunFile.model_validate(run | {"network": {key: 0.53}})
        RunFile.model_validate(run | {"network": {key: 0.1, "min_pull_bytes_per_s": 0.0, "stall_limit_s": 60.0}})
        with pytest.raises(ValueError, match=rf"network.{key}: 0.5 .* 0.53"):
            RunFile.model_validate(run | {"network": {key: 0.5}})
        with pytest.raises(ValueError, match=rf"network.{key}: 5 "):
            RunFile.model_validate(run | {"network": {key: 5.0, "stall_limit_s": 5e-324}})


@pytest.mark.parametrize("value", ["[-1]", "['1']", "3"])
def test_boundaries_are_no_strings(value: str) -> None:
    with pytest.raises(RunFileError) as caught:
        parse_run(f"{MINIMAL}[pipeline]\nstages = 2\nboundaries = {value}\n", "my.toml")
    assert "strings" not in str(caught.value), str(caught.value)


@pytest.mark.parametrize("boundaries", [[3, 1], [1, 5], [-1, 3]])
def test_a_wrong_published_boundary_is_named(boundaries: list[int]) -> None:
    data = pipeline_bytes(boundaries=boundaries)
    with raises_code("keys-disagree", BadBytesError, "published.boundaries"):
        parse_published_untrusted(data, run_sha256(data))


def batch_run(**merge: object) -> RunFile:
    return RunFile.model_validate(
        {
            "run": {"total_tokens": 10**6},
            "model": {"context_tokens": 64},
            "inner": {"batch_sequences": 4},
            "merge": {"method": "batch", **merge},
        }
    )


def test_a_large_batch_is_given_in_tokens_or_in_inner_steps() -> None:
    assert batch_run(inner_steps=10).batch_target.at(0) == 2560
    given = batch_run(target_tokens=2500)
    assert (given.batch_target.at(10**5), given.merge.inner_steps) == (2500, 10)
    data = published_bytes(given.model_copy(update={"published": published().published}))
    assert parse_published_untrusted(data, run_sha256(data)).merge == given.merge
    with pytest.raises(ValueError, match=r"inner_steps: 25 with merge.target_tokens = 2500, .* allowed: 10"):
        batch_run(target_tokens=2500, inner_steps=25)
    with pytest.raises(ValueError, match="are 3906250 inner steps; allowed"):
        batch_run(target_tokens=10**9)


def test_a_large_batch_may_grow_with_the_run() -> None:
    grows = batch_run(inner_steps=10, target_tokens="auto")
    target = grows.batch_target
    assert target.at(0) == 2560 and target.at(5 * 10**5) == 10**4 and grows.merge.inner_steps == 10
    assert grows.round_tokens == target.most_tokens > 2560 and grows.max_round_tokens >= target.most_tokens + 256
    data = published_bytes(grows.model_copy(update={"published": published().published}))
    assert b'target_tokens = "auto"' in data
    assert parse_published_untrusted(data, run_sha256(data)).merge == grows.merge
    assert batch_run(target_tokens=2.56e3).batch_target.at(10**5) == 2560


@pytest.mark.parametrize("value", ['"large"', "-1", "1.5", "true", "1_000_000_000_001", "[1]"])
def test_a_target_that_is_neither_a_number_nor_auto_is_refused(value: str) -> None:
    with pytest.raises(RunFileError) as caught:
        parse_run(f'{MINIMAL}[merge]\nmethod = "batch"\ntarget_tokens = {value}\n', "my.toml")
    (line,) = str(caught.value).splitlines()
    assert "merge.target_tokens: " in line
    assert line.endswith('is refused; allowed: an integer from 0 to 1000000000000, or "auto"'), line


def test_gradients_of_a_large_batch_travel_in_some_formats() -> None:
    assert batch_run().merge.roster_format == "fp32" and batch_run(gradient_format="int8").merge.roster_format == "int8"
    with pytest.raises(ValueError, match=r'gradient_format: "int2" with .* allowed: "fp32", "bf16"'):
        batch_run(gradient_format="int2")


@pytest.mark.parametrize(
    "merge", [{"outer_momentum": 0.9}, {"pacing": True}, {"outer_learning_rate": 1.0}, {"robust": "clip"}]
)
def test_keys_of_an_outer_step_have_no_meaning_with_a_large_batch(merge: dict[str, object]) -> None:
    with pytest.raises(
        ValueError, match=f'merge.{next(iter(merge))}: has no meaning with merge.method = "batch"; allowed: with '
    ):
        batch_run(**merge)


@pytest.mark.parametrize("section", ["merge", "network", "pipeline"])
def test_no_duration_is_longer_than_thirty_years(section: str) -> None:
    fields = section_fields(RunFile.model_fields[section].annotation)
    for key in (key for key in fields if key.endswith("_s") and not key.endswith("_per_s")):
        with raises_code(
            "out-of-range", RunFileError, f"run.toml: line 4: {section}.{key}: 1e+308 is refused; allowed: "
        ):
            parse_run(f"{MINIMAL}[{section}]\n{key} = 1e308\n", "run.toml")


@pytest.mark.parametrize("key", ["{}a = 1", "[{}a]", "x = {{{}a = 1}}", "'a' . {}a = 1", '"\\"".{}a = 1'])
def test_a_key_of_thousands_of_parts_is_refused_before_it_is_parsed(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n" + key.format("a." * 16_000)
    monkeypatch.setattr("swarmtrain.problems.tomllib.loads", lambda text: pytest.fail("it was parsed"))
    with raises_code("not-toml", RunFileError, "run.toml: line 2: not TOML that a run file needs: a key of too many"):
        parse_run(text, "run.toml")
    with raises_code("not-toml", BadBytesError):
        parse_published_untrusted(text.encode(), run_sha256(text.encode()))
