"""The library `transformers`, as far as whole models need it: configurations, models without weights, checkpoints.

It is imported when it is needed, writes nothing to the terminal, contacts no hub and runs no code but its own: what it
reads is a configuration that was checked (`huggingface_config.whole_config`) and files of safetensors, which are shown
to it in a folder that holds nothing else.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from swarmtrain.errors import UserError
from swarmtrain.extras import install_in_words
from swarmtrain.model.huggingface_config import FLOAT_KEY
from swarmtrain.words import one_line

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_INDEX_BYTES = 67_108_864


def _library() -> Any:
    """Import the library and silence it. Raises UserError without the extra `hf`."""
    # Where `kernels` is installed, some families fetch compiled code from the hub: which family is a stranger's choice.
    os.environ["USE_HUB_KERNELS"] = "NO"
    try:
        library = importlib.import_module("transformers")
        logging = importlib.import_module("transformers.utils.logging")
    except ImportError as error:
        reason = one_line(str(error))[:200]
        raise UserError(
            f"a Hugging Face model needs transformers: {install_in_words('hf')} ({reason})", code="package-missing"
        ) from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return library


def library_config(data: Mapping[str, Any], origin: str) -> Any:
    """Return the library's configuration of a causal language model, from what `whole_config` returned.

    Every dropout is 0: a gradient must belong to the same numbers as its loss. Raises UserError if the library has no
    such model, or refuses the configuration.
    """
    library, family = _library(), data["model_type"]
    known = library.CONFIG_MAPPING
    if family not in known:
        raise UserError(
            f"{origin}: model_type: {one_line(family)[:60]} is none that transformers {library.__version__} knows, and "
            "code beside a model is never run; install a newer transformers, give a model of a family that it has, or "
            "convert this one to such a family",
            code="model-family",
        )
    rope = data.get("rope_parameters")
    if library.__version__ < "5" and isinstance(rope, dict) and "rope_theta" in rope:  # as only version 5 reads it
        scaling = None if rope.get("rope_type") in (None, "default") else rope
        data = {**rope, "rope_scaling": scaling, **data}
    with _refused_in_words(origin):
        config = known[family].from_dict(json.loads(json.dumps(data), object_hook=_number_or_object))
    if type(config) not in library.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{origin}: model_type: {one_line(family)} is no causal language model in transformers "
            f"{library.__version__}; give one that predicts the next token",
            code="model-family",
        )
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, name, type(value)(0))
    config.use_cache = False
    return config


def _number_or_object(found: dict[str, Any]) -> Any:
    return float(found[FLOAT_KEY]) if found.keys() == {FLOAT_KEY} else found


def shape_keys(config: Any, origin: str) -> dict[str, Any]:
    """Return the keys of the run file's `[model]` that a configuration gives, and its longest sequence.

    The latter is `context_tokens`; it is left out if the model has no longest one. Raises UserError if one is missing.
    """
    text = config.get_text_config()
    try:
        width, num_layers, num_heads = text.hidden_size, text.num_hidden_layers, text.num_attention_heads
        keys = {"vocabulary_size": text.vocab_size, "num_layers": num_layers, "width": width, "num_heads": num_heads}
    except AttributeError as error:
        raise UserError(
            f"{origin}: {one_line(str(error))}; give a transformer with attention, whose blocks are alike",
            code="model-family",
        ) from None
    for key, value in keys.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(
                f"{origin}: {key} is {one_line(repr(value))[:60]}; give a model whose blocks are alike",
                code="model-family",
            )
    keys["feed_forward_ratio"] = _feed_forward_width(text, width) / width
    keys["tied_embeddings"] = bool(getattr(config, "tie_word_embeddings", False))
    most = getattr(text, "max_position_embeddings", None)
    return keys if not isinstance(most, int) else {**keys, "context_tokens": most}


def _feed_forward_width(text: Any, width: int) -> int:
    """Return the hidden width that one token passes in a block: several experts' if the block has experts."""
    for name in ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"):
        hidden = getattr(text, name, None)
        if isinstance(hidden, int) and hidden > 0:
            many = getattr(text, "num_experts_per_tok", None)
            return hidden * many if isinstance(many, int) and many > 0 else hidden
    return 4 * width


