"""Base of a run's model: where it is, what others are told of it, and whether a run file is still the published one."""

from __future__ import annotations

import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
from codes import raises_code
from learnt import write_scenario
from small_models import run_of, saved

from swarmtrain.compatibility import PROTOCOL
from swarmtrain.errors import BadBytesError, RunFileError
from swarmtrain.model.base import (
    base_files,
    base_in_words,
    base_of,
    changed_keys,
    published_base,
    resolved_run,
    with_base_path,
)
from swarmtrain.model.hub import HubModel
from swarmtrain.model.run_model import build_run_model
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.peer.bootstrap import publish_run
from swarmtrain.peer.estimate import estimate
from swarmtrain.peer.lifecycle.preparation import summary_of
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.peer.model_files.base_files import pin_base
from swarmtrain.peer.model_files.fetcher import FilesPlace
from swarmtrain.run import RunFile, parse_published_untrusted, run_sha256
from swarmtrain.run_model import ModelSection
from swarmtrain.simulate.learning.learner import Text
from swarmtrain.simulate.learning.methods import METHODS
from swarmtrain.simulate.learning.setting import setting_of
from swarmtrain.simulate.scenario import load_scenario

COMMIT = "0123456789abcdef" * 2 + "01234567"


def _of(base: str) -> ModelSection:
    return ModelSection(source="huggingface", base=base)


def test_a_folder_is_taken_before_the_hub_and_neither_is_an_error(tmp_path: Path) -> None:
    assert base_of(_of("owner/name"), tmp_path) == HubModel("owner/name", "main")
    assert base_of(_of(f"owner/name@{COMMIT}"), tmp_path) == HubModel("owner/name", COMMIT)
    assert base_of(_of("owner/name@refs/pr/7"), tmp_path) == HubModel("owner/name", "refs/pr/7")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert base_of(_of("owner/name"), tmp_path) == tmp_path / "owner" / "name"
    (tmp_path / "a.file").touch()
    for wrong in ("nowhere", "a.file", "owner/name/more", "../../owner/name", "owner/name@", "https://x/y"):
        with raises_code("no-such-base", RunFileError, "model.base"):
            base_of(_of(wrong), tmp_path)


def test_others_are_told_the_last_name_of_a_folder_and_no_path() -> None:
    assert published_base("/home/anna/models/My model (1)") == "My-model-1"
    assert published_base("/") == "model"
    assert published_base(f"owner/name@{COMMIT}") == f"owner/name@{COMMIT}"


def test_a_base_has_a_name_for_a_person() -> None:
    assert base_in_words(_of(f"owner/name@{COMMIT}")) == "owner/name@0123456, from its weights"
    scratch = ModelSection(source="huggingface", base="small", from_scratch=True)
    assert base_in_words(scratch) == "small, from scratch"


@pytest.mark.parametrize(
    ("written", "is_same"),
    [
        ("owner/name", True),
        ("owner/name@main", True),
        (f"owner/name@{COMMIT}", True),
        (f"owner/name@{COMMIT[::-1]}", False),
        ("owner/other", False),
        ("/home/anna/name", False),
    ],
)
def test_a_run_file_is_compared_without_asking_the_hub_again(written: str, is_same: bool) -> None:
    filled: dict[str, Any] = {"vocabulary_size": 288, "width": 32, "num_parameters": 9}
    section = run_of("owner/name").model
    published = run_of("owner/name").model_copy(
        update={"model": section.model_copy(update={**filled, "base": f"owner/name@{COMMIT}"})}
    )
    assert (not changed_keys(published, run_of(written))) is is_same
    assert changed_keys(published, run_of(written, "from_scratch = true"))["model.from_scratch"] == (False, True)
    changed = run_of(written, run="seed = 3")
    assert changed_keys(published, changed)["run.seed"] == (0, 3)


# ---------------------------------------------------------------- a run that is published


def _text(folder: Path) -> str:
    (folder / "text.txt").write_text("it was a dark and stormy night; " * 600)
    return 'source = "text"\npaths = ["text.txt"]\nheld_out_bytes = 1024'


