"""Number of parameters of a run's model, from the run file alone: neither torch nor a model is needed."""

from __future__ import annotations

from swarmtrain.run import ModelSection

__all__ = ["block_parameters", "hidden_width", "num_parameters"]


def num_parameters(section: ModelSection) -> int:
    """Return the number of parameters of the whole model."""
    D, V = section.width, section.vocabulary_size
    return 2 * V * D + section.num_layers * block_parameters(section) + D


def block_parameters(section: ModelSection) -> int:
    """Return the number of parameters of one of its blocks."""
    D = section.width
    return 4 * D * D + 3 * D * hidden_width(section) + 2 * D


def hidden_width(section: ModelSection) -> int:
    """Return the hidden width of a block's feed-forward layer."""
    return max(1, round(section.feed_forward_ratio * section.width))
