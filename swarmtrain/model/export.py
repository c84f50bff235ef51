"""Write and read a trained model as files that a stranger can load: safetensors and JSON, nothing that executes.

model.safetensors   the weights by name, fp32
config.json         the shape (as in the run file), the tokenizer's kind, what was trained
tokenizer.bin       the learnt tokenizer, absent with bytes
held-out.txt        the text by which it was judged
run.toml            the run that it comes from
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from swarmtrain import __version__
from swarmtrain.errors import UserError
from swarmtrain.model.gpt import build_model
from swarmtrain.model.language_model import LanguageModel
from swarmtrain.run import ModelSection

__all__ = ["ExportedModel", "copy_exported", "export_model", "load_exported", "write_whole"]

_GIVE = "give the folder that `swarmtrain export`, or a bootstrap at the end of its run, wrote"
_FORMAT = "swarmtrain-gpt-1"
_NEEDED = ("config.json", "model.safetensors")
_BESIDE = ("tokenizer.bin", "held-out.txt", "run.toml")


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """Model read back from its folder."""

    model: LanguageModel
    tokenizer: bytes
    held_out: bytes
    run_tokens: int


def export_model(
    folder: Path, weights: Mapping[str, Tensor], section: ModelSection, run_tokens: int, files: Mapping[str, bytes]
) -> None:
    """Write the model into `folder`, replacing the one there; `files` are written beside it by name.

    Raises UserError when the folder holds something else, and the file system's OSError.
    """
    # `save_file` would report a full disk as an error of its own, without a number.
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
    config = {
        "format": _FORMAT,
        "swarmtrain": __version__,
        "model": section.model_dump(mode="json"),
        "run_tokens": run_tokens,
        "weights_sha256": hashlib.sha256(data).hexdigest(),
    }
    config_bytes = (json.dumps(config, indent=2) + "\n").encode()
    write_whole(folder, {"model.safetensors": data, "config.json": config_bytes, **files})


def copy_exported(source: Path, target: Path) -> int:
    """Copy the model in `source` into `target`, and return the run's tokens.

    Raises UserError as `load_exported` and `export_model` do, and OSError if `target` cannot be written.
    """
    files = _read(source)
    run_tokens = _checked(source, files).run_tokens
    write_whole(target, files)
    return run_tokens


def write_whole(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all of `files` into `folder`, or none, replacing the model there.

    Raises UserError when the folder holds something else, and the file system's OSError.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise UserError(f"{folder} holds other files; give an empty or new folder", code="folder-not-empty")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        for path in temporary.iterdir():
            path.chmod(0o644)
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        temporary.chmod(0o755)
        _put_in_place(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename to `folder`. The old folder is removed only when the new one is in place."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load_exported(folder: Path) -> ExportedModel:
    """Load the model in `folder`. Raises UserError, one line, when it is missing, torn or altered."""
    return _checked(folder, _read(folder))


def _read(folder: Path) -> dict[str, bytes]:
    """Read the files of the model in `folder`, each once: a running bootstrap may replace them at any time."""
    try:
        files = {name: (folder / name).read_bytes() for name in _NEEDED}
        return files | {name: (folder / name).read_bytes() for name in _BESIDE if (folder / name).exists()}
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        raise UserError(
            f"{folder}: has no exported model ({missing} is missing); {_instead(folder)}", code="no-model"
        ) from None
    except OSError as error:
        raise UserError(
            f"{folder}: not a model that swarmtrain exported ({error}); {_GIVE}", code="not-a-model"
        ) from None


def _instead(folder: Path) -> str:
    """Return advice for a folder without a model: that of a peer, of a swarm on one machine, or another."""
    places = (("model", "the run's model"), ("archive", "its newest archive"))
    for peer in (folder, folder / "bootstrap"):
        for name, what in places:
            if (peer / name / "config.json").exists():
                return f"{what} is in {peer / name}: give that"
    for peer in (folder, folder / "bootstrap", *sorted(folder.glob("*"))):
        if any((peer / "checkpoints").glob("*.safetensors")):
            where = shlex.quote(str(peer))
            return f"`swarmtrain export --dir {where} --to my-model` makes one of the newest checkpoint there"
    return _GIVE


def _checked(folder: Path, files: Mapping[str, bytes]) -> ExportedModel:
    """Build the model from `files`, which were read in `folder`. Raises UserError."""
    try:
        config = json.loads(files["config.json"])
        section = ModelSection.model_validate(config["model"])
        data = files["model.safetensors"]
        if config["format"] != _FORMAT or hashlib.sha256(data).hexdigest() != config["weights_sha256"]:
            raise UserError(
                f"{folder}: the weights do not match config.json; export the model again", code="not-a-model"
            )
        model = build_model(section, seed=0)
        model.load_state_dict(load(data))
        run_tokens = int(config["run_tokens"])
    except (ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder}: not a model that swarmtrain exported ({reason}); {_GIVE}", code="not-a-model"
        ) from None
    return ExportedModel(
        model=model,
        tokenizer=files.get("tokenizer.bin", b""),
        held_out=files.get("held-out.txt", b""),
        run_tokens=run_tokens,
    )
