"""Base of a run's model (`model.base`): a folder, or a model of the Hugging Face hub at a commit.

A person's run file says where a model is, and not of what shape. `resolved_run` reads its configuration and fills in
the keys of the shape, so that whatever computes with the run file alone, an estimate or a plan, need not know of it. It
asks the hub only for a model of the hub. Nothing of a base is executed.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarmtrain.errors import RunFileError, SwarmtrainError, UserError
from swarmtrain.extras import install_in_words
from swarmtrain.run import FILLED_MODEL_KEYS, PUBLISHED_BASE, ModelSection, RunFile, with_model
from swarmtrain.words import one_line

__all__ = [
    "HubModel",
    "base_files",
    "base_in_words",
    "base_of",
    "is_published_from",
    "published_base",
    "resolved_run",
    "with_base_path",
]

_log = logging.getLogger(__name__)
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB_NAME = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][\w./-]{{0,199}}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL_FILES = ("*.json", "chat_template.jinja")
_WEIGHT_FILES = ("*.safetensors",)
_LIMIT_S = 60.0


@dataclass(frozen=True)
class HubModel:
    """Model of the hub, at a commit, or a branch or tag of its repository; empty: the newest commit."""

    name: str
    revision: str = ""


def base_of(section: ModelSection, folder: Path) -> HubModel | Path:
    """Return what `model.base` means in a run file in `folder`. Raises RunFileError if it is neither."""
    path = (folder / section.base).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise RunFileError(
            f"model.base: {one_line(str(path))} is a file; give the folder of a model", code="no-such-base"
        )
    if (match := _HUB_NAME.fullmatch(section.base)) is None:
        raise RunFileError(
            f"model.base: there is no folder {one_line(str(path.absolute()))}, and a model of the hub is owner/name or "
            "owner/name@revision; correct it",
            code="no-such-base",
        )
    return HubModel(match[1], match[2] or "")


def with_base_path(run: RunFile, folder: Path) -> RunFile:
    """Return `run`, of a run file in `folder`, with the absolute path of its base if that is a folder."""
    if run.model.is_built_in or run.published is not None or not isinstance(path := base_of(run.model, folder), Path):
        return run
    return run.model_copy(update={"model": run.model.model_copy(update={"base": str(path.resolve())})})


def resolved_run(run: RunFile, folder: Path) -> RunFile:
    """Return `run`, of a run file in `folder`, with the shape that the configuration of its base gives.

    A model of the hub is at a commit afterwards. Raises RunFileError if the base is not found or cannot be trained, or
    does not fit the rest of the run file.
    """
    if run.model.is_resolved:
        return run
    from swarmtrain.model.huggingface_config import check_names
    from swarmtrain.model.huggingface_model import resolved_keys

    base = base_of(run.model, folder)
    if isinstance(base, HubModel):
        base, names = _at_commit(base)
    else:
        names = [each.name for each in base.iterdir()]
    try:
        check_names(names, from_scratch=run.model.from_scratch)
        path = base if isinstance(base, Path) else _downloaded(base, _SMALL_FILES)
        found = resolved_keys(path, is_cut=run.pipeline.stages > 1)
    except UserError as error:
        told = (each if each.startswith("model.base: ") else each.found_in("model.base") for each in error.problems)
        raise RunFileError(*told) from None
    most = found.pop("context_tokens", None)
    if most is not None and run.model.context_tokens > most:
        raise RunFileError(
            f"model.context_tokens: {run.model.context_tokens} with model.base = {one_line(run.model.base)}, whose "
            f"longest sequence has {most}; allowed: at most {most}",
            code="keys-disagree",
        )
    name = str(path) if isinstance(base, Path) else f"{base.name}@{base.revision}"
    return with_model(run, {**found, "base": name})


def base_files(run: RunFile, folder: Path) -> Path:
    """Return the folder of the files of a resolved run's base; those of the hub are downloaded. Raises RunFileError."""
    base = base_of(run.model, folder)
    if isinstance(base, Path):
        return base
    return _downloaded(base, _SMALL_FILES if run.model.from_scratch else (*_SMALL_FILES, *_WEIGHT_FILES))


