"""Model of a run, built as its run file says.

The one place that knows which kinds of models there are. `files` is the folder of the run's pinned model files, which a
built-in model has none of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swarmtrain.errors import UserError
from swarmtrain.extras import install_in_words
from swarmtrain.machine_memory import machine_memory
from swarmtrain.model.gpt import GPT, build_model
from swarmtrain.model.language_model import LanguageModel, ModelSpec
from swarmtrain.model.parameter_count import position_numbers, similar_built_in
from swarmtrain.run import RunFile
from swarmtrain.run_adapter import AdapterSection
from swarmtrain.run_model import ModelSection
from swarmtrain.words import size_in_words

_MADE_BYTES = 24
"""Bytes for each number of the table of positions while it is made: angles, cosines and sines, twice, fp64, and fp32.
"""


def build_run_model(run: RunFile, files: Path | None, seed: int | None = None) -> LanguageModel:
    """Build the model of `run` with its initial weights, on the processor, fp32. `seed` replaces the run's.

    Raises UserError as `build_from_spec` does, and if this machine's libraries would train it otherwise.
    """
    model = build_from_spec(spec_of(run, files), run.run.seed if seed is None else seed)
    if run.data.packing == "documents" and not model.keeps_documents_apart:
        raise UserError(
            "this transformers cannot be used: with this torch it does not keep documents apart (data.packing = "
            f'"documents"); install newer ones: {install_in_words("hf")} "torch>=2.6"',
            code="package-missing",
        )
    return model


def check_positions(section: ModelSection) -> None:
    """Raise UserError if making the table of rotary positions of a built-in model, or of the one by which a machine is
    tried (`similar_built_in`), takes more memory than there is: a stranger's run says how large it is."""
    needed_bytes, memory = _MADE_BYTES * position_numbers(similar_built_in(section)), machine_memory()
    if needed_bytes > memory.total_bytes:
        raise UserError(
            f"model.context_tokens = {section.context_tokens}: the table of positions takes "
            f"{size_in_words(needed_bytes)} of memory while it is made, and {memory.limited_by} has "
            f"{size_in_words(memory.total_bytes)}; use a larger one, or a run with shorter sequences",
            code="too-little-memory",
        )


def spec_of(run: RunFile, files: Path | None) -> ModelSpec:
    """Return what the model of `run` is built from."""
    return ModelSpec(run.model, files, run.adapter)


def build_from_spec(spec: ModelSpec, seed: int) -> LanguageModel:
    """Build a model with its initial weights, on the processor, fp32.

    Raises UserError if the files of a model of Hugging Face are not there, or not the run's, and as `check_positions`.
    """
    if spec.section.is_built_in:
        check_positions(spec.section)
        return build_model(spec.section, seed)
    from swarmtrain.model.huggingface_model import build_huggingface_model

    return build_huggingface_model(spec, seed)


def empty_model(spec: ModelSpec) -> LanguageModel:
    """Build a model on the processor, fp32, whose weights are whatever is in memory: they come from elsewhere.

    Raises UserError as `build_from_spec` does.
    """
    if spec.section.is_built_in:
        check_positions(spec.section)
        return GPT(spec.section)
    from swarmtrain.model.huggingface_model import empty_huggingface_model

    return empty_huggingface_model(spec)


def spec_to_json(spec: ModelSpec) -> dict[str, Any]:
    """Return a spec in the form that JSON holds, for another process of this peer."""
    files = None if spec.files is None else str(spec.files)
    adapter = spec.adapter.model_dump(mode="json")
    return {"section": spec.section.model_dump(mode="json"), "files": files, "adapter": adapter}


def spec_from_json(table: dict[str, Any]) -> ModelSpec:
    """Return the spec that `spec_to_json` wrote."""
    files = table["files"]
    adapter = AdapterSection.model_validate(table["adapter"])
    return ModelSpec(ModelSection.model_validate(table["section"]), None if files is None else Path(files), adapter)
