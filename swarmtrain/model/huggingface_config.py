"""Check a Hugging Face model's `config.json` before anything is built from it.

Why not the library's own reader: a configuration may come from another peer, and some keys make that library fetch and
run code (`auto_map`, an attention implementation named on the hub). Those are refused or dropped.

Imports neither torch nor transformers. Every error is a UserError of one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from swarmtrain.errors import UserError
from swarmtrain.words import one_line

_MAX_CONFIG_BYTES = 1_048_576

_CODE_KEYS = ("auto_map", "custom_pipelines")
FLOAT_KEY = "__float__"
"""Only key of an object by which transformers writes a number that JSON does not have, such as "Infinity"."""
_QUANTISED_KEYS = ("quantization_config", "compression_config")
_DROPPED = frozenset(
    {
        *_CODE_KEYS,
        "architectures",
        "attn_implementation",
        "distributed_config",
        "dtype",
        "experts_implementation",
        "fusion_config",
        "id2label",
        "kernel_config",
        "label2id",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_cache",
        "use_kernels",
    }
)
"""Keys that say how a model is computed, not which one it is. Some name code, or kernels on the hub; for
`num_labels` the library makes a name for each label, of which no model of text has any."""
_MOST = {"layers": 512, "n_layer": 512, "experts": 65_536}
"""Largest numbers of keys with these words in their names: the library makes something for each."""
_MOST_REPEATS = 512
"""Largest number in a list of lists: how often a kind of layer is repeated."""


_PLAIN, _KERNEL_KEYS = ("eager", "sdpa"), ("kernel_config", "use_kernels")


def whole_config(folder: Path) -> dict[str, Any]:
    """Return what `config.json` in a folder says of a model of any family, for the library to read.

    It leaves out keys that choose how the library computes, or that would have it run code, and refuses weights that
    are not numbers. Raises UserError.
    """
    path = folder / "config.json"
    origin, data = one_line(str(path)), _parsed(path)
    if not isinstance(data.get("model_type"), str):
        raise UserError(
            f"{origin}: model_type: {_shown(data.get('model_type'))} is refused; give the folder of a model that "
            "transformers wrote",
            code="not-a-config",
        )
    try:
        return cast(dict[str, Any], _cleaned(data, origin))
    except RecursionError:
        raise UserError(f"{origin}: nested too deeply; give a model's config.json", code="not-a-config") from None


def _cleaned(value: Any, origin: str) -> Any:
    if isinstance(value, list):
        return [_cleaned(item, origin) for item in value]
    if not isinstance(value, dict) or value.keys() == {FLOAT_KEY}:
        return value
    for key, inner in value.items():
        _check_key(key, inner, origin)
    return {
        key: _cleaned(inner, origin)
        for key, inner in value.items()
        if not (key.startswith("_") or key in _DROPPED or key in _QUANTISED_KEYS)
    }


def _check_key(key: str, value: Any, origin: str) -> None:
    if key in _QUANTISED_KEYS and value:
        raise UserError(
            f"{origin}: {key}: this model is quantised, and only floats can be trained; give the one it was made of",
            code="model-quantised",
        )
    limits = [(value, most) for word, most in _MOST.items() if word in key]
    if isinstance(value, list):
        limits += [(number, _MOST_REPEATS) for row in value if isinstance(row, list) for number in row]
    for number, most in limits:
        if isinstance(number, int) and number > most:
            raise UserError(
                f"{origin}: {one_line(key)[:60]}: {_shown(number)} is refused; allowed: at most {most}",
                code="bad-value",
            )


def check_computed_plainly(folder: Path) -> None:
    """Raise UserError if a folder has code, or `config.json` has its reader choose how the model is computed.

    `whole_config` leaves these keys out; a library that reads the folder by itself does not, and some values make it
    fetch compiled code from the hub.
    """
    path = folder / "config.json"
    if code := sorted(folder.glob("*.py")):
        raise UserError(
            f"{one_line(str(code[0]))}: a model with code of its own is not given to a library that reads all of its "
            "folder; use a copy without *.py",
            code="model-has-code",
        )
    _check_plain(_parsed(path), one_line(str(path)))


def _check_plain(value: Any, origin: str) -> None:
    """`value` is not nested too deeply: `whole_config` has read it."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for key, chosen in value.items() if isinstance(value, dict) else ():
        is_plain = chosen is None or chosen is False or ("implementation" in key and chosen in (True, *_PLAIN))
        if not is_plain and ("implementation" in key or key in (*_KERNEL_KEYS, *_CODE_KEYS)):
            raise UserError(
                f"{origin}: {one_line(key)[:60]}: {_shown(chosen)} is refused: code of others could be fetched for it; "
                "remove this key",
                code="model-has-code",
            )
    for each in inner:
        _check_plain(each, origin)


def check_names(names: Iterable[str], *, from_scratch: bool) -> None:
    """Raise UserError if a model with files of these names has no weights that are read here. Code is left alone."""
    names = list(names)
    if "adapter_config.json" in names:
        raise UserError(
            "adapter_config.json: this is an adapter of another model; merge them, and give the folder of the result",
            code="model-refused",
        )
    if not from_scratch and not any(name.endswith(".safetensors") for name in names):
        raise UserError(
            "it has no *.safetensors; other formats can execute what they hold and are not read: save it as "
            "safetensors, or set model.from_scratch = true",
            code="not-safetensors",
        )


def _parsed(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises UserError if it is too large or something else."""
    origin = one_line(str(path))
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"{origin}: cannot be read: {error.strerror}; give a model's config.json or its folder",
            code="file-unreadable",
        ) from None
    if len(content) > _MAX_CONFIG_BYTES:
        raise UserError(
            f"{origin}: more than {_MAX_CONFIG_BYTES} bytes; give a model's config.json", code="not-a-config"
        )
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{origin}: not JSON: {one_line(str(error))}; give a model's config.json", code="not-a-config"
        ) from None
    if not isinstance(data, dict):
        raise UserError(f"{origin}: not a JSON object; give a model's config.json", code="not-a-config")
    return data


def _shown(value: object) -> str:
    try:
        text = one_line(json.dumps(value, ensure_ascii=False, default=str))
    except RecursionError:
        text = "a deeply nested value"
    return text if len(text) <= 60 else text[:57] + "..."