def published_base(base: str) -> str:
    """Return `model.base` as others are told it: of a folder only the last name, in plain letters."""
    if PUBLISHED_BASE.fullmatch(base):
        return base
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(base).name).strip("-._")[:96] or "model"


def base_in_words(section: ModelSection) -> str:
    """Name a model of Hugging Face to a person, such as `Qwen/Qwen3-0.6B, from its weights`."""
    name, _, revision = section.base.partition("@")
    if _COMMIT.fullmatch(revision):
        name = f"{name}@{revision[:7]}"
    elif revision or not _HUB_NAME.fullmatch(section.base):
        name = section.base
    return f"{one_line(name)}, {'from scratch' if section.from_scratch else 'from its weights'}"


def is_published_from(published: RunFile, run: RunFile) -> bool:
    """Return whether `run`, as a person wrote it, is the one that was published; its base need not be read again."""
    ours, theirs = run.model, published.model
    if not ours.is_built_in and theirs.source == ours.source and _is_same_base(theirs.base, ours.base):
        filled = {key: getattr(theirs, key) for key in (*FILLED_MODEL_KEYS, "base")}
        run = run.model_copy(update={"model": ours.model_copy(update=filled)})
    return published.model_copy(update={"published": None}) == run


def _is_same_base(published: str, written: str) -> bool:
    if published == published_base(written):
        return True
    match = _HUB_NAME.fullmatch(written)
    name, _, commit = published.partition("@")
    if match is None or not commit or match[1] != name:
        return False
    return not _COMMIT.fullmatch(match[2] or "") or match[2] == commit


# ---------------------------------------------------------------- the hub


def _at_commit(base: HubModel) -> tuple[HubModel, list[str]]:
    """Return a model of the hub at the commit that its revision has now, and the names of its files. Raises
    RunFileError."""
    with _errors_in_words(base) as hub:
        info = hub.HfApi(token=_token()).model_info(base.name, revision=base.revision or None, timeout=_LIMIT_S)
        names = [str(each.rfilename) for each in info.siblings or ()]
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise RunFileError(
            f"model.base: the hub gives no commit of {base.name}; try again later", code="base-not-loaded"
        )
    return HubModel(base.name, info.sha), names


def _downloaded(base: HubModel, patterns: tuple[str, ...]) -> Path:
    """Return the folder with the files of a model at a commit, in the hub's own cache."""
    with _errors_in_words(base) as hub:
        return Path(
            hub.snapshot_download(base.name, revision=base.revision, allow_patterns=list(patterns), token=_token())
        )


def _token() -> str | bool:
    """Return the login given to this program, if any; one that is stored in the home folder is not used."""
    return os.environ.get("HF_TOKEN") or False


@contextmanager
def _errors_in_words(base: HubModel) -> Iterator[Any]:
    """Give the library `huggingface_hub` to the block, and translate whatever it raises."""
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise RunFileError(
            f"model.base: a model of the hub needs huggingface_hub: {install_in_words('hf')}", code="package-missing"
        ) from None
    importlib.import_module("huggingface_hub.utils").disable_progress_bars()
    try:
        yield hub
    except (SwarmtrainError, MemoryError):
        raise
    except Exception as error:
        _log.info("the hub: %s", error, exc_info=True)
        reason = one_line((str(error).strip().splitlines() or [type(error).__name__])[0]).rstrip(".")[:200]
        at = f"@{base.revision}" if base.revision else ""
        raise RunFileError(
            f"model.base: cannot load {base.name}{at}: {reason}; check the name, the revision and the connection, or "
            "give a folder",
            code="base-not-loaded",
        ) from None
