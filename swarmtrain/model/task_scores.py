"""Score an exported model on tasks of EleutherAI's lm-evaluation-harness, the library `lm_eval` (extra `eval`).

The library loads the folder by itself, with transformers, so the numbers are those of its own command on that folder.
Its data sets come from Hugging Face's hub; tasks in files of one's own need no network.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarmtrain.errors import UserError
from swarmtrain.extras import install_in_words
from swarmtrain.model.huggingface_config import check_computed_plainly, check_names, whole_config
from swarmtrain.words import one_line

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """Tasks to score a model on."""

    names: tuple[str, ...]
    """Names of tasks or groups of tasks, or patterns with `*`."""
    include_path: Path | None = None
    """Folder of task files besides those of the library."""


def task_scores(
    folder: Path, request: TaskRequest, device: str, first_token: int | None = None
) -> dict[str, dict[str, float]]:
    """Return each task's metrics by name, such as `acc,none` and `acc_stderr,none`, of the model in `folder`.

    `first_token` stands before a text without any context, where the tokenizer has no token for it. Raises UserError,
    one line, for an unknown task, a model that has code or an adapter beside it or chooses how it is computed, or if
    the library fails.
    """
    check_names((path.name for path in folder.iterdir()), from_scratch=False)  # the library would read all of them
    whole_config(folder)
    check_computed_plainly(folder)
    evaluator, models, tasks = (_library(name) for name in ("evaluator", "models.huggingface", "tasks"))
    wanted = f"--tasks {one_line(','.join(request.names))}"
    try:
        path = None if request.include_path is None else str(request.include_path)
        manager = tasks.TaskManager(include_path=path)
        unknown = [name for name in request.names if not manager.match_tasks([name])]
        if unknown:
            raise UserError(
                f"{wanted}: there is no task {one_line(unknown[0])}; give one that `lm-eval ls tasks` lists, or a "
                "folder of your own with --include-path",
                code="unknown-task",
            )
        model = models.HFLM(pretrained=str(folder), device=device, prefix_token_id=first_token)
        found = evaluator.simple_evaluate(model, tasks=manager.match_tasks(list(request.names)), task_manager=manager)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        # The library's own errors, and those of every library that it calls.
        _log.info("lm_eval: %s", error, exc_info=True)
        reason = one_line(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)[:300]
        raise UserError(
            f"{wanted}: lm_eval could not score the model: {reason}; check the task and the connection to its data set",
            code="tasks-not-scored",
        ) from None
    return _numbers({} if found is None else found["results"])


def _numbers(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the metrics that are numbers, without the library's notes beside them."""
    return {
        task: {name: float(value) for name, value in metrics.items() if "," in name and isinstance(value, int | float)}
        for task, metrics in results.items()
    }


def score_lines(scores: Mapping[str, Mapping[str, float]]) -> Sequence[str]:
    """Return a line for each metric, with its standard error where there is one."""
    lines = []
    for task, metrics in scores.items():
        for key, value in metrics.items():
            name, _, filter_name = key.partition(",")
            if name.endswith("_stderr"):
                continue
            error = metrics.get(f"{name}_stderr,{filter_name}")
            spread = "" if error is None else f" ± {error:.4f}"
            what = name if filter_name == "none" else f"{name} ({filter_name})"
            lines.append(f"{task} {what} {value:.4f}{spread}")
    return lines


def _library(module: str) -> Any:
    os.environ["USE_HUB_KERNELS"] = "NO"  # of transformers, as where it is imported for models
    try:
        return importlib.import_module(f"lm_eval.{module}")
    except ImportError:
        raise UserError(f"--tasks needs lm-eval: {install_in_words('eval')}", code="package-missing") from None
