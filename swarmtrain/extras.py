"""The libraries that some runs and commands need besides, and the sentence that says how to install one.

No package of swarmtrain is published, so a message never says to install an extra of it: the library itself is
installed the same way whether swarmtrain came from a clone, a wheel or an image.
"""

from __future__ import annotations

__all__ = ["EXTRAS", "install_in_words"]

EXTRAS = {
    "bpe": "tokenizers>=0.20",
    "datasets": "datasets>=3.0",
    "hf": "transformers>=4.51",
    "parquet": "pyarrow>=14.0.1",
    "plot": "matplotlib>=3.8",
}
"""What each extra in pyproject.toml installs."""


def install_in_words(extra: str) -> str:
    """The command that installs what `extra` stands for, in the environment that swarmtrain is in."""
    return f"pip install '{EXTRAS[extra]}'"