def empty_library_model(config: Any, *, on_meta: bool = False) -> Any:
    """Return the library's model in fp32, whose parameters are whatever is in memory; `on_meta` takes no memory.

    Raises UserError if the library cannot build it.
    """
    if on_meta:
        with torch.device("meta"):
            return _built(config)
    with _without_initial_weights():
        model = _built(config)
    model.tie_weights()  # it belongs to what was left out
    return model


def library_model_of_stage(config: Any) -> Any:
    """Return the library's model in fp32, whose parameters take no memory, but whose tables (of positions) are there.

    Raises UserError if the library cannot build it.
    """
    with _without_initial_weights(), _ParametersOnMeta():
        model = _built(config)
    for module in model.modules():
        for name, table in list(module.named_buffers(recurse=False)):
            if table.is_meta:
                delattr(module, name)  # the causal masks of another attention implementation, unused
    return model


class _ParametersOnMeta(TorchFunctionMode):
    """Makes tensors that have no numbers yet, or all the same, on "meta": parameters are, tables are computed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_made = func in (torch.empty, torch.ones, torch.zeros)
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if is_made else {}))


def random_library_model(config: Any, seed: int) -> Any:
    """Return the library's model with the weights that the library itself begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _built(config)


def _built(config: Any) -> Any:
    library = _library()
    with _refused_in_words(_origin(config)):
        model = library.AutoModelForCausalLM.from_config(
            config, attn_implementation=_attention(config), **_in_fp32(library)
        )
    return model.eval()


def tensor_files(folder: Path) -> Mapping[str, str]:
    """Return the name of the file that holds each tensor. Raises UserError."""
    whole, index = folder / _WHOLE, folder / _INDEX
    try:
        if whole.is_file():
            with safe_open(whole, framework="pt", device="cpu") as file:
                return dict.fromkeys(file.keys(), _WHOLE)
        with index.open("rb") as stream:
            content = stream.read(_MAX_INDEX_BYTES + 1)
        if len(content) > _MAX_INDEX_BYTES:
            raise ValueError(f"more than {_MAX_INDEX_BYTES} bytes")
        files = json.loads(content)["weight_map"]
        if not isinstance(files, dict) or not all(_is_plain(file) for file in files.values()):
            raise ValueError("weight_map does not name files of this folder")
    except FileNotFoundError:
        raise UserError(
            f"{one_line(str(folder))}: has neither {_WHOLE} nor {_INDEX}; other formats can execute what they hold and "
            "are not read: save it as safetensors",
            code="not-safetensors",
        ) from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        path = whole if whole.is_file() else index
        raise UserError(
            f"{one_line(str(path))}: cannot be read: {one_line(str(error))}; fetch it again", code="file-unreadable"
        ) from None
    return files


def _is_plain(file: object) -> bool:
    return isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\:\0")