@pytest.mark.slow
def test_a_published_run_says_what_the_model_is_and_not_where_it_was(tmp_path: Path) -> None:
    saved("qwen3", tmp_path / "secret" / "small")
    run = with_base_path(run_of("secret/small", data=_text(tmp_path)), tmp_path)
    published = _published(run, tmp_path)
    assert b"secret" not in published.data
    read = parse_published_untrusted(published.data, published.sha256)
    assert read.model.base == "small" and read.model.num_parameters > 0
    assert not changed_keys(read, run) and changed_keys(read, run_of("other", data=_text(tmp_path)))
    assert "(small, from its weights)" in summary_of(read)
    needed, built_in = (
        estimate(each, read.model.num_parameters, 3)
        for each in (read, read.model_copy(update={"model": ModelSection(context_tokens=24)}))
    )
    assert 100e6 < needed.memory_program_bytes - built_in.memory_program_bytes < 300e6, "the library"
    built = build_run_model(read, base_files(run, tmp_path))
    assert sum(parameter.numel() for parameter in built.parameters()) == read.model.num_parameters


@pytest.mark.slow
def test_a_run_whose_weights_are_damaged_is_not_published(tmp_path: Path) -> None:
    saved("llama", tmp_path / "small")
    weights = tmp_path / "small" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for pipeline in ("stages = 1", "stages = 3"):
        with raises_code("file-unreadable"):
            _published(run_of("small", data=_text(tmp_path), pipeline=pipeline), tmp_path)


def _published(run: RunFile, folder: Path) -> PublishedRun:
    """Publish a run as a bootstrap does."""
    run = resolved_run(run, folder)
    nothing: Any = SimpleNamespace(begin=lambda doing: None, show=lambda done, total: None)
    place = FilesPlace(cache=folder / "cache", progress=nothing, emit=lambda event: None, stop=StopFlag())
    return publish_run(run, folder, datetime.datetime.now(datetime.UTC), "", pin_base(run, folder, place))


def _published_with(**keys: Any) -> bytes:
    section = {"source": "huggingface", "base": "small", "num_parameters": 9, "width": 32, "tokenizer": "bytes", **keys}
    published = {
        "created": "2030-01-02T00:00:00Z",
        "swarmtrain": "0.2.0",
        "protocol": PROTOCOL,
        "held_out_sha256": "ab" * 32,
        "held_out_bytes": 2048,
        "model_files_sha256": "cd" * 32,
        "model_files_bytes": 900,
    }
    return tomli_w.dumps({"run": {"total_tokens": 10**6}, "model": section, "published": published}).encode()


@pytest.mark.parametrize(
    "keys",
    [{"base": "../../etc"}, {"base": "/etc"}, {"base": "owner/name"}, {"base": ""}, {"num_parameters": 0}],
    ids=str,
)
def test_a_published_run_names_a_base_as_bootstraps_do(keys: dict[str, Any]) -> None:
    data = _published_with()
    assert parse_published_untrusted(data, run_sha256(data)).model.base == "small"
    bad = _published_with(**keys)
    with pytest.raises(BadBytesError):
        parse_published_untrusted(bad, run_sha256(bad))


def test_nobody_writes_what_is_read_from_the_configuration() -> None:
    for key in ("num_parameters = 5", "tied_embeddings = true"):
        with raises_code("published-section", RunFileError, key.split()[0]):
            run_of("small", key)


# ---------------------------------------------------------------- a run of it


@pytest.mark.slow
def test_three_that_gossip_train_a_model_of_hugging_face(tmp_path: Path) -> None:
    saved("llama", tmp_path / "small", vocab_size=256)
    path = write_scenario(tmp_path)
    table = {
        "run": {"name": "tiny", "seed": 5, "total_tokens": 9_000},
        "model": {"source": "huggingface", "base": "small", "tokenizer": "bytes", "context_tokens": 32},
        "data": {"source": "text", "paths": ["*.txt"], "held_out_bytes": 4096},
        "inner": {"batch_sequences": 4, "learning_rate": 1e-2, "warmup_fraction": 0.0},
        "merge": {"method": "gossip", "inner_steps": 8, "outer_momentum": 0.5},
    }
    (tmp_path / "run.toml").write_text(tomli_w.dumps(table))
    scenario = load_scenario(path)
    one = setting_of(scenario, Text.of(scenario.run(5), scenario.base))
    before = one.text.held_out_loss(one.learner(0).reached)
    outcome = METHODS["gossip"].run(one)
    assert outcome.held_out_loss < before - 1.5
    assert outcome.tokens >= 9_000 and outcome.sent_bytes > 0
