"""Read and write what an exported model says about itself: the key `swarmtrain` of its config.json.

Other programs leave the key alone. It names the version that wrote the model, the run's tokens, the SHA-256 of each
file of weights, and, where the model is the built-in one, its shape as in the run file. An adapter
has no config.json, and peft warns of keys that it does not know, so it says the same in a file of its own,
swarmtrain.json, with the model that it adapts.

Imports no torch: the last line of a peer's command needs only the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from swarmtrain import __version__
from swarmtrain.run_adapter import AdapterSection
from swarmtrain.run_model import ModelSection

_KEY, _FORMAT = "swarmtrain", "swarmtrain-2"
_S = TypeVar("_S", ModelSection, AdapterSection)
CONFIG, _ADAPTER = "config.json", "swarmtrain.json"
DTYPES = ("bfloat16", "float16", "float32")
"""Types of the numbers in an export, as configurations of Hugging Face name them."""
LIBRARY_VERSION_KEY = "transformers_version"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What an exported model says about itself."""

    section: ModelSection | None
    """Shape of the built-in model, or the model that an adapter belongs to; None for a model of Hugging Face."""
    context_tokens: int
    """Length of the sequences that it was trained on."""
    run_tokens: int
    weights_sha256: Mapping[str, str]
    """SHA-256 (hex) of each file of weights."""
    adapter: AdapterSection | None = None
    """What the adapter is, if the weights are those of one."""
    base_dtype: str = "float32"
    """One of `DTYPES`: that of the model of Hugging Face with which the run began."""

    @property
    def file_name(self) -> str:
        """Name of the file that has it."""
        return CONFIG if self.adapter is None else _ADAPTER

    def into(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a model's configuration with this provenance, whatever it had."""
        model = {} if self.section is None else {"model": self.section.model_dump(mode="json")}
        told = {"format": _FORMAT, "version": __version__, **model, "context_tokens": self.context_tokens}
        told |= {"run_tokens": self.run_tokens, "weights_sha256": dict(self.weights_sha256)}
        told |= {"base_dtype": self.base_dtype}
        if self.adapter is not None:
            told["adapter"] = self.adapter.model_dump(mode="json")
        return {**config, _KEY: told}


def description_of(folder: Path) -> Path | None:
    """Return the file that says what the model in `folder` is, and has its provenance; None without a model."""
    return next((path for name in (CONFIG, _ADAPTER) if (path := folder / name).exists()), None)


def provenance_in(config: Mapping[str, Any]) -> Provenance | None:
    """Return the provenance in a configuration; None if swarmtrain did not export the model, or if transformers has
    saved another one with that configuration since: it adds its version, which exports leave out.

    Raises ValueError, KeyError or TypeError if it is damaged, or of a version that this one does not know.
    """
    told = config.get(_KEY)
    if told is None or LIBRARY_VERSION_KEY in config:
        return None
    if told["format"] != _FORMAT:
        raise ValueError("it was exported by another version of swarmtrain")
    hashes = dict(told["weights_sha256"])
    if not hashes or not all(_is_plain(name) and isinstance(sha256, str) for name, sha256 in hashes.items()):
        raise ValueError("weights_sha256 does not name files of this folder")
    if (base_dtype := told.get("base_dtype", "float32")) not in DTYPES:
        raise ValueError("it names an unknown type of numbers")
    section = _section(ModelSection, told["model"]) if "model" in told else None
    adapter = _section(AdapterSection, told["adapter"]) if "adapter" in told else None
    if (section is not None and not section.is_built_in) != (adapter is not None and adapter.is_resolved):
        raise ValueError("it does not say which model the adapter belongs to")
    return Provenance(
        section=section,
        context_tokens=int(told["context_tokens"]) if section is None else section.context_tokens,
        run_tokens=int(told["run_tokens"]),
        weights_sha256=hashes,
        adapter=adapter,
        base_dtype=base_dtype,
    )


def _section(kind: type[_S], table: object) -> _S:
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"]) from None


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\:\0")


def tokens_of_export(folder: Path) -> int:
    """Return the run's tokens when the model in `folder` was written; 0 if there is none. The peer may count more by
    now."""
    if (file := description_of(folder)) is None:
        return 0
    try:
        found = provenance_in(json.loads(file.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0
    return 0 if found is None else found.run_tokens