def load_library_model(config: Any, folder: Path, cut: Callable[[Any], None] | None = None) -> Any:
    """Return the library's model in fp32 with the weights in `folder`, which must be the configuration's, one by one.

    `cut` takes parts out of the model before it is loaded; their weights are not read. Raises UserError, one line, if
    weights are missing, torn, of other shapes, more than the whole model has, or not finite.
    """
    library, origin = _library(), one_line(str(folder))
    kind: Any = library.AutoModelForCausalLM
    if cut is not None:
        whole = library.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

        def build(self: Any, *args: Any, **kwargs: Any) -> None:
            whole.__init__(self, *args, **kwargs)
            cut(self)

        kind = type(whole.__name__, (whole,), {"__init__": build, "__module__": whole.__module__})
    names = set(tensor_files(folder).values())
    with _only_weights(folder, names) as shown, _refused_in_words(origin, "checkpoint-mismatch"):
        model, told = kind.from_pretrained(
            shown,
            config=config,
            attn_implementation=_attention(config),
            generation_config=library.GenerationConfig(),  # else it looks for a file
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are told below, by name
            **_in_fp32(library),
        )
    for key, what in (
        ("mismatched_keys", "{} is {}, but config.json says {}"),
        ("missing_keys", "has no tensor {}"),
        ("unexpected_keys", "has a tensor {}, which config.json does not describe"),
    ):
        if cut is not None and key == "unexpected_keys":
            continue
        if found := sorted(map(_in_words, told.get(key) or ())):
            raise UserError(
                f"{origin}: {what.format(*found[0])}; give the folder of the checkpoint whose config.json this is",
                code="checkpoint-mismatch",
            )
    _check_finite(model, origin)
    return model.eval()


def _in_words(found: Any) -> tuple[str, ...]:
    """Return the name of a tensor that does not fit, and its shapes in the files and by the configuration, if told."""
    name, *shapes = (found,) if isinstance(found, str) else found
    return (one_line(str(name))[:200], *(one_line(str(list(shape)))[:100] for shape in shapes))


def _check_finite(model: nn.Module, origin: str) -> None:
    """Raise UserError if a parameter has numbers that are not finite. They are looked at where they were loaded."""
    for name, parameter in model.named_parameters():
        # Of a NaN both ends are one; unlike isfinite of all numbers, this takes no memory.
        if parameter.numel() and not torch.stack(parameter.detach().aminmax()).isfinite().all():
            raise UserError(
                f"{origin}: {one_line(name)[:200]} has numbers that are not finite; give another checkpoint",
                code="checkpoint-not-finite",
            )


@contextmanager
def _only_weights(folder: Path, names: set[str]) -> Iterator[str]:
    """Make a folder that shows nothing but the named files, and their index if there is one."""
    with tempfile.TemporaryDirectory(prefix="swarmtrain-model-") as shown:
        for name in (*names, "model.safetensors.index.json"):
            if (folder / name).is_file():
                (Path(shown) / name).symlink_to((folder / name).resolve())
        yield shown


def _in_fp32(library: Any) -> dict[str, torch.dtype]:
    """Return the argument that asks for weights in fp32: its name changed in version 4.56."""
    version = tuple(int(part) for part in library.__version__.split(".")[:2])
    return {"dtype" if version >= (4, 56) else "torch_dtype": torch.float32}


def _attention(config: Any) -> str:
    """Return the attention to compute with: torch's own, unless the family has only its plain one."""
    kind = _library().MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"


def _without_initial_weights() -> AbstractContextManager[None]:
    """Return the library's context in which a model keeps what is in memory: its place changed in version 5."""
    for name in ("transformers.initialization", "transformers.modeling_utils"):
        try:
            found = getattr(importlib.import_module(name), "no_init_weights", None)
        except ImportError:
            continue
        if found is not None:
            return found()  # type: ignore[no-any-return]
    raise UserError(f"this transformers cannot be used: {install_in_words('hf')}", code="package-missing")


@contextmanager
def _refused_in_words(origin: str, code: str = "model-refused") -> Iterator[None]:
    """Turn whatever the library raises into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever it is, the configuration or the files caused it
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = one_line(" ".join(lines[:2]))[:200]
        raise UserError(
            f"{origin}: transformers refuses this model: {reason}; give another model, or correct its files", code=code
        ) from None


def cache_argument(model: Any) -> str:
    """Return the name that this version of the library has for a cache of keys and values."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _origin(config: Any) -> str:
    return f"the configuration of this {one_line(str(config.model_type))[:60]}"


def parameters_of(model: nn.Module) -> int:
    """Return the number of parameters, each counted once where modules share it."""
    return sum(parameter.numel() for parameter in model.parameters())
