"""Write and read a trained model as a folder that Hugging Face's libraries load; nothing in it executes.

config.json             the model's configuration, with where the model comes from (`provenance.py`)
model.safetensors       the weights by name, fp32 unless they were cast (`cast_exported`); a large model has several
                        files and an index (`weight_files.py`)
tokenizer.json          the tokenizer, and how it is to be used: tokenizer_config.json, chat_template.jinja
generation_config.json  how text is drawn if the caller says nothing
README.md               the model card
held-out.txt            the text by which it was judged
run.toml                the run that it comes from

The built-in model is written as a Qwen3 (`qwen3.py`) and read back as itself. A model of Hugging Face is written with
the configuration that it came with, and any folder with such a model is read.

An adapter is written as peft loads it, the groups joined to one adapter of the whole rank: adapter_config.json and
adapter_model.safetensors, beside swarmtrain.json in place of config.json. To read it one needs its model's folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import stat
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from torch import Tensor

from swarmtrain.errors import UserError
from swarmtrain.model.atomic_folder import atomic_folder
from swarmtrain.model.end_token import end_token
from swarmtrain.model.gpt import GPT
from swarmtrain.model.hub import HubModel
from swarmtrain.model.language_model import LanguageModel, ModelSpec
from swarmtrain.model.parameter_count import num_parameters, position_numbers
from swarmtrain.model.provenance import CONFIG, DTYPES, Provenance, description_of, provenance_in
from swarmtrain.model.qwen3 import Qwen3Reader, as_qwen3, qwen3_config
from swarmtrain.model.weight_files import (
    INDEX,
    check_hashes,
    file_sha256,
    read_weights,
    write_tensors,
    write_weights,
)
from swarmtrain.run_model import ModelSection
from swarmtrain.words import one_line

_GIVE = "give the folder that `swarmtrain export`, or a bootstrap at the end of its run, wrote"
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_GENERATION = "generation_config.json"
_TOKENIZER, _HELD_OUT, _CARD = "tokenizer.json", "held-out.txt", "README.md"
_TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
_TOKENIZER_KEYS = frozenset(
    {
        "add_bos_token",
        "add_eos_token",
        "add_prefix_space",
        "added_tokens_decoder",
        "additional_special_tokens",
        "backend",
        "bos_token",
        "chat_template",
        "clean_up_tokenization_spaces",
        "cls_token",
        "do_lower_case",
        "eos_token",
        "errors",
        "extra_special_tokens",
        "legacy",
        "mask_token",
        "model_input_names",
        "model_max_length",
        "model_specific_special_tokens",
        "pad_token",
        "padding_side",
        "sep_token",
        "split_special_tokens",
        "strip_accents",
        "tokenizer_class",
        "truncation_side",
        "unk_token",
        "use_default_system_prompt",
    }
)
"""Keys of a tokenizer's configuration that are exported. Others may name code, or files on another machine."""
_OF_TOKENIZER = (*_TOKENIZER_CONFIGS, "chat_template.jinja")
_TORN_PARAMETERS = 2**26
"""Parameters for which memory is taken although their weights may not be there: 256 MiB. It is said then which are
not."""
_BESIDE = (
    INDEX,
    _ADAPTER_CONFIG,
    _TOKENIZER,
    *_OF_TOKENIZER,
    _GENERATION,
    _CARD,
    _HELD_OUT,
    "run.toml",
)
"""What an export may have beside its configuration and its weights."""
_NUMBERS_OF_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_MOST_CONTEXT_TOKENS = 2048
"""Longest sequence that a model is given which does not say how long those were that it was trained on."""


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """Model read back from its folder."""

    model: LanguageModel
    tokenizer: bytes
    """Its `tokenizer.json`, empty without one."""
    held_out: bytes
    run_tokens: int
    """0 if swarmtrain did not export it."""
    beside_tokenizer: Mapping[str, bytes] = field(default_factory=dict)
    """Other files of the tokenizer, by name: its configuration, its chat template."""


