"""Check the keys that count of a Hugging Face model's `config.json` before anything is built from it.

Why not the library's own reader: a configuration may come from another peer, and some keys make that library fetch and
run code (`auto_map`, an attention implementation named on the hub). Here the keys that count are listed, each with its
limits; the others are dropped. Configurations that would compute something else than stages compute are refused.

Imports neither torch nor transformers. Every error is a UserError of one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from swarmtrain.errors import UserError
from swarmtrain.words import one_line

__all__ = [
    "CUTTABLE",
    "FLOAT_KEY",
    "HuggingFaceModel",
    "check_computed_plainly",
    "check_names",
    "is_tied",
    "read_config",
    "untie",
    "whole_config",
]

_MAX_CONFIG_BYTES = 1_048_576
_MAX_WIDTH = 65_536
_MAX_CONTEXT_TOKENS = 16_777_216

_Token = Annotated[int, Field(ge=-(2**31), lt=2**31)]
_ActivationName = Literal["silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False, protected_namespaces=())


class _Config(_Strict):
    """Keys of all families."""

    vocab_size: int = Field(ge=1, le=4_194_304)
    initializer_range: float = Field(0.02, gt=0, le=1)
    bos_token_id: _Token | None = None
    eos_token_id: _Token | list[_Token] | None = None
    pad_token_id: _Token | None = None
    # Checked only: with another value the key describes another model.
    quantization_config: None = Field(None, exclude=True)


class _Scaling(_Strict):
    model_config = ConfigDict(extra="forbid")

    factor: float = Field(ge=1, le=10_000)


class _Linear(_Scaling):
    rope_type: Literal["linear"]


class _Llama3(_Scaling):
    rope_type: Literal["llama3"]
    low_freq_factor: float = Field(gt=0, le=10_000)
    high_freq_factor: float = Field(gt=0, le=10_000)
    original_max_position_embeddings: int = Field(ge=1, le=_MAX_CONTEXT_TOKENS)

    @model_validator(mode="after")
    def _ascends(self) -> _Llama3:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("rope_scaling.high_freq_factor: must be above low_freq_factor")
        return self


class _Rotary(_Config):
    """Keys of Llama, Qwen2 and Qwen3."""

    hidden_size: int = Field(ge=1, le=_MAX_WIDTH)
    intermediate_size: int = Field(ge=1, le=1_048_576)
    num_hidden_layers: int = Field(ge=1, le=4096)
    num_attention_heads: int = Field(ge=1, le=4096)
    num_key_value_heads: int = Field(ge=1, le=4096)
    hidden_act: _ActivationName = "silu"
    max_position_embeddings: int = Field(ge=1, le=_MAX_CONTEXT_TOKENS)
    rms_norm_eps: float = Field(1e-6, gt=0, le=1)
    rope_theta: float = Field(10_000.0, ge=1, le=1e12)
    rope_scaling: _Linear | _Llama3 | None = Field(None, discriminator="rope_type")
    # Checked only, as above.
    partial_rotary_factor: float | None = Field(None, ge=1, le=1, exclude=True)
    use_sliding_window: Literal[False] = Field(False, exclude=True)
    layer_types: list[Literal["full_attention"]] | None = Field(None, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _rotary_in_one_form(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Convert `rope_parameters`, as transformers 5 writes it, to `rope_theta` and `rope_scaling`, which all
        versions read."""
        data = dict(data)
        if data.get("num_key_value_heads") is None:
            data["num_key_value_heads"] = data.get("num_attention_heads")
        scaling = data.get("rope_parameters") or data.get("rope_scaling")
        if isinstance(scaling, dict):
            scaling = dict(scaling)
            if "rope_theta" in scaling:
                data["rope_theta"] = scaling.pop("rope_theta")
            if "partial_rotary_factor" in scaling:
                data["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
            if "type" in scaling:  # the old name of `rope_type`
                scaling.setdefault("rope_type", scaling["type"])
                del scaling["type"]
            scaling = None if scaling in ({}, {"rope_type": "default"}) else scaling
        return {**data, "rope_scaling": scaling}

    @model_validator(mode="after")
    def _fits(self) -> _Rotary:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide num_attention_heads = "
                f"{self.num_attention_heads}"
            )
        head_width = getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads
        if self.hidden_size % self.num_attention_heads and not isinstance(self, _Qwen3):
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} does not divide hidden_size = {self.hidden_size}"
            )
        if head_width % 2:
            raise ValueError("num_attention_heads: gives heads of an odd width, but rotary positions turn pairs")
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id: {self.pad_token_id} is none of vocab_size = {self.vocab_size} tokens")
        return self


