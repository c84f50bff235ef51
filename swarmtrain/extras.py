"""Optional libraries that some runs and commands need, and the sentence that says how to install one.

No package index has swarmtrain, so a message never says to install an extra of it: the library itself installs the same
way whether swarmtrain came from a clone, a wheel or an image.
"""

from __future__ import annotations

EXTRAS = {
    "bpe": "tokenizers>=0.20",
    "chat": "jinja2>=3.1.6",
    "datasets": "datasets>=3.1",
    "eval": "lm-eval[hf]>=0.4.9",
    "finetune": "peft>=0.17",
    "hf": "transformers>=4.55",
    "parquet": "pyarrow>=14.0.1",
    "plot": "matplotlib>=3.8",
    "tensorboard": "tensorboard>=2.18",
    "trackio": "trackio>=0.43",
    "wandb": "wandb>=0.31",
    "web": "starlette>=0.46 uvicorn>=0.34 segno>=1.6",
    "zstd": "zstandard>=0.19",
}
"""Libraries that each extra in pyproject.toml installs, with a space between."""


def install_in_words(extra: str) -> str:
    """Return the command that installs the libraries of `extra` into the environment that runs swarmtrain."""
    return " ".join(["pip install", *(f"'{library}'" for library in EXTRAS[extra].split())])