def export_model(
    folder: Path, weights: Mapping[str, Tensor], spec: ModelSpec, run_tokens: int, files: Mapping[str, bytes]
) -> None:
    """Write the model into `folder`, replacing the one there; `files` are written beside it by name.

    Raises UserError when the folder holds something else, or the model's description is missing, and the file system's
    OSError.
    """
    section = spec.section
    if spec.adapter.is_used:
        _export_adapter(folder, weights, spec, run_tokens, files)
        return
    config, generation = _described(spec, end_token(files))
    with atomic_folder(folder) as temporary:
        hashes = write_weights(temporary, as_qwen3(weights, section) if section.is_built_in else weights)
        provenance = Provenance(
            section=section if section.is_built_in else None,
            context_tokens=section.context_tokens,
            run_tokens=run_tokens,
            weights_sha256=hashes,
            base_dtype="float32" if section.is_built_in else _dtype_in(_config(_check_files(spec))),
        )
        written = {CONFIG: _json(provenance.into(config)), **generation, **files, **_tokenizer_as_it_came(spec)}
        for name, content in written.items():
            (temporary / name).write_bytes(content)


def _export_adapter(
    folder: Path, weights: Mapping[str, Tensor], spec: ModelSpec, run_tokens: int, files: Mapping[str, bytes]
) -> None:
    """Write an adapter, whose parts are in `weights`; see `export_model`."""
    from swarmtrain.model.huggingface_model import adapter_of

    _check_files(spec)
    adapter, base = adapter_of(spec), HubModel.parse(spec.section.base)
    name, revision = (spec.section.base, None) if base is None or not base.is_pinned else (base.name, base.revision)
    with atomic_folder(folder) as temporary:
        sha256 = write_tensors(temporary / _ADAPTER_WEIGHTS, adapter.whole_factors(weights))
        provenance = Provenance(
            section=spec.section,
            context_tokens=spec.section.context_tokens,
            run_tokens=run_tokens,
            weights_sha256={_ADAPTER_WEIGHTS: sha256},
            adapter=spec.adapter,
        )
        written = {provenance.file_name: _json(provenance.into({})), **files, **_tokenizer_as_it_came(spec)}
        written[_ADAPTER_CONFIG] = _json(adapter.config(name, revision))
        for file_name, content in written.items():
            (temporary / file_name).write_bytes(content)


def _check_files(spec: ModelSpec) -> Path:
    """Return the folder of the files of a model of Hugging Face. Raises UserError if they are not here."""
    if spec.files is None or not (spec.files / CONFIG).exists():
        raise UserError(
            f"this run trains {spec.section.base}, whose files are not here; give their folder with --model-dir",
            code="model-files-needed",
        )
    return spec.files


