"""Stages of a run whose model is cut, of the built-in model or of one of Hugging Face.

`files` is the folder of the run's pinned model files, which a built-in model has none of.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from swarmtrain.model import stages
from swarmtrain.model.huggingface import (
    HuggingFaceShape,
    HuggingFaceStage,
    load_stage,
)
from swarmtrain.model.huggingface import build_stage as build_huggingface_stage
from swarmtrain.model.huggingface import stage_shapes as huggingface_shapes
from swarmtrain.model.run_model import build_run_model
from swarmtrain.model.stages import StageShape
from swarmtrain.run import RunFile

RunStageShape = StageShape | HuggingFaceShape
"""Part of a run's model that a stage holds."""


def run_stage_shapes(run: RunFile, files: Path | None, boundaries: Sequence[int]) -> Sequence[RunStageShape]:
    """Return the stages of the run's model, cut at `boundaries`.

    Raises UserError if the files of a model of Hugging Face are not there, or not the run's.
    """
    if run.model.is_built_in:
        return stages.stage_shapes(run.model, boundaries)
    from swarmtrain.model.huggingface_model import cut_model
    from swarmtrain.model.language_model import ModelSpec

    return huggingface_shapes(cut_model(ModelSpec(run.model, files)), boundaries)


def build_run_stage(run: RunFile, shape: RunStageShape, files: Path | None, seed: int) -> nn.Module:
    """Build a stage with the initial weights that its parameters have in the whole model, on the processor, fp32.

    Raises UserError if the files of a model of Hugging Face are torn, or of another shape.
    """
    if isinstance(shape, StageShape):
        return stages.build_stage(shape, seed)
    if run.model.from_scratch:
        return build_huggingface_stage(shape, seed)
    assert files is not None
    return load_stage(shape, files)


def empty_run_stage(shape: RunStageShape) -> nn.Module:
    """Build a stage of which only the names and shapes of its parameters are read."""
    return stages.Stage(shape) if isinstance(shape, StageShape) else HuggingFaceStage(shape)


def check_weights(run: RunFile, files: Path, boundaries: Sequence[int]) -> None:
    """Raise UserError if the files of a run's model do not have its weights, part by part if it is cut.

    At any time one part is in memory.
    """
    if run.pipeline.stages == 1:
        build_run_model(run, files)
        gc.collect()  # models of transformers refer to themselves: it would stay beside the next one that is built
        return
    for shape in run_stage_shapes(run, files, boundaries):
        build_run_stage(run, shape, files, run.run.seed)