class _Llama(_Rotary):
    model_type: Literal["llama"]
    head_dim: int | None = Field(None, ge=2, le=8192)
    attention_bias: bool = False
    mlp_bias: bool = False


class _Qwen2(_Rotary):
    model_type: Literal["qwen2"]
    # Checked only, as above.
    head_dim: int | None = Field(None, ge=2, le=8192, exclude=True)

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> _Qwen2:
        if self.head_dim is not None and self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(f"head_dim: {self.head_dim}, but of Qwen2 the heads share hidden_size; leave it out")
        return self


class _Qwen3(_Rotary):
    model_type: Literal["qwen3"]
    head_dim: int = Field(128, ge=2, le=8192)
    attention_bias: bool = False


class _Gpt2(_Config):
    model_type: Literal["gpt2"]
    n_embd: int = Field(ge=1, le=_MAX_WIDTH)
    n_inner: int | None = Field(None, ge=1, le=1_048_576)
    n_layer: int = Field(ge=1, le=4096)
    n_head: int = Field(ge=1, le=4096)
    n_positions: int = Field(ge=1, le=_MAX_CONTEXT_TOKENS)
    activation_function: _ActivationName = "gelu_new"
    layer_norm_epsilon: float = Field(1e-5, gt=0, le=1)
    # Checked only, as above.
    scale_attn_weights: Literal[True] = Field(True, exclude=True)
    scale_attn_by_inverse_layer_idx: Literal[False] = Field(False, exclude=True)
    add_cross_attention: Literal[False] = Field(False, exclude=True)

    @model_validator(mode="after")
    def _fits(self) -> _Gpt2:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head: {self.n_head} does not divide n_embd = {self.n_embd}")
        return self


_FAMILIES: dict[str, type[_Llama | _Qwen2 | _Qwen3 | _Gpt2]] = {
    "llama": _Llama,
    "qwen2": _Qwen2,
    "qwen3": _Qwen3,
    "gpt2": _Gpt2,
}
CUTTABLE = tuple(_FAMILIES)
"""Families, by `model_type`, that can be cut into stages."""
_TIED_BY_DEFAULT = {"gpt2"}  # families whose head is the embedding unless the configuration says otherwise
_DROPOUTS = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "llama": ("attention_dropout",),
    "qwen2": ("attention_dropout",),
    "qwen3": ("attention_dropout",),
}


@dataclass(frozen=True, kw_only=True)
class HuggingFaceModel:
    """Shape of a model that can be cut into stages. `read_config` and `untie` make it."""

    config: _Llama | _Qwen2 | _Qwen3 | _Gpt2
    head_is_copy: bool
    """True if the head is read from the embedding's tensor of a checkpoint, as a copy that is then trained apart."""

    @property
    def family(self) -> str:
        """`model_type` of its configuration."""
        return self.config.model_type

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return self.config.n_layer if isinstance(self.config, _Gpt2) else self.config.num_hidden_layers

    @property
    def width(self) -> int:
        """Width of the residual stream, in numbers per token."""
        return self.config.n_embd if isinstance(self.config, _Gpt2) else self.config.hidden_size

    @property
    def context_tokens(self) -> int:
        """Longest sequence, in tokens."""
        return self.config.n_positions if isinstance(self.config, _Gpt2) else self.config.max_position_embeddings

    @property
    def vocabulary_size(self) -> int:
        """Number of distinct tokens."""
        return self.config.vocab_size

    def as_json(self) -> dict[str, Any]:
        """Return its configuration in the form that every version of transformers reads, with everything that counts.

        Dropout is 0 (GPT-2's default is 0.1): a stage computes a microbatch again when its graph was dropped, and its
        gradient would then belong to other numbers than the loss.
        """
        config = self.config.model_dump(mode="json")
        if config.get("head_dim", 0) is None:
            del config["head_dim"]
        return config | dict.fromkeys(_DROPOUTS[self.family], 0.0) | {"tie_word_embeddings": False}


