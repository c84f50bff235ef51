"""What child processes get of this process's environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swarmtrain.environment import BY_TRACKER, COMPUTES, PEER, keep_minimal_environment, minimal_environment
from swarmtrain.network import daemon
from swarmtrain.peer.local.swarm import LocalSwarm

SECRETS = {
    "HF_TOKEN": "hf_x",
    "HUGGING_FACE_HUB_TOKEN": "hf_x",
    "WANDB_API_KEY": "w",
    "TRACKIO_SERVER_URL": "http://x?write_token=t",
    "AWS_SECRET_ACCESS_KEY": "a",
    "GOOGLE_APPLICATION_CREDENTIALS": "g",
    "AZURE_CLIENT_SECRET": "z",
    "NVIDIA_API_KEY": "n",
    "GITHUB_TOKEN": "h",
    "SSH_AUTH_SOCK": "/tmp/ssh",
    "SWARMTRAIN_JOIN_INVITE": "st1",
    "MYSQL_PASSWORD": "m",
}
NEEDED = {"LC_ALL": "C.UTF-8", "TMPDIR": "/tmp", "LD_LIBRARY_PATH": "/lib", "PYTHONPATH": str(Path.cwd())}


@pytest.fixture(autouse=True)
def a_shell_with_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SECRETS, **NEEDED, "OMP_NUM_THREADS": "1", "XDG_DATA_HOME": "/x"}.items():
        monkeypatch.setenv(name, value)


def secrets(environment: object) -> set[str]:
    assert isinstance(environment, dict) and NEEDED.items() | {("PATH", os.environ["PATH"])} <= environment.items()
    return environment.keys() & SECRETS.keys()


def test_each_child_gets_what_it_needs() -> None:
    assert not secrets(minimal_environment()) and "OMP_NUM_THREADS" not in minimal_environment()
    assert not secrets(minimal_environment(COMPUTES)) and minimal_environment(COMPUTES)["OMP_NUM_THREADS"] == "1"
    assert secrets(minimal_environment(PEER)) == {"HF_TOKEN", "SWARMTRAIN_JOIN_INVITE"}
    assert minimal_environment(PEER)["XDG_DATA_HOME"] == "/x"
    of_trackers = {kind: secrets(minimal_environment(names)) for kind, names in BY_TRACKER.items()}
    assert of_trackers == {
        "tensorboard": set(),
        "wandb": {"WANDB_API_KEY"},
        "trackio": {"HF_TOKEN", "TRACKIO_SERVER_URL"},
    }


def test_the_daemon_gets_the_least_although_hivemind_gives_it_all() -> None:
    printed = [sys.executable, "-I", "-S", "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
    command = daemon.owned_process_args([*daemon._without_secrets(), *printed])
    given = {**os.environ, "GOLOG_LOG_FMT": "json"}
    done = subprocess.run(command, env=given, capture_output=True, check=True)
    found = json.loads(done.stdout)
    assert not secrets(found) and found["GOLOG_LOG_FMT"] == "json" and "OMP_NUM_THREADS" not in found


@pytest.mark.parametrize(("words", "keys"), [([], set()), (["--report-to=wandb"], {"WANDB_API_KEY"})])
def test_volunteers_of_local_get_a_trackers_keys_if_it_was_asked_for(
    words: list[str], keys: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, str]] = []

    def start(command: object, *, env: dict[str, str], **more: object) -> None:
        given.append(env)
        raise OSError("it is not needed here")

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(OSError, match="not needed"):
        LocalSwarm(tmp_path).start("volunteer-1", ["join", "INVITE", *words])
    assert secrets(given[0]) - {"HF_TOKEN", "SWARMTRAIN_JOIN_INVITE"} == keys


def test_a_worker_drops_what_it_does_not_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    keep_minimal_environment()
    assert not secrets(os.environ)
