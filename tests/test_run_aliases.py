"""Words of the field in a run file: what each is read as, what is said, and that what is published has ours only."""

from __future__ import annotations

import hashlib
import itertools
import re
from pathlib import Path

import pytest
import tomli_w
from codes import raises_code

from swarmtrain import __version__
from swarmtrain.cli.main import run as run_command
from swarmtrain.errors import BadBytesError, RunFileError, UserError
from swarmtrain.model.gpt import build_model
from swarmtrain.run import (
    DataSource,
    PublishedSection,
    RunFile,
    load_run,
    parse_published_untrusted,
    parse_run,
    published_bytes,
)
from swarmtrain.run_aliases import ALIASES, our_key

MINIMAL = "[run]\ntotal_tokens = 1_000_000\n"


def published(run: RunFile) -> bytes:
    section = PublishedSection(
        created="2030-01-02T03:04:05+00:00", swarmtrain=__version__, held_out_sha256="ab" * 32, held_out_bytes=65_536
    )
    return published_bytes(run.model_copy(update={"published": section}))


def said(text: str) -> list[str]:
    lines: list[str] = []
    parse_run(text, "my.toml", tell=lines.append)
    return lines


SAME = [
    # transformers' config.json and TrainingArguments
    (
        "[run]\nmax_tokens = 2e6\nrandom_seed = 3\nrun_name = 'first'\n[model]\nhidden_size = 256\nnum_hidden_layers = 6\n"
        "num_attention_heads = 8\nvocab_size = 256\nmax_position_embeddings = 64\nintermediate_size = 688\n"
        "[inner]\nper_device_train_batch_size = 4\ngradient_accumulation_steps = 8\nlearning_rate = 3e-4\n"
        "adam_beta1 = 0.8\nadam_beta2 = 0.9\nmax_grad_norm = 0.5\nwarmup_ratio = 0.02\n"
        "[evaluation]\neval_steps = 100\nper_device_eval_batch_size = 8\n",
        "[run]\ntotal_tokens = 2_000_000\nseed = 3\nname = 'first'\n[model]\nwidth = 256\nnum_layers = 6\nnum_heads = 8\n"
        "vocabulary_size = 256\ncontext_tokens = 64\nfeed_forward_ratio = 2.6875\n"
        "[inner]\nbatch_sequences = 32\nmicrobatch_sequences = 4\nlearning_rate = 3e-4\nbeta1 = 0.8\nbeta2 = 0.9\n"
        "gradient_clip = 0.5\nwarmup_fraction = 0.02\n[evaluation]\nevery_rounds = 4\nbatch_sequences = 8\n",
    ),
    # nanoGPT's
    (
        "[run]\ntotal_tokens = 1_000_000\n[model]\nn_layer = 3\nn_head = 2\nn_embd = 64\nblock_size = 32\n"
        "[inner]\nlearning_rate = 3e-3\nmin_lr = 3e-4\ngrad_clip = 1\nwarmup_iters = 0\nbeta1 = 0.9\n"
        "[evaluation]\neval_interval = 0\n",
        "[run]\ntotal_tokens = 1_000_000\n[model]\nnum_layers = 3\nnum_heads = 2\nwidth = 64\ncontext_tokens = 32\n"
        "[inner]\nfloor_fraction = 0.1\nwarmup_fraction = 0\n",
    ),
    # torchtitan's and OpenDiLoCo's
    (
        "[run]\ntotal_tokens = 1_000_000\n[model]\ndim = 64\nn_layers = 3\nn_heads = 2\nmax_seq_len = 32\n"
        "[inner]\nlr = 1e-3\nbetas = [0.9, 0.99]\nmax_norm = 2.0\nmin_lr_ratio = 0.2\nbatch_size = 8\nmicro_batch_size = 2\n"
        "[merge]\nmethod = 'diloco'\nlocal_steps = 50\nouter_lr = 0.6\n",
        "[run]\ntotal_tokens = 1_000_000\n[model]\nwidth = 64\nnum_layers = 3\nnum_heads = 2\ncontext_tokens = 32\n"
        "[inner]\nlearning_rate = 1e-3\nbeta1 = 0.9\nbeta2 = 0.99\ngradient_clip = 2.0\nfloor_fraction = 0.2\n"
        "batch_sequences = 8\nmicrobatch_sequences = 2\n"
        "[merge]\nmethod = 'diloco'\ninner_steps = 50\nouter_learning_rate = 0.6\n",
    ),
    # the rest
    (
        "[run]\ntotal_tokens = 1_000_000\n[data]\nsource = 'datasets'\ndataset_name = 'a/b'\ndataset_config = 'c'\n"
        "dataset_split = 'd'\ntext_column = 'e'\n[inner]\nbatch_sequences = 16\ngrad_accum_steps = 4\n"
        "[merge]\nH = 30\nnum_fragments = 2\n[pipeline]\nnum_stages = 2\n",
        "[run]\ntotal_tokens = 1_000_000\n[data]\nsource = 'datasets'\ndataset = 'a/b'\nsubset = 'c'\nsplit = 'd'\n"
        "field = 'e'\n[inner]\nmicrobatch_sequences = 4\n[merge]\ninner_steps = 30\nfragments = 2\n[pipeline]\nstages = 2\n",
    ),
    ("[run]\ntotal_tokens = 1e6\n[data]\nsource = 'text'\ndata_files = ['a']\n", "[run]\ntotal_tokens = 1e6\n[data]\nsource = 'text'\npaths = ['a']\n"),
    (
        "[run]\ntotal_tokens = 1e6\n[inner]\nmicro_batch_size = 4\nbatch_size = 16\n",
        "[run]\ntotal_tokens = 1e6\n[inner]\nmicrobatch_sequences = 4\n",
    ),
    (
        "[run]\ntotal_tokens = 1e6\n[inner]\nmicrobatch_sequences = 4\nbatch_sequences = 16\ngradient_accumulation_steps = 4\n",
        "[run]\ntotal_tokens = 1e6\n[inner]\nmicrobatch_sequences = 4\n",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours"), SAME)
def test_a_file_in_words_of_the_field_is_published_as_the_same_bytes(theirs: str, ours: str) -> None:
    run = parse_run(theirs, "my.toml")
    assert run == parse_run(ours, "my.toml")
    assert published(run) == published(parse_run(ours, "my.toml"))


def test_each_word_is_read_or_refused_in_its_section() -> None:
    """With a value of the default's kind: an alias without a conversion cannot be told from our key."""
    defaults = parse_run(MINIMAL, "r").model_dump(mode="json")
    of_sections = [alias for alias in ALIASES if alias.section in defaults]
    plain = [(alias, word) for alias in of_sections if alias.read is None for word in alias.words]
    assert len(plain) > 40
    for alias, word in plain:
        (key,) = alias.keys
        value = defaults[alias.section][key]
        tables = {"run": {"total_tokens": 1_000_000}}
        tables.setdefault(alias.section, {}).pop(key, None)
        tables[alias.section][word] = value
        assert parse_run(tomli_w.dumps(tables), "r").model_dump(mode="json")[alias.section][key] == value, word
        assert our_key(f"{alias.section}.{word}") == f"{alias.section}.{key}"
    for alias in ALIASES:
        for word in alias.words if alias.refused else ():
            with raises_code("other-projects-word", RunFileError, f"{alias.section}.{word}: "):
                parse_run(f"run.total_tokens = 1_000_000\n{alias.section}.{word} = 7\n", "r")


def test_no_word_is_one_of_our_keys_or_there_twice() -> None:
    ours = {(name, key) for name, keys in parse_run(MINIMAL, "r").model_dump().items() if keys for key in keys}
    ours |= {("data.sources", key) for key in DataSource.model_fields}
    words = [(alias.section, word) for alias in ALIASES for word in alias.words]
    assert not ours & set(words) and len(set(words)) == len(words)
    assert {(alias.section, key) for alias in ALIASES for key in alias.keys} <= ours


def test_a_source_of_several_may_have_the_words_of_data_and_of_mixtures() -> None:
    text = MINIMAL + (
        "[[data.sources]]\nname = 'web'\nsource = 'datasets'\ndataset_name = 'a/b'\ntext_column = 'body'\n"
        "probability = 3\n[[data.sources]]\nname = 'own'\nsource = 'text'\ndata_files = ['a']\n"
    )
    ours = re.sub("dataset_name", "dataset", re.sub("text_column", "field", re.sub("probability", "weight", text)))
    assert parse_run(text, "r") == parse_run(ours.replace("data_files", "paths"), "r")
    assert said(text) == [
        '[data.sources.1] dataset_name = "a/b" is read as dataset = "a/b"',
        '[data.sources.1] text_column = "body" is read as field = "body"',
        "[data.sources.1] probability = 3 is read as weight = 3",
        '[data.sources.2] data_files = ["a"] is read as paths = ["a"]',
    ]
    with raises_code("out-of-range", RunFileError, "line 8: data.sources.1.weight (written probability): -3"):
        parse_run(text.replace("= 3\n", "= -3\n"), "r")
    with raises_code(
        "key-given-twice", RunFileError, "line 8: data.sources.1.probability: means data.sources.1.weight"
    ):
        parse_run(text.replace("probability", "probability = 1\nweight"), "r")
    with raises_code("other-projects-word", RunFileError, "data.proportion: belongs in [[data.sources]], as weight"):
        parse_run(MINIMAL + "[data]\nproportion = 3\n", "r")


def test_what_was_read_as_what_is_said_in_the_files_order() -> None:
    text = "[model]\nintermediate_size = 672\nhidden_size = 256\n[run]\nmax_tokens = 1_000_000\n[inner]\nbetas = [0.9, 0.95]\n"
    assert said(text) == [
        "[model] intermediate_size = 672 is read as feed_forward_ratio = 2.625",
        "[model] hidden_size = 256 is read as width = 256",
        "[run] max_tokens = 1000000 is read as total_tokens = 1000000",
        "[inner] betas = [0.9, 0.95] is read as beta1 = 0.9, beta2 = 0.95",
    ]
    assert not said(MINIMAL)


def test_a_feed_forward_layer_is_as_wide_as_it_says() -> None:
    for width, size in ((128, 341), (192, 511), (24, 64)):
        text = f"[model]\nhidden_size = {width}\nnum_heads = 2\nintermediate_size = {size}\n"
        block = build_model(parse_run(MINIMAL + text, "r").model, seed=0).blocks[0]
        assert block.feed_forward.down.weight.shape == (width, size)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[model]\nwidth = 64\nhidden_size = 64\n", "line 5: model.hidden_size: means model.width, which width gives too; leave one"),
        ("[model]\nn_embd = 64\nd_model = 64\n", "line 5: model.d_model: means model.width, which n_embd gives too"),
        ("[inner]\nbetas = [0.9, 0.9]\nbeta2 = 0.9\n", "inner.betas: means inner.beta2, which beta2 gives too"),
        ("[inner]\nmin_lr_ratio = 0.1\nmin_lr = 1e-4\n", "inner.min_lr: means inner.floor_fraction, which min_lr_ratio gives"),
        ("[inner]\nhidden_size = 64\n", "line 4: inner.hidden_size: belongs in [model], as width"),
        ("[merge]\nbatch_size = 4\n", "belongs in [evaluation], as batch_sequences or [inner], as batch_sequences"),
        ("n_layer = 4\n", "line 3: run.n_layer: belongs in [model], as num_layers"),
        ("[optimizer]\nlr = 1\n", "line 3: optimizer: is not a section here; write its keys into [inner]"),
        ("[training]\nlr = 1\n", "training: is not a section here; write its keys into [run] or [model] or [inner]"),
        ("[model]\nhidden_size = 30\n", "line 4: model.width (written hidden_size): 30 does not give model.num_heads = 4"),
        ("[model]\nhidden_size = 'x'\n", 'line 4: model.width (written hidden_size): "x" is refused; allowed: an integer'),
        ("[inner]\ngrad_clip = 0\n", "inner.gradient_clip (written grad_clip): 0 is refused; allowed: a number above 0"),
        ("[model]\nintermediate_size = 2.5\n", "model.intermediate_size: 2.5 is refused; allowed: an integer above 0"),
        ("[model]\nintermediate_size = 64\nwidth = 'x'\n", "model.intermediate_size: is a multiple of model.width, which must be correct first"),
        ("[inner]\nbetas = [0.9]\n", "inner.betas: [0.9] is refused; allowed: two numbers, such as [0.9, 0.95]"),
        ("[inner]\nbetas = ['x', 0.9]\n", 'inner.beta1 (written betas): "x" is refused'),
        ("[inner]\nmin_lr = 'x'\n", 'inner.min_lr: "x" is refused; allowed: a number at least 0'),
        ("[inner]\nmin_lr = nan\n", "inner.min_lr: NaN is refused; allowed: a number at least 0"),
        ("[inner]\nmin_lr = 1\nlr = 'x'\n", "inner.min_lr: is a share of inner.learning_rate, which must be correct first"),
        ("[inner]\nmin_lr = 1\n", "inner.floor_fraction (written min_lr): 333.3"),
        ("[evaluation]\neval_steps = 90\n", "evaluation.eval_steps: 90 steps are not whole rounds of merge.inner_steps = 25; write every_rounds = 4"),
        ("[evaluation]\neval_steps = 9\n", "write every_rounds = 1"),
        ("[evaluation]\neval_steps = 0.1\n", "evaluation.eval_steps: 0.1 is refused; allowed: an integer above 0"),
        ("[evaluation]\neval_iters = 5\n", "evaluation.eval_iters: is no key here: the whole held-out text is measured"),
        ("[inner]\nbatch_size = 4\ngradient_accumulation_steps = 2\n", "inner.batch_size: beside gradient_accumulation_steps it may be"),
        ("[inner]\ngradient_accumulation_steps = 2\n", "does not say how large a batch is; write microbatch_sequences"),
        ("[inner]\nbatch_sequences = 16\ngradient_accumulation_steps = 3\n", "3 does not divide batch_sequences = 16"),
        ("[inner]\nbatch_sequences = 16\nmicro_batch_size = 4\ngradient_accumulation_steps = 2\n", "2 times microbatch_sequences = 4 is not batch_sequences = 16"),
        ("[inner]\nper_device_train_batch_size = 4\n", "it is the batch of a step: write batch_sequences = 4; or, to compute so many"),
        ("[inner]\nglobal_batch_size = 4\n", "write batch_sequences: the sequences of one peer's inner step"),
        ("[inner]\nwarmup_steps = 10\n", "write warmup_fraction = 0.02048 for 10 steps of one volunteer, N times that for N"),
        ("max_steps = 100\n", "line 3: run.max_steps: counts steps, and a run ends by the tokens of all peers together; write total_tokens = 204800, which are 100 steps of 2048"),
        ("num_train_epochs = 3\n", "run.num_train_epochs: a run ends by its tokens; write total_tokens"),
        ("[inner]\nadam_epsilon = 1e-8\n", "inner.adam_epsilon: is no key here: AdamW's epsilon is 1e-8; leave it out"),
        ("[model]\ndropout = 0.0\n", "model.dropout: is no key here: the model has RMSNorm"),
        ("[inner]\nmicro_batch_sizes = 4\n", "inner.micro_batch_sizes: unknown key; did you mean inner.microbatch_sequences?"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_names_our_key(text: str, expected: str) -> None:
    with pytest.raises(RunFileError) as caught:
        parse_run(MINIMAL + text, "my.toml")
    assert caught.value.problems[0].startswith("my.toml: line ")
    assert expected in str(caught.value)
    assert len(caught.value.problems) == (2 if "'x'\n" in text and expected.endswith("first") else 1)


STRANGE = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e-320",
    "1e308",
    "1" + "0" * 30,
    "true",
    "'x'",
    "[]",
    "[1, 'x']",
    "{}",
    "1999-01-01",
]


GOES_BY = ["model.width", "model.context_tokens", "inner.learning_rate", "inner.batch_sequences", "merge.inner_steps"]
NEXT_STEP = re.compile(
    "allowed: |; (or )?write |: write |leave (it|one of them) out|is less than one inner step|and . more problem"
)


def test_whatever_the_values_a_refusal_says_what_to_write() -> None:
    values = [("", "", value) for value in STRANGE] + [(key, value, "7") for key in GOES_BY for value in STRANGE]
    refused = 0
    for alias, (key, strange, value) in itertools.product(ALIASES, values):
        text = f"{key} = {strange}\n" * bool(key) + f"{alias.section}.{alias.words[0]} = {value}\n"
        try:
            parse_run(MINIMAL.replace("[run]\n", "run.") * ("total_tokens" not in alias.keys) + text, "r")
        except RunFileError as error:
            refused += 1
            assert all(map(NEXT_STEP.search, error.problems)), error
    assert refused > 500


def test_what_a_refused_word_would_have_given_is_not_missing_too() -> None:
    with pytest.raises(RunFileError) as caught:
        parse_run("[model]\nwidth = 2.5\n[run]\nmax_steps = 10\n[inner]\nbeta3 = 1\n", "my.toml")
    assert [line.split(": ")[1:3] for line in caught.value.problems] == [
        ["line 2", "model.width"], ["line 4", "run.max_steps"], ["line 6", "inner.beta3"],
    ]  # fmt: skip


@pytest.mark.parametrize("word", ["hidden_size", "min_lr", "n_layer"])
def test_a_published_run_has_no_other_words(word: str) -> None:
    section = "inner" if word == "min_lr" else "model"
    data = published(parse_run(MINIMAL, "r")).replace(f"[{section}]\n".encode(), f"[{section}]\n{word} = 1\n".encode())
    with raises_code("unknown-key", BadBytesError, f"{section}.{word}: "):
        parse_published_untrusted(data, hashlib.sha256(data).hexdigest())


def test_a_command_says_it_on_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, ours = tmp_path / "run.toml", tmp_path / "ours.toml"
    path.write_text("[run]\nmax_tokens = 50_000_000\n[model]\nhidden_size = 128\n")
    ours.write_text("[run]\ntotal_tokens = 50_000_000\n[model]\nwidth = 128\n")
    assert run_command(["check", str(path), "--json"]) == 0
    theirs = capsys.readouterr()
    assert theirs.err.splitlines() == [
        "[run] max_tokens = 50000000 is read as total_tokens = 50000000",
        "[model] hidden_size = 128 is read as width = 128",
    ]
    assert run_command(["check", str(ours), "--json"]) == 0
    assert capsys.readouterr() == (theirs.out, "")
    assert load_run(path) == load_run(ours)


def test_a_key_of_a_grid_is_another_word_for_ours_or_ours() -> None:
    assert our_key("merge.outer_lr") == "merge.outer_learning_rate"
    assert our_key("merge.outer_momentum") == "merge.outer_momentum" and our_key("inner.outer_lr") == "inner.outer_lr"
    refused = {
        "inner.min_lr": "inner.floor_fraction",
        "inner.adam_betas": "inner.beta1 and inner.beta2",
        "run.max_steps": "run.total_tokens",
        "model.dropout": "is no key here",
    }
    for key, meant in refused.items():
        with raises_code("other-projects-word", UserError, f"{key}: ", meant):
            our_key(key)
    assert our_key("inner.batch_size") == our_key("inner.batch_size", ["inner.min_lr"]) == "inner.batch_sequences"
    with raises_code("other-projects-word", UserError, "inner.batch_size: "):
        our_key("inner.batch_size", ["inner.grad_accum_steps"])