def read_config(source: Path | Mapping[str, Any]) -> HuggingFaceModel:
    """Return the model of a configuration: a JSON file, a folder with a `config.json`, or what such a file holds.

    Raises UserError when it is invalid, of an unknown architecture, outside the limits, or tied (see `untie`).
    """
    origin, data = _loaded(source)
    if _is_tied(data, origin):
        raise UserError(
            f"{origin}: tie_word_embeddings: the embedding and the head are one matrix here, but the first stage and "
            "the last are different peers, and one matrix cannot be trained in two places; set it to false (written "
            "out: some families are tied by default), or with a checkpoint let the head begin as a copy of the "
            "embedding: swarmtrain.model.huggingface.untie",
            code="tied-embeddings",
        )
    return HuggingFaceModel(config=_checked(data, origin), head_is_copy=False)


def untie(source: Path | Mapping[str, Any]) -> HuggingFaceModel:
    """Return the model of a tied configuration with a head of its own.

    From a checkpoint, the head begins as a copy of the embedding, and the two are trained apart. From a seed, they
    begin apart. A configuration that is not tied is read as by `read_config`.
    """
    origin, data = _loaded(source)
    return HuggingFaceModel(config=_checked(data, origin), head_is_copy=_is_tied(data, origin))


# ---------------------------------------------------------------- a whole model, of any family

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

    Unlike `read_config` it cannot know the keys of all families. It leaves out those that choose how the library
    computes, or that would have it run code, and refuses weights that are not numbers. Raises UserError.
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


def is_tied(folder: Path) -> bool:
    """Return whether embedding and head are one matrix in the model, of a family that can be cut, in `folder`."""
    origin, data = _loaded(folder)
    return _is_tied(data, origin)


def _is_tied(data: Mapping[str, Any], origin: str) -> bool:
    tied = data.get("tie_word_embeddings")
    if tied is None:
        return data.get("model_type") in _TIED_BY_DEFAULT
    if not isinstance(tied, bool):
        raise UserError(
            f"{origin}: tie_word_embeddings: {_shown(tied)} is refused; allowed: true or false", code="wrong-type"
        )
    return tied


def _loaded(source: Path | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return (its name in errors, its content). Raises UserError unless the architecture is known."""
    if not isinstance(source, Path):
        origin, data = "the model's configuration", source
    else:
        path = source / "config.json" if source.is_dir() else source
        origin, data = one_line(str(path)), _parsed(path)
    family = data.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise UserError(
            f"{origin}: model_type: {_shown(family)} cannot be cut into stages; supported: {', '.join(_FAMILIES)}",
            code="model-family",
        )
    return origin, data


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


def _checked(data: Mapping[str, Any], origin: str) -> _Llama | _Qwen2 | _Qwen3 | _Gpt2:
    try:
        return _FAMILIES[data["model_type"]].model_validate(dict(data))
    except ValidationError as error:
        detail = error.errors()[0]
        names = [str(part) for part in detail["loc"]]
        key = ".".join(one_line(name)[:60] for name in names if "constrained" not in name)  # the validator's own word
        if detail["type"] == "value_error":
            problem, code = str(detail["ctx"]["error"]), "keys-disagree"
        elif detail["type"] == "missing":
            problem, code = f"{key}: missing", "missing-key"
        else:
            problem, code = f"{key}: {_shown(detail['input'])} is refused: {detail['msg']}", "bad-value"
        raise UserError(f"{origin}: {problem}", code=code) from None


def _shown(value: object) -> str:
    try:
        text = one_line(json.dumps(value, ensure_ascii=False, default=str))
    except RecursionError:
        text = "a deeply nested value"
    return text if len(text) <= 60 else text[:57] + "..."
