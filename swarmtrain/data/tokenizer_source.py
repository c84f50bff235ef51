"""Find the tokenizer that a run file names, on the bootstrap: in the model's files, on the hub, or in a file.

The hub's is read at a commit, which the published run names. Its files come through the library `huggingface_hub`.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from swarmtrain.data.tokenizer_file import TokenizerBundle, TokenizerFile
from swarmtrain.errors import RunFileError
from swarmtrain.extras import install_in_words
from swarmtrain.hub_login import hub_token
from swarmtrain.run import MAX_TOKENIZER_BYTES
from swarmtrain.words import one_line

_FILE, _CONFIG, _SPECIAL, _TEMPLATE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_log = logging.getLogger(__name__)


class NamedTokenizer(NamedTuple):
    """Tokenizer that was found, and how the published run names it."""

    tokenizer: TokenizerFile
    name: str


def find_tokenizer(name: str, base: Path, model_files: Path | None) -> NamedTokenizer:
    """Return the tokenizer that `model.tokenizer` names, for values other than "bytes" and "bpe".

    `base` is the folder of the run file, `model_files` that of the model's files. Raises RunFileError.
    """
    if name == "model":
        assert model_files is not None, "the run file was checked"
        return NamedTokenizer(tokenizer_of_folder(model_files), name)
    if name.endswith(".json"):
        path = (base / name).expanduser()
        read = lambda file: _read(path if file == _FILE else path.parent / file)  # noqa: E731
        return NamedTokenizer(_of_files(read, str(path.parent)), _FILE)
    return _of_hub(name)


def tokenizer_of_folder(folder: Path) -> TokenizerFile:
    """Return the tokenizer in a folder of a model's files. Raises RunFileError."""
    return _of_files(lambda file: _read(folder / file), str(folder))


def _read(path: Path) -> bytes | None:
    """Return a file's content; None if there is no such file. Raises RunFileError if it cannot be read."""
    try:
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise RunFileError(
                f"model.tokenizer: {path} has {path.stat().st_size} bytes; allowed: {MAX_TOKENIZER_BYTES}; use another "
                "tokenizer",
                code="file-too-long",
            )
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunFileError(
            f"model.tokenizer: {path} cannot be read: {error.strerror}; correct the path or its permissions",
            code="file-unreadable",
        ) from None


def _of_files(read: Callable[[str], bytes | None], where: str) -> TokenizerFile:
    """Return the tokenizer of the files that `read` returns by their names."""
    bundle = bundle_of_files(read, where)
    try:
        return TokenizerFile(TokenizerBundle.from_bytes_untrusted(bundle.to_bytes()))
    except ValueError as error:
        raise _unusable(where, error) from None


def bundle_of_files(read: Callable[[str], bytes | None], where: str) -> TokenizerBundle:
    """Return what a run pins of the files that `read` returns by their names; None for a file that is not there.

    Raises RunFileError.
    """
    found = read(_FILE)
    if found is None:
        raise RunFileError(
            f"model.tokenizer: {where} has no tokenizer.json; save it with AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...), or use another tokenizer",
            code="no-tokenizer-file",
        )
    try:
        config, special = (_table(read(name)) for name in (_CONFIG, _SPECIAL))
        template = read(_TEMPLATE)
        source = _template_of(config) if template is None else template.decode()
        tokens = {role: text for table in (special, config) for role, text in _special_tokens(table).items()}
        return TokenizerBundle(found.decode(), tokens, source)
    except ValueError as error:
        raise _unusable(where, error) from None


def _unusable(where: str, error: ValueError) -> RunFileError:
    return RunFileError(
        f"model.tokenizer: the tokenizer in {where} cannot be used: {one_line(str(error))[:200]}; use another one",
        code="bad-tokenizer",
    )


def _table(data: bytes | None) -> dict[str, Any]:
    table = {} if data is None else json.loads(data)
    if not isinstance(table, dict):
        raise ValueError("its configuration is not a JSON object")
    return table


def _special_tokens(table: dict[str, Any]) -> dict[str, str]:
    """Return the text of each special token by its role; it is a string, or a table with it as `content`."""
    named = {role: text for role, text in table.items() if role.endswith("_token")}
    found = {role: text.get("content") if isinstance(text, dict) else text for role, text in named.items()}
    return {role: text for role, text in found.items() if isinstance(text, str)}


def _template_of(config: dict[str, Any]) -> str:
    """Return the chat template of a configuration, the default one if there are several; "" if there is none."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else ""


# ---------------------------------------------------------------- the hub


def _of_hub(name: str) -> NamedTokenizer:
    repository, _, revision = name.partition("@")
    library = _library()
    hub, errors = library.HfApi(token=hub_token()), importlib.import_module("huggingface_hub.errors")

    def read(file: str) -> bytes | None:
        try:
            return _read(Path(hub.hf_hub_download(repository, file, revision=commit)))
        except errors.LocalEntryNotFoundError:  # the hub was not reached
            raise
        except errors.EntryNotFoundError:
            return None

    try:
        commit = hub.model_info(repository, revision=revision or None, timeout=60.0).sha
        if not isinstance(commit, str) or not re.fullmatch("[0-9a-f]{40}", commit):
            raise ValueError("the hub gives no commit of it")
        return NamedTokenizer(_of_files(read, f'"{repository}"'), f"{repository}@{commit}")
    except (RunFileError, MemoryError):
        raise
    except Exception as error:
        _log.info("the hub: %s", error, exc_info=True)
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunFileError(
            f'model.tokenizer: cannot load "{name}" from the hub: {one_line(line)[:200]}; check the name, the revision '
            "and the connection (a private one needs HF_TOKEN and --use-hf-token)",
            code="tokenizer-not-loaded",
        ) from None


def _library() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise RunFileError(
            f"model.tokenizer: a tokenizer of the hub needs huggingface_hub: {install_in_words('hf')}",
            code="package-missing",
        ) from None
