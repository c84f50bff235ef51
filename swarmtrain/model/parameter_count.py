"""Number of parameters of a run's model, from the run file alone: neither torch nor a model is needed."""

from __future__ import annotations

from swarmtrain.run import RunFile
from swarmtrain.run_model import ModelSection

FROZEN_BYTES_PER_PARAMETER = 4
"""Memory of a parameter that is frozen beside an adapter: the weight alone, fp32."""
_BYTES_IN_FOUR_BITS = 0.5625
"""Memory of a weight in 4 bits: a scale, fp32, belongs to every 64."""


def num_parameters(section: ModelSection) -> int:
    """Return the number of parameters of the whole model."""
    if not section.is_built_in:
        assert section.is_resolved, "the run file's base was not read"
        return section.num_parameters
    D, V = section.width, section.vocabulary_size
    return 2 * V * D + section.num_layers * block_parameters(section) + D


def num_trained_parameters(run: RunFile) -> int:
    """Return the number of parameters that peers train, publish and merge: all of the model, or those of an adapter."""
    return run.adapter.num_parameters if run.adapter.is_used else num_parameters(run.model)


def num_frozen_parameters(run: RunFile) -> int:
    """Return the number of parameters that stay as they are."""
    return num_parameters(run.model) if run.adapter.is_used else 0


def frozen_bytes(run: RunFile, base_bits: int = 32) -> int:
    """Return the memory of the parameters that stay as they are, if those in blocks have so many bits, 32 or 4."""
    total = num_frozen_parameters(run)
    in_blocks = run.model.num_layers * block_parameters(run.model) if total and base_bits == 4 else 0
    return FROZEN_BYTES_PER_PARAMETER * (total - in_blocks) + int(_BYTES_IN_FOUR_BITS * in_blocks)


def position_numbers(section: ModelSection) -> int:
    """Return how many numbers the built-in model's table of rotary positions has, which are no parameters: they follow
    the run's longest sequence, not its weights. 0 for a model of Hugging Face."""
    return section.context_tokens * (section.width // section.num_heads) if section.is_built_in else 0


def operations_per_token(run: RunFile) -> int:
    """Return the floating-point operations of training on a token, about: of what is frozen no gradient is computed."""
    return 6 * num_trained_parameters(run) + 4 * num_frozen_parameters(run)


def block_parameters(section: ModelSection) -> int:
    """Return the number of parameters of one of its blocks; of a model of Hugging Face, of the mean one, about."""
    D = section.width
    if not section.is_built_in:
        tables = (1 if section.tied_embeddings else 2) * section.vocabulary_size * D
        return max(1, (num_parameters(section) - tables - D) // section.num_layers)
    return 4 * D * D + 3 * D * hidden_width(section) + 2 * D


def hidden_width(section: ModelSection) -> int:
    """Return the hidden width of a block's feed-forward layer."""
    return max(1, round(section.feed_forward_ratio * section.width))


def similar_built_in(section: ModelSection) -> ModelSection:
    """Return the shape of a built-in model that takes about as long: what a machine is tried with, without the files of
    the run's own model."""
    if section.is_built_in:
        return section
    D = section.width + section.width % 2
    most = max(1, min(section.num_heads, D // 2))
    ratio = max(1 / D, min(32.0, (block_parameters(section) - 4 * D * D - 2 * D) / (3 * D * D)))
    return ModelSection(
        tokenizer="bytes" if section.vocabulary_size == 256 else "bpe",
        vocabulary_size=section.vocabulary_size,
        context_tokens=section.context_tokens,
        num_layers=section.num_layers,
        width=D,
        num_heads=next(heads for heads in range(most, 0, -1) if D % (2 * heads) == 0),
        feed_forward_ratio=ratio,
    )
