"""Base of a run's model (`model.base`): a folder, or a model of the Hugging Face hub at a commit.

A person's run file says where a model is, and not of what shape. `resolved_run` reads its configuration and fills in
the keys of the shape, so that whatever computes with the run file alone, an estimate or a plan, need not know of it. It
asks the hub only for a model of the hub. Nothing of a base is executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from swarmtrain.errors import RunFileError, UserError
from swarmtrain.model.hub import HubModel, HubSnapshot
from swarmtrain.run import RunFile, with_model
from swarmtrain.run_adapter import FILLED_ADAPTER_KEYS
from swarmtrain.run_model import FILLED_MODEL_KEYS, PUBLISHED_BASE, ModelSection
from swarmtrain.words import one_line


def base_of(section: ModelSection, folder: Path) -> HubModel | Path:
    """Return what `model.base` means in a run file in `folder`. Raises RunFileError if it is neither."""
    path = (folder / section.base).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise RunFileError(
            f"model.base: {one_line(str(path))} is a file; give the folder of a model", code="no-such-base"
        )
    if (found := HubModel.parse(section.base)) is None:
        raise RunFileError(
            f"model.base: there is no folder {one_line(str(path.absolute()))}, and a model of the hub is owner/name or "
            "owner/name@revision; correct it",
            code="no-such-base",
        )
    return found


def with_base_path(run: RunFile, folder: Path) -> RunFile:
    """Return `run`, of a run file in `folder`, with the absolute paths of its base and its tokenizer, where they are in
    folders."""
    if run.published is not None:
        return run
    paths: dict[str, str] = {}
    if not run.model.is_built_in and isinstance(path := base_of(run.model, folder), Path):
        paths["base"] = str(path.resolve())
    if run.model.tokenizer_kind == "PATH/tokenizer.json":
        paths["tokenizer"] = str((folder / run.model.tokenizer).expanduser().resolve())
    return run.model_copy(update={"model": run.model.model_copy(update=paths)}) if paths else run


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
    path, name = (base, str(base)) if isinstance(base, Path) else _described(base, from_scratch=run.model.from_scratch)
    try:
        if isinstance(base, Path):
            check_names([each.name for each in base.iterdir()], from_scratch=run.model.from_scratch)
        found = resolved_keys(path, is_cut=run.pipeline.stages > 1)
    except UserError as error:
        told = (each if each.startswith("model.base: ") else each.found_in("model.base") for each in error.problems)
        raise RunFileError(*told) from None
    if not run.model.from_scratch:
        found.pop("constants_sha256", None)
    if not found.pop("keeps_documents_apart", True) and run.data.packing == "documents":
        raise RunFileError(
            f'data.packing: "documents" with model.base = {one_line(run.model.base)}, whose tokens see the documents '
            'before theirs in a sequence; allowed: "stream"',
            code="keys-disagree",
        )
    most = found.pop("context_tokens", None)
    if most is not None and run.model.context_tokens > most:
        raise RunFileError(
            f"model.context_tokens: {run.model.context_tokens} with model.base = {one_line(run.model.base)}, whose "
            f"longest sequence has {most}; allowed: at most {most}",
            code="keys-disagree",
        )
    found["base"] = name
    if not run.adapter.is_used:
        return with_model(run, found)
    from swarmtrain.model.huggingface_model import adapter_keys

    try:
        adapter = adapter_keys(with_model(run, found).model, path, run.adapter)
    except UserError as error:
        raise RunFileError(*error.problems) from None
    return with_model(run, found, adapter)


def _described(model: HubModel, *, from_scratch: bool) -> tuple[Path, str]:
    """Return the folder with what describes a model of the hub, and its name with the commit. Raises RunFileError."""
    if not from_scratch:
        model.check_weights()
    found = model.download(weights=False, advance=lambda done, total: None)
    return found.folder, f"{model.name}@{found.commit}"


def base_files(run: RunFile, folder: Path) -> Path:
    """Return the folder of the files of a resolved run's base; those of the hub are downloaded. Raises RunFileError."""
    base = base_of(run.model, folder)
    return base if isinstance(base, Path) else downloaded(run.model, base, lambda done, total: None).folder


def base_description(run: RunFile, folder: Path) -> Path | None:
    """Return the folder with what describes a resolved run's base, its tokenizer included; None for a built-in model.

    Raises RunFileError.
    """
    if run.model.is_built_in:
        return None
    base = base_of(run.model, folder)
    return base if isinstance(base, Path) else base.download(weights=False, advance=lambda done, total: None).folder


def downloaded(
    section: ModelSection,
    model: HubModel,
    advance: Callable[[int, int], None],
    check: Callable[[], None] = lambda: None,
) -> HubSnapshot:
    """Download what a run needs of a model of the hub; see `HubModel.download`."""
    return model.download(weights=not section.from_scratch, advance=advance, check=check)


def published_base(base: str) -> str:
    """Return `model.base` as others are told it: of a folder only the last name, in plain letters."""
    if PUBLISHED_BASE.fullmatch(base):
        return base
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(base).name).strip("-._")[:96] or "model"


def base_in_words(section: ModelSection) -> str:
    """Name a model of Hugging Face to a person, such as `Qwen/Qwen3-0.6B, from its weights`."""
    model = HubModel.parse(section.base)
    name = section.base if model is None or not model.is_pinned else f"{model.name}@{model.revision[:7]}"
    return f"{one_line(name)}, {'from scratch' if section.from_scratch else 'from its weights'}"


def changed_keys(published: RunFile, run: RunFile) -> dict[str, tuple[object, object]]:
    """Return the keys ("section.key") in which `run`, as a person wrote it, differs from the published one, each with
    its value there and its value here. Its base and its tokenizer need not be read again."""
    ours, theirs = run.model, published.model
    filled: dict[str, object] = {}
    if not ours.is_built_in and theirs.source == ours.source and _is_same_base(theirs.base, ours.base):
        filled = {key: getattr(theirs, key) for key in (*FILLED_MODEL_KEYS, "base")}
        adapter = {key: getattr(published.adapter, key) for key in FILLED_ADAPTER_KEYS}
        run = run.model_copy(update={"adapter": run.adapter.model_copy(update=adapter)})
    if ours.tokenizer_kind == theirs.tokenizer_kind and _is_same_tokenizer(ours, theirs):
        filled["tokenizer"] = theirs.tokenizer
    run = run.model_copy(update={"model": ours.model_copy(update=filled)})
    return {
        f"{section}.{key}": (value, now)
        for section in RunFile.model_fields.keys() - {"published"}
        for key, value in getattr(published, section)
        if (now := getattr(getattr(run, section), key)) != value
    }


def _is_same_tokenizer(written: ModelSection, published: ModelSection) -> bool:
    """Return whether a tokenizer of the same kind may be the published one, which has a commit and no folder."""
    return written.tokenizer_kind != "OWNER/NAME" or _is_same_of_hub(published.tokenizer, written.tokenizer)


def _is_same_base(published: str, written: str) -> bool:
    return published == published_base(written) or _is_same_of_hub(published, written)


def _is_same_of_hub(published: str, written: str) -> bool:
    """Return whether a name of the hub may mean the published one, which is at a commit."""
    ours, theirs = HubModel.parse(written), HubModel.parse(published)
    if ours is None or theirs is None or ours.name != theirs.name:
        return False
    return not ours.is_pinned or ours == theirs
