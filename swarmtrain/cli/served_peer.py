"""Peer that `swarmtrain service install` is to start: its folder, its command line, and what the folder remembers."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from swarmtrain.cli.common import WhichPeer
from swarmtrain.cli.option_errors import OptionsError
from swarmtrain.peer.lifecycle.start_options import Started, StartedFile

if TYPE_CHECKING:
    from swarmtrain.peer.service.definition import ServiceDefinition
    from swarmtrain.peer.service.managers import ServiceManager

__all__ = ["INVITE_FILE", "ServedPeer", "definition_of", "missing_secrets", "peer_to_serve", "program", "write_folder"]

INVITE_FILE = "service-invite.txt"
"""File in the peer's folder with the invite that the service was installed with, if the folder had no run then."""
_INVITE = re.compile(r"(^|\s)st\d\w{40}")
_PASSED_ON = (
    *("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ENDPOINT", "XDG_CACHE_HOME", "TMPDIR"),
    *("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "LD_LIBRARY_PATH", "PYTHONPATH"),
    *("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL", "WANDB_MODE"),
    *("TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
)
"""Environment variables of this shell that the peer has as a service too: where its caches are, how it gets to the hub,
what its trackers send to whom. Secrets are not among them."""
_SECRETS = ("HF_TOKEN", "WANDB_API_KEY")


@dataclass(frozen=True, kw_only=True)
class ServedPeer:
    """Peer that a service is to start."""

    folder: Path
    started: Started
    """Command and options that the folder is to remember."""
    invite: str
    """Invite to a run that the folder does not have yet; else empty."""
    more: tuple[str, ...]
    """Options that no folder remembers, as they are typed."""
    writes: tuple[Path, ...]
    """Folders, besides its own, in which they make it write."""

    @property
    def command(self) -> tuple[str, ...]:
        """Command line that starts it."""
        words = (*program(), *self.started.command, "--dir", str(self.folder))
        invite = ("--invite-file", str(self.folder / INVITE_FILE)) if self.invite else ()
        return (*words, *(invite or _kept_invite(self.folder, self.more)), *self.more)


def _kept_invite(folder: Path, more: Sequence[str]) -> tuple[str, ...]:
    """Return the option for the invite that an earlier `install` left, as long as the folder has no run."""
    path = folder / INVITE_FILE
    is_needed = path.exists() and not (folder / "run.toml").exists() and "--invite-file" not in more
    return ("--invite-file", str(path)) if is_needed else ()


def program() -> tuple[str, ...]:
    """Return the absolute command of swarmtrain itself: the script beside this interpreter, or its module."""
    script = Path(sys.executable).with_name("swarmtrain")
    return (str(script),) if os.access(script, os.X_OK) else (sys.executable, "-P", "-m", "swarmtrain.cli")


def peer_to_serve(name: str, directory: Path | None, words: tuple[str, ...]) -> ServedPeer:
    """Find or make up the peer that is meant, and read the words after `--` as its command does.

    Raises UserError or a usage error; nothing is written.
    """
    from swarmtrain.errors import UserError
    from swarmtrain.network.discovery.invite import parse_invite
    from swarmtrain.peer.lifecycle.folder import PeerFolder

    if _INVITE.search(name):
        raise OptionsError("NAME is a peer's name; an invite goes after two dashes: -- INVITE", code="options-conflict")
    known = None if directory is None and not name and _name_a_run(words) else _known_folder(name, directory)
    kept = StartedFile(known).read() if known is not None else Started()
    typed = _Typed(kept.command or ("join",), words)
    invite = typed.invite
    run_sha256 = parse_invite(invite).run_sha256 if invite else None
    folder = known or _new_folder(directory, typed.name, run_sha256)
    here = PeerFolder(folder).kept_sha256()
    if here is None and not invite and not typed.has_invite_file and not (folder / INVITE_FILE).exists():
        raise UserError(
            f"{folder} has no run to continue; give the invite after two dashes: swarmtrain service install --dir "
            f"{shlex.quote(str(folder))} -- INVITE",
            code="nothing-to-resume",
        )
    if run_sha256 is not None and here not in (None, run_sha256):
        raise UserError(
            f"{folder} holds another run, with its checkpoints and its model: give another --dir",
            code="folder-of-another-run",
        )
    return ServedPeer(
        folder=folder.absolute(),
        started=Started(kept.command or ("join",), {**kept.options, **typed.kept}),
        invite=invite if here is None else "",
        more=typed.more,
        writes=typed.writes,
    )


def _name_a_run(words: Sequence[str]) -> bool:
    """Return whether the words after `--` have an invite, or the file of one."""
    return any(_INVITE.search(word) or word.partition("=")[0] == "--invite-file" for word in words)


def _known_folder(name: str, directory: Path | None) -> Path | None:
    """Return the folder of the peer that NAME and `--dir` mean; None if `--dir` is a new folder."""
    from swarmtrain.cli.peers import find

    if directory is not None and not name and not (directory.is_dir() and any(directory.iterdir())):
        return None
    return find(WhichPeer(name=name, directory=directory)).folder


def _new_folder(directory: Path | None, name: str, run_sha256: str | None) -> Path:
    """Return the folder that `join` would take."""
    from swarmtrain.cli.common import PeerOptions
    from swarmtrain.cli.join import free_directory

    options = PeerOptions(dir=directory, name=name, json=False, listen=(), announce=(), log_level="warning")
    return free_directory(options, run_sha256)


class _Typed:
    """What is typed after `--`, read and checked as the peer's command does."""

    def __init__(self, peer_command: tuple[str, ...], words: tuple[str, ...]) -> None:
        """Raises click's usage errors, and those of the options."""
        from swarmtrain.cli.kept_options import given_options
        from swarmtrain.cli.main import cli

        name, *arguments = peer_command
        found = cli.get_command(click.get_current_context(), name)
        assert found is not None, "join or bootstrap"
        ctx = found.make_context(f"swarmtrain {name}", [*arguments, *words])
        self.invite = " ".join(ctx.params.get("words", ()))
        given = given_options(ctx)
        self.kept = {flag: typed for flag, typed in given.items() if typed is not None}
        self.name = self.kept.get("--name", ("",))[0]
        self.more: tuple[str, ...] = ()
        self.writes: tuple[Path, ...] = ()
        for param in found.params:
            is_typed = ctx.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE
            if is_typed and isinstance(param, click.Option) and param.opts[-1] not in given:
                self._add(name, param, ctx.params[param.name or ""])
        self.has_invite_file = "--invite-file" in self.more

    def _add(self, command_name: str, option: click.Option, value: Any) -> None:
        """Take an option that no folder remembers. Raises a usage error for one that makes no sense for a service."""
        flag = option.opts[-1]
        if flag == "--dir":
            raise OptionsError("--dir FOLDER goes before the two dashes; write it there", code="options-conflict")
        if flag == "--background" or option.hidden:
            why = "a service needs no terminal anyway" if flag == "--background" else "it is for rehearsals"
            raise OptionsError(f"{flag} is no option of a service: {why}; leave it out", code="options-conflict")
        if isinstance(value, Path):
            value = value.absolute()
            self.writes += (value.parent,) if command_name == "bootstrap" else ()
        self.more += (flag,) if option.is_flag else (flag, str(value))


def definition_of(peer: ServedPeer, manager: ServiceManager) -> ServiceDefinition:
    """Return the service that starts the peer: the one that there is already for its folder, or a new one."""
    import tempfile

    import platformdirs

    from swarmtrain.peer.service.definition import ServiceDefinition, free_name, service_limits

    known = {service.name: service.folder for service in manager.installed()}
    role, run = peer.started.command[0], _run_name(peer.folder)
    gives_way = role == "join"
    peer_name = peer.started.options.get("--name", ("",))[0]
    title = f"swarmtrain {'volunteer' if gives_way else role} {peer_name}".rstrip() + (f", run {run}" if run else "")
    wanted = peer_name or "-".join(filter(None, ("" if gives_way else role, run))) or peer.folder.name
    name = next((name for name, folder in known.items() if folder == peer.folder), "") or free_name(wanted, known)
    variables = f"SWARMTRAIN_{role.upper()}_"
    environment = {key: os.environ[key] for key in _PASSED_ON if os.environ.get(key)}
    environment |= {key: value for key, value in os.environ.items() if key.startswith(variables)}
    caches = [Path(environment[key]).absolute() for key in _PASSED_ON[:3] if key in environment]
    places = [platformdirs.user_cache_path("swarmtrain").parent, *caches, Path(tempfile.gettempdir()), Path("/tmp")]
    return ServiceDefinition(
        name=name,
        title=title,
        folder=peer.folder,
        command=peer.command,
        environment=environment,
        writable=tuple(dict.fromkeys([*places, *peer.writes])),
        gives_way=gives_way,
        limits=service_limits(peer.started.options) if gives_way else service_limits({}),
    )


def missing_secrets() -> list[str]:
    """Return the secrets of this shell that a peer may need and a service does not get."""
    return [name for name in _SECRETS if os.environ.get(name)]


def _run_name(folder: Path) -> str:
    """Return the name of the run in a folder; empty without one."""
    import tomllib

    try:
        name = tomllib.loads((folder / "run.toml").read_text(encoding="utf-8"))["run"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return name if isinstance(name, str) and re.fullmatch(r"[a-z0-9-]{1,64}", name) else ""


def write_folder(peer: ServedPeer) -> None:
    """Have the folder remember the options, and keep the invite there. Raises UserError if it cannot be written."""
    from swarmtrain.errors import UserError
    from swarmtrain.network.files import write_atomically

    try:
        peer.folder.parent.mkdir(parents=True, exist_ok=True)
        peer.folder.mkdir(mode=0o700, exist_ok=True)
        if peer.invite:
            write_atomically(peer.folder / INVITE_FILE, f"{peer.invite}\n".encode(), mode=0o600)
    except OSError as error:
        raise UserError(
            f"cannot write to {peer.folder}: {error.strerror}; give another folder with --dir",
            code="folder-not-writable",
        ) from None
    StartedFile(peer.folder).keep_command(peer.started)
