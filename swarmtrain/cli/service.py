"""`swarmtrain service`: the file with which the system starts a peer of this machine, also after a reboot.

The peer's folder remembers its options, so the file holds none: `limits`, `pause` and a `join` by hand hold over a
reboot (decision 88). What installs, starts and removes a service are the system's own commands, which it prints.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import click

from swarmtrain.cli.common import WhichPeer, example, which_peer
from swarmtrain.cli.output import echo

UNDER_LAUNCHD = "SWARMTRAIN_UNDER_LAUNCHD"
"""Variable of a peer that launchd starts. launchd starts a job again whatever code it failed with, so such a peer ends
with code 0 where a person has to change something."""
_STOP_S = 110
"""Seconds that a peer gets to end cleanly: the last volunteer of a run waits up to 100 s for the archive, and systemd
gives all services of a user 120 s at shutdown."""
_RESTART_S = 30
_PASSED_ON = ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "XDG_DATA_HOME", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH")
"""Environment variables of this shell that the peer needs as a service too. Secrets are not among them."""
_PLACES = _PASSED_ON[:5]
"""Those of them that name folders in which it writes."""
_SAFE = re.compile(r"[A-Za-z0-9@_./:=,+-]+")


@click.command(
    name="service",
    epilog=example(
        "swarmtrain service anna",
        "swarmtrain service anna > ~/.config/systemd/user/swarmtrain-anna.service",
    ),
)
@which_peer
def command(which: WhichPeer) -> None:
    """Print the file with which the system starts a peer at boot.

    A unit of systemd on Linux, an agent of launchd on macOS, each for this user alone. It starts a peer that has run
    here with all that the peer's folder remembers, and again when it fails or is killed. The commands that install,
    follow and remove it are printed on standard error; nothing is written.
    """
    from swarmtrain.cli.background import say
    from swarmtrain.cli.peers import find
    from swarmtrain.errors import UserError
    from swarmtrain.peer.lifecycle.start_options import StartedFile

    found = find(which).folder
    if found is None or not (found / "run.toml").exists():
        raise UserError(
            f"{found or which.address} has no run to continue; start the peer here once with `swarmtrain join "
            "INVITE`, and type this again",
            code="nothing-to-resume",
        )
    folder = found.absolute()
    if not str(folder).isprintable():
        raise UserError(
            f"{str(folder)!r} has a character that no service can hold; give the folder another name",
            code="not-for-a-service",
        )
    started = StartedFile(folder).read()
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", started.options.get("--name", (folder.name,))[0]).strip("-._") or "peer"
    name = f"swarmtrain-{plain[:64]}"
    words = (*_program(), *(started.command or ("join",)), "--dir", str(folder))
    environment = {key: value for key in _PASSED_ON if (value := os.environ.get(key, "")) and value.isprintable()}
    if sys.platform == "darwin":
        echo(agent(name, words, environment, folder), nl=False)
        path = f"~/Library/LaunchAgents/{name}.plist"
        steps = {
            "write": f"swarmtrain service --dir {shlex.quote(str(folder))} > {path}",
            "start": f"launchctl bootstrap gui/$(id -u) {path}",
            "look": f"swarmtrain watch --dir {shlex.quote(str(folder))}",
            "remove": f"launchctl bootout gui/$(id -u)/{name}; rm {path}",
        }
    else:
        echo(unit(name, words, environment, folder), nl=False)
        path = f"~/.config/systemd/user/{name}.service"
        steps = {
            "write": f"mkdir -p ~/.config/systemd/user && swarmtrain service --dir {shlex.quote(str(folder))} > {path}",
            "start": f"systemctl --user daemon-reload && systemctl --user enable --now {name}",
            "at boot, not at login": "loginctl enable-linger",
            "look": f"systemctl --user status {name}; journalctl --user-unit {name} -f",
            "remove": f"systemctl --user disable --now {name}; rm {path}",
        }
    for what, line in steps.items():
        say(f"{what}: {line}")


def _program() -> tuple[str, ...]:
    """Return the absolute command of swarmtrain itself: the script beside this interpreter, or its module."""
    script = Path(sys.executable).with_name("swarmtrain")
    return (str(script),) if os.access(script, os.X_OK) else (sys.executable, "-P", "-m", "swarmtrain.cli")


def unit(name: str, words: tuple[str, ...], environment: Mapping[str, str], folder: Path) -> str:
    """Return a user's unit of systemd that starts the command line `words`, the program's absolute path first.

    It may write below `folder`, the user's cache and the folders of temporary files only. It has no limit of memory:
    the peer keeps its own (`swarmtrain limits`), which may change.
    """
    import tempfile

    import platformdirs

    from swarmtrain.errors import UserError

    own = [environment[key] for key in _PLACES if key in environment]
    cache = platformdirs.user_cache_path("swarmtrain").parent
    places = dict.fromkeys(map(str, (folder, cache, *own, tempfile.gettempdir(), "/tmp")))
    lines = [
        "[Unit]",
        f"Description=swarmtrain peer in {str(folder).replace('%', '%%')}",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "Type=exec",
        f"ExecStart={_command_line(words)}",
        *(f"Environment={_quoted(f'{key}={value}')}" for key, value in environment.items()),
        f"SyslogIdentifier={name}",
        "# Code 0: the run has ended, or somebody asked the peer to leave. Code 2: a person has to change something.",
        "Restart=on-failure",
        f"RestartPreventExitStatus={UserError.exit_code}",
        f"RestartSec={_RESTART_S}",
        "RestartSteps=6",
        "RestartMaxDelaySec=15min",
        "# The peer says goodbye, and then ends its network daemon itself.",
        "KillMode=mixed",
        f"TimeoutStopSec={_STOP_S}",
        *(["OOMScoreAdjust=500"] if "join" in words else []),
        "NoNewPrivileges=yes",
        "RestrictSUIDSGID=yes",
        "RestrictRealtime=yes",
        "LockPersonality=yes",
        "SystemCallArchitectures=native",
        "# If it ends with code 226, this system has no user namespaces for these: leave them out.",
        "ProtectSystem=strict",
        "ProtectHome=read-only",
        *(f"ReadWritePaths={_quoted(f'-{place}')}" for place in places),
        "",
        "[Install]",
        "WantedBy=default.target",
        "",
    ]
    return "\n".join(lines)


def agent(name: str, words: tuple[str, ...], environment: Mapping[str, str], folder: Path) -> str:
    """Return a property list of launchd that starts the command line `words` when its user logs in."""
    import plistlib

    log = str(folder / "service.log")
    job = {
        "Label": name,
        "ProgramArguments": list(words),
        "EnvironmentVariables": {**environment, UNDER_LAUNCHD: "1"},
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": _RESTART_S,
        "ExitTimeOut": _STOP_S,
        "StandardOutPath": log,
        "StandardErrorPath": log,
    }
    return plistlib.dumps(job, sort_keys=False).decode()


def _command_line(words: tuple[str, ...]) -> str:
    """Return the words as systemd reads them back: systemd.syntax(7), systemd.service(5).

    Variables are replaced in arguments and not in the program's path, so a path with `$` is an argument of env.
    """
    if "$" in words[0]:
        words = ("/usr/bin/env", *words)
    return " ".join([_quoted(words[0]), *(_quoted(word).replace("$", "$$") for word in words[1:])])


def _quoted(word: str) -> str:
    word = word.replace("%", "%%")
    if _SAFE.fullmatch(word):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