def _described(spec: ModelSpec, end: int | None) -> tuple[Mapping[str, Any], Mapping[str, bytes]]:
    """Return the configuration, and the file that says how text is drawn, if there is one.

    `end` is the token at which a writer stops, None without one; a model of Hugging Face with its own tokenizer says
    that itself. Raises UserError for one whose files are not here.
    """
    ends = {} if end is None else {"eos_token_id": end}
    if spec.section.is_built_in:
        drawn = {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": 256}
        return qwen3_config(spec.section) | ends, {_GENERATION: _json(drawn | ends)}
    from swarmtrain.model.huggingface_config import whole_config

    files = _check_files(spec)
    # Without what is never read here, such as kernels on the hub, or a path on another machine.
    kept = {key: value for key, value in _config(files).items() if key in ("architectures", "use_cache")}
    config = {**whole_config(files), **kept}
    drawn_as = _beside(files, _GENERATION)
    # Stages have a head of their own, also of a model whose head is its embedding.
    config |= {"tie_word_embeddings": spec.section.tied_embeddings, "torch_dtype": "float32"}
    if spec.section.tokenizer != "model":  # numbers of another tokenizer's tokens
        config = {key: None if key in _NUMBERS_OF_TOKENS else value for key, value in config.items()} | ends
        drawn_as = _with_ends(drawn_as, ends)
    return config, {_GENERATION: drawn_as} if drawn_as else {}


def _with_ends(drawn_as: bytes, ends: Mapping[str, int]) -> bytes:
    """Return the file that says how text is drawn, for another tokenizer."""
    try:
        drawn = json.loads(drawn_as) if drawn_as else {}
    except (ValueError, RecursionError):
        drawn = {}
    kept: dict[str, Any] = drawn if isinstance(drawn, dict) else {}
    kept = {key: value for key, value in kept.items() if key not in _NUMBERS_OF_TOKENS} | dict(ends)
    return _json(kept) if kept else b""


def _tokenizer_as_it_came(spec: ModelSpec) -> dict[str, bytes]:
    """Return the configuration of a model's own tokenizer, which says more than a run needs to know of it."""
    if spec.section.is_built_in or spec.section.tokenizer != "model" or spec.files is None:
        return {}
    found = {}
    for name in _TOKENIZER_CONFIGS:
        if content := _beside(spec.files, name):
            try:
                config = json.loads(content)
            except (ValueError, RecursionError):
                continue
            if isinstance(config, dict):
                found[name] = _json({key: value for key, value in config.items() if key in _TOKENIZER_KEYS})
    return found


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def copy_exported(source: Path, target: Path) -> int:
    """Copy the model in `source` into `target`, and return the run's tokens.

    Raises UserError as `load_exported` and `export_model` do, also for a file that is a link, and OSError if `target`
    cannot be written.
    """
    provenance = _provenance(source, _config(source))
    if provenance is None:
        raise UserError(f"{source}: swarmtrain did not export this model; copy its folder", code="not-a-model")
    with atomic_folder(target) as temporary, ExitStack() as stack:
        opened = {}
        for name in (provenance.file_name, *provenance.weights_sha256, *_BESIDE):
            with contextlib.suppress(FileNotFoundError):
                # All at once: a running bootstrap may replace them at any time.
                opened[name] = stack.enter_context(open_regular(source / name))
        for name, file in opened.items():
            with (temporary / name).open("wb") as copy:
                shutil.copyfileobj(file, copy)
        for name, sha256 in provenance.weights_sha256.items():
            if name not in opened or file_sha256(temporary / name) != sha256:
                raise UserError(
                    f"{source}: the weights do not match {provenance.file_name}; export the model again",
                    code="not-a-model",
                )
    return provenance.run_tokens


def cast_exported(folder: Path, dtype: str | None) -> None:
    """Cast the weights in `folder`, which has been exported, to `dtype`; None: to that of the run's base.

    An adapter stays as it is with None. Raises UserError, and OSError.
    """
    config = _config(folder)
    provenance, now = _provenance(folder, config), _dtype_in(config)
    assert provenance is not None
    if (dtype := dtype or provenance.base_dtype) == now:
        return
    hashes, size = dict[str, str](), 0
    with atomic_folder(folder) as temporary:
        for name, sha256 in provenance.weights_sha256.items():
            tensors = dict[str, Tensor]()
            read_weights(folder, {name: sha256}, tensors.__setitem__)
            tensors = {key: tensor.to(getattr(torch, dtype)) for key, tensor in tensors.items()}
            hashes[name] = write_tensors(temporary / name, tensors)
            size += sum(tensor.nbytes for tensor in tensors.values())
        for name in _BESIDE:
            if content := _beside(folder, name):
                if name == INDEX:
                    content = _json(json.loads(content) | {"metadata": {"total_size": size}})
                elif name == _CARD:
                    content = content.replace(f"| weights | {now} |".encode(), f"| weights | {dtype} |".encode(), 1)
                (temporary / name).write_bytes(content)
        written = replace(provenance, weights_sha256=hashes).into(config | {"torch_dtype": dtype})
        (temporary / provenance.file_name).write_bytes(_json(written))


def _dtype_in(config: Mapping[str, Any]) -> str:
    """Return the type of a model's weights by its configuration; float32 if it names none that is exported."""
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return named if named in DTYPES else "float32"


def export_merged(source: Path, target: Path, base: Path, card: Callable[[str], str]) -> int:
    """Write the model that the adapter in `source` makes of the model in `base`; return the run's tokens.

    `card` returns the model card of the result, given the adapter's. Raises UserError as `load_exported` and
    `export_model` do, and OSError.
    """
    exported = load_exported(source, base)
    model = exported.model
    assert model.adapter is not None
    files = dict[str, bytes]()
    for name in _BESIDE:
        if name != _ADAPTER_CONFIG:
            with contextlib.suppress(FileNotFoundError), open_regular(source / name) as file:
                files[name] = file.read()
    files[_CARD] = card(files.get(_CARD, b"").decode()).encode()
    weights, spec = model.adapter.merged_weights(model), ModelSpec(model.section, base)
    export_model(target, weights, spec, exported.run_tokens, files)
    return exported.run_tokens


def open_regular(path: Path) -> BinaryIO:
    """Open a file of a folder that may be a stranger's, to be handed on: a link could lead to any file of this machine.

    Raises UserError unless it is a regular file, and OSError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if not path.is_symlink():
            raise
        raise _not_regular(path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return os.fdopen(descriptor, "rb")


def _not_regular(path: Path) -> UserError:
    return UserError(
        f"{one_line(str(path))}: a link, a pipe or a device, which may lead to any file of this machine, is not "
        "copied; give a folder with the file itself",
        code="not-a-regular-file",
    )


def adapted_model(folder: Path) -> ModelSection | None:
    """Return the model that the adapter in `folder` belongs to; None if a whole model is there. Raises UserError."""
    provenance = _provenance(folder, _config(folder))
    return None if provenance is None or provenance.adapter is None else provenance.section


def load_exported(folder: Path, base: Path | None = None) -> ExportedModel:
    """Load the model in `folder`; of an adapter, `base` is the folder of the model that it belongs to.

    Raises UserError, one line, when it is missing, torn or altered.
    """
    config = _config(folder)
    try:
        return _loaded(folder, config, base)
    except UserError:
        # A running bootstrap may have replaced the folder meanwhile.
        if (now := _config(folder)) == config:
            raise
        return _loaded(folder, now, base)


def _config(folder: Path) -> dict[str, Any]:
    """Read the file that says what the model is. Raises UserError."""
    file = description_of(folder) or folder / CONFIG
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise _missing(folder, CONFIG) from None
    except OSError as error:
        raise _not_ours(folder, error) from None
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _not_ours(folder, error) from None
    if not isinstance(config, dict):
        raise _not_ours(folder, ValueError(f"{file.name} is no JSON object"))
    return config


def _missing(folder: Path, name: str) -> UserError:
    return UserError(f"{folder}: has no exported model ({name} is missing); {_instead(folder)}", code="no-model")


def _not_ours(folder: Path, error: Exception) -> UserError:
    reason = one_line(str(error).splitlines()[0]) if str(error) else type(error).__name__
    return UserError(f"{folder}: not a model that swarmtrain exported ({reason}); {_GIVE}", code="not-a-model")


def _provenance(folder: Path, config: Mapping[str, Any]) -> Provenance | None:
    try:
        return provenance_in(config)
    except (ValueError, KeyError, TypeError) as error:
        raise _not_ours(folder, error) from None


def _instead(folder: Path) -> str:
    """Return advice for a folder without a model: that of a peer, of a swarm on one machine, or another."""
    places = (("model", "the run's model"), ("archive", "its newest archive"))
    for peer in (folder, folder / "bootstrap"):
        for name, what in places:
            if description_of(peer / name) is not None:
                return f"{what} is in {peer / name}: give that"
    for peer in (folder, folder / "bootstrap", *sorted(folder.glob("*"))):
        if any((peer / "checkpoints").glob("*.safetensors")):
            where = shlex.quote(str(peer))
            return (
                f"`swarmtrain export --dir {where} --to my-model` makes one of the newest checkpoint there, and "
                f"`swarmtrain generate --dir {where}` uses it as it is"
            )
    return _GIVE


def _loaded(folder: Path, config: Mapping[str, Any], base: Path | None) -> ExportedModel:
    """Load the model whose configuration is `config`. Raises UserError."""
    provenance = _provenance(folder, config)
    try:
        if provenance is not None and provenance.adapter is not None:
            model: LanguageModel = _adapted(folder, provenance, base)
        elif provenance is None or provenance.section is None:
            model = _of_hugging_face(folder, provenance)
        else:
            model = _built_in(folder, provenance.section, provenance)
    except FileNotFoundError as error:
        raise _missing(folder, Path(str(error.filename)).name) from None
    except (ValueError, KeyError, SafetensorError, RuntimeError, OSError) as error:
        raise _not_ours(folder, error) from None
    return ExportedModel(
        model=model,
        tokenizer=_beside(folder, _TOKENIZER),
        held_out=_beside(folder, _HELD_OUT),
        run_tokens=0 if provenance is None else provenance.run_tokens,
        beside_tokenizer={name: content for name in _OF_TOKENIZER if (content := _beside(folder, name))},
    )


def _adapted(folder: Path, provenance: Provenance, base: Path | None) -> LanguageModel:
    """Load an adapter into the model that it belongs to, in the folder `base`. Raises UserError."""
    from swarmtrain.model.huggingface_model import build_huggingface_model

    section, adapter = provenance.section, provenance.adapter
    assert section is not None and adapter is not None
    if adapter.num_parameters > (folder / _ADAPTER_WEIGHTS).stat().st_size + _TORN_PARAMETERS:
        raise ValueError(f"{provenance.file_name} describes a larger adapter than the weights")
    if base is None:
        raise UserError(
            f"{folder}: is an adapter of {one_line(section.base)}; give the folder of that model with --model-dir",
            code="model-files-needed",
        )
    model = build_huggingface_model(ModelSpec(section, base, adapter), seed=0)
    weights: dict[str, Tensor] = {}
    read_weights(folder, provenance.weights_sha256, weights.__setitem__)
    assert model.adapter is not None
    model.adapter.load(weights)
    return model


def _built_in(folder: Path, section: ModelSection, provenance: Provenance) -> GPT:
    weights_bytes = sum((folder / name).stat().st_size for name in provenance.weights_sha256)
    numbers = num_parameters(section) + position_numbers(section)
    if not section.is_built_in or numbers > weights_bytes + _TORN_PARAMETERS:
        raise ValueError(f"{CONFIG} describes a larger model than the weights")
    model = GPT(section)
    reader = Qwen3Reader(model)
    read_weights(folder, provenance.weights_sha256, reader.take)
    reader.finish()
    return model


def _of_hugging_face(folder: Path, provenance: Provenance | None) -> LanguageModel:
    """Load a model by transformers. Raises UserError, also for one that cannot be used here."""
    from swarmtrain.model.huggingface_config import check_names
    from swarmtrain.model.huggingface_model import build_huggingface_model, resolved_keys

    check_names([path.name for path in folder.iterdir()], from_scratch=False)
    if provenance is not None:
        check_hashes(folder, provenance.weights_sha256)
    keys = resolved_keys(folder, is_cut=False)
    keys.pop("keeps_documents_apart")  # it is not trained
    most = min(keys.pop("context_tokens", _MOST_CONTEXT_TOKENS), _MOST_CONTEXT_TOKENS)
    context_tokens = most if provenance is None else provenance.context_tokens
    section = ModelSection(source="huggingface", base=folder.name or ".", context_tokens=context_tokens, **keys)
    return build_huggingface_model(ModelSpec(section, folder), seed=0)


def _beside(folder: Path, name: str) -> bytes:
    """Return the content of a file that may be absent. Raises UserError."""
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise _not_ours(folder, error) from None
