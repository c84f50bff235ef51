"""Upload an exported model to Hugging Face's hub, with `huggingface_hub`, which is imported when it is asked for.

The login is the library's own: `HF_TOKEN`, or what `hf auth login` saved. As with Hugging Face's own tools, a new
repository is public unless it is asked to be private; one that exists stays as it is.
"""

from __future__ import annotations

import importlib
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swarmtrain.errors import BadBytesError, RunFileError, RunTimeError, UserError
from swarmtrain.extras import install_in_words
from swarmtrain.run import parse_published_untrusted, run_sha256
from swarmtrain.words import one_line

HELD_OUT = "held-out.txt"
"""File of an export that is a piece of the run's text, word for word."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_log = logging.getLogger(__name__)


def check_login(repository: str) -> None:
    """Raise UserError unless `repository` is a name, the library is there and has a login: before a long export."""
    if not _NAME.fullmatch(repository):
        raise UserError(
            f"--push {one_line(repository)}: no name of a repository; give owner/name", code="bad-repository"
        )
    if not _library().get_token():
        raise UserError(
            f"--push {repository}: no login of the hub; set HF_TOKEN, or type `hf auth login`", code="hub-login"
        )


@contextmanager
def kept_or_temporary(folder: Path | None) -> Iterator[Path]:
    """Yield `folder`, or a new one that is removed at the end."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="swarmtrain-") as directory:
        yield Path(directory) / "model"


def has_own_text(folder: Path) -> bool:
    """Return whether the held-out text in an export may be somebody's own: of anything but Python's standard library.
    An upload to the hub cannot be taken back, and a data set there may be private too."""
    try:
        data = (folder / "run.toml").read_bytes()
        run = parse_published_untrusted(data, run_sha256(data))
    except (OSError, BadBytesError, RunFileError):
        return True
    return any(source.source != "python-stdlib" for source in run.data.mixture)


def upload_model(folder: Path, repository: str, *, is_private: bool) -> str:
    """Upload the model in `folder` to `repository`, which is created if it is not there; return its address.

    Its held-out text stays here if it may be somebody's own.

    Raises RunTimeError, one line, when the hub is not reached or refuses.
    """
    api = _library().HfApi()
    try:
        url = api.create_repo(repository, private=True if is_private else None, exist_ok=True)
        left_out = [HELD_OUT] if has_own_text(folder) else []
        message = "Model exported by swarmtrain"
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, ignore_patterns=left_out)
    except Exception as error:
        # The library raises its own errors, and those of the libraries below it.
        _log.info("the hub: %s", error, exc_info=True)
        reason = one_line(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)[:300]
        raise RunTimeError(
            f"--push {repository}: the hub did not take the model: {reason}; try again, or keep the model with --to "
            f"FOLDER, which `hf upload {repository} FOLDER . --exclude {HELD_OUT}` uploads later",
            code="hub-upload",
        ) from None
    return str(url)


def _library() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise UserError(f"--push needs huggingface_hub: {install_in_words('hf')}", code="package-missing") from None
