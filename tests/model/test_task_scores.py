"""`eval --tasks`: what lm-evaluation-harness is asked, and what is said of its answer. The library is played."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from codes import codes_in

from swarmtrain.cli.main import run
from swarmtrain.data.tokenizer_json import tokenizer_json
from swarmtrain.model.export import export_model
from swarmtrain.model.gpt import build_model
from swarmtrain.model.language_model import ModelSpec
from swarmtrain.run_model import ModelSection

SECTION = ModelSection(context_tokens=16, num_layers=1, width=16, num_heads=2)
RESULTS = {"arc_easy": {"alias": "arc_easy", "acc,none": 0.25, "acc_stderr,none": 0.0125, "f1,strict": 0.5}}


@pytest.fixture
def model(tmp_path: Path) -> str:
    weights = dict(build_model(SECTION, seed=1).named_parameters())
    export_model(tmp_path / "model", weights, ModelSpec(SECTION), 1, {"tokenizer.json": tokenizer_json(b"")})
    return str(tmp_path / "model")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    asked: list[Any] = []

    class TaskManager:
        def __init__(self, include_path: str | None) -> None:
            asked.append(include_path)

        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in names if name in RESULTS or name == "broken"]

    def simple_evaluate(model: object, tasks: list[str], task_manager: TaskManager) -> dict[str, Any]:
        asked.append(tasks)
        if "broken" in tasks:
            raise RuntimeError("no such data set\non the hub")
        return {"results": RESULTS}

    modules = {
        "lm_eval": SimpleNamespace(__path__=[]),
        "lm_eval.evaluator": SimpleNamespace(simple_evaluate=simple_evaluate),
        "lm_eval.models": SimpleNamespace(__path__=[]),
        "lm_eval.models.huggingface": SimpleNamespace(HFLM=lambda **arguments: asked.append(arguments)),
        "lm_eval.tasks": SimpleNamespace(TaskManager=TaskManager),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_the_scores_are_those_of_the_library_on_the_folder(
    model: str, asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", model, "--tasks", "arc_easy", "--include-path", str(tmp_path), "--device", "cpu"]
    assert run(command) == 0
    assert capsys.readouterr().out.splitlines() == ["arc_easy acc 0.2500 ± 0.0125", "arc_easy f1 (strict) 0.5000"]
    assert asked == [str(tmp_path), {"pretrained": model, "device": "cpu", "prefix_token_id": ord("\n")}, ["arc_easy"]]
    assert run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "tasks": {"arc_easy": {"acc,none": 0.25, "acc_stderr,none": 0.0125, "f1,strict": 0.5}},
        "device": "cpu",
    }


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--tasks", "arc_easy,arc_hard"], "unknown-task"),
        (["--tasks", "broken"], "tasks-not-scored"),
        (["--tasks", ","], "unknown-task"),
        (["--tasks", "arc_easy", "--text", "x"], "options-conflict"),
        (["--include-path", "."], "options-conflict"),
    ],
)
def test_what_cannot_be_scored_is_one_line(
    options: list[str], code: str, model: str, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", model, *options]) == 2
    said = capsys.readouterr().err
    assert codes_in(said) == [code]


@pytest.mark.parametrize(("name", "code"), [("adapter_config.json", "model-refused"), ("own.py", "model-has-code")])
def test_the_library_is_given_no_folder_with_more_than_a_model(
    name: str, code: str, model: str, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(model) / name).write_text("{}")
    assert run(["eval", model, "--tasks", "arc_easy"]) == 2
    assert codes_in(capsys.readouterr().err) == [code] and not asked


@pytest.mark.parametrize(
    "chosen",
    [
        {"attn_implementation": "someone/kernels"},
        {"_attn_implementation_internal": "flash_attention_2"},
        {"text_config": {"layers": [{"experts_implementation": {"": "someone/kernels"}}]}},
        {"use_kernels": True},
    ],
)
def test_a_configuration_that_chooses_how_it_is_computed_does_not_reach_the_library(
    chosen: dict[str, Any], model: str, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(model) / "config.json"
    config = json.loads(path.read_text()) | {"attn_implementation": "sdpa", "conv_kernel": 4, "kernel_config": None}
    path.write_text(json.dumps(config))
    assert run(["eval", model, "--tasks", "arc_easy"]) == 0 and asked
    asked.clear()
    path.write_text(json.dumps(config | chosen))
    assert run(["eval", model, "--tasks", "arc_easy"]) == 2
    assert codes_in(capsys.readouterr().err) == ["model-has-code"] and not asked


def test_without_the_library_it_is_said_what_to_install(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(["eval", model, "--tasks", "arc_easy"]) == 2
    said = capsys.readouterr().err
    assert codes_in(said) == ["package-missing"] and "lm-eval[hf]" in said
