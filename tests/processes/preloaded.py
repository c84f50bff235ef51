"""Processes of a swarm that start in milliseconds: forked from a process that has imported all that a peer imports.

Importing torch, hivemind and this package takes two seconds of a core, and the tests start hundreds of peers: that was
more than a third of their time. Each peer is still a separate process with its own daemon. Each interpreter orders sets
of strings differently, which must not matter to a swarm: so there are several forking processes, and the peers of a
swarm come from them in turn.

Other processes start a new interpreter: those of `local` and of the background, those that a test changes, and those of
tests of memory, of separate machines, or of kills during the start.

Run as a program, this is the process that forks. It reads requests from the socket that is its standard input.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_MOST_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1
_WORDS_ORDERS = 3


# ---------------------------------------------------------------- in the tests


class ForkedProcess:
    """Part of `subprocess.Popen`'s interface for a process that another process forked and waits for."""

    def __init__(self, pid: int, stdout: int, status: int) -> None:
        self.pid = pid
        self.stdout: IO[bytes] = os.fdopen(stdout, "rb")
        self.returncode: int | None = None
        self._status = status
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Return its exit code, or minus the signal that ended it; None while it runs."""
        return self._look(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns its exit code."""
        give_up_s = None if timeout is None else time.monotonic() + timeout
        while True:
            left_s = 1.0 if give_up_s is None else min(1.0, give_up_s - time.monotonic())
            if (code := self._look(max(0.0, left_s))) is not None:
                return code
            if give_up_s is not None and time.monotonic() >= give_up_s:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)

    def _look(self, wait_s: float) -> int | None:
        with self._lock:
            if self.returncode is None and select.select([self._status], [], [], wait_s)[0]:
                told = os.read(self._status, 64)
                os.close(self._status)
                self.returncode = int(told) if told else -signal.SIGKILL  # the process that forked it was killed
            return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class _Forker:
    """Handle of a process that forks and ends with this one."""

    def __init__(self, modules: Sequence[str]) -> None:
        from swarmtrain.network.daemon import owned_process_args

        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                owned_process_args([sys.executable, __file__, *modules]),
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def start(self, arguments: Sequence[str], errors: IO[bytes], env: Mapping[str, str], cwd: Path) -> ForkedProcess:
        told, tells = os.pipe()
        status, sets_status = os.pipe()
        try:
            request = json.dumps({"arguments": list(arguments), "env": dict(env), "cwd": str(cwd)}).encode()
            assert len(request) <= _MOST_BYTES
            socket.send_fds(self._socket, [request], [tells, errors.fileno(), sets_status])
            pid = int(self._socket.recv(64) or 0)
        finally:
            os.close(tells)
            os.close(sets_status)
        assert pid, "the process that forks the peers of the tests has ended"
        return ForkedProcess(pid, told, status)

    def close(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()


class Preloaded:
    """Starter of `swarmtrain ARGUMENTS` in processes that need not import it.

    With `modules`, which are imported too, all come from one forking process: importing transformers takes seconds.
    """

    def __init__(self, *modules: str) -> None:
        self._modules = modules
        self._num_forkers = 1 if modules else _WORDS_ORDERS
        self._forkers: list[_Forker] = []

    def start(
        self, number: int, arguments: Sequence[str], errors: IO[bytes], env: Mapping[str, str], cwd: Path
    ) -> ForkedProcess:
        """Start the process of this number in its swarm: standard output is a pipe, standard error goes to `errors`."""
        while len(self._forkers) < self._num_forkers:  # they import at the same time
            self._forkers.append(_Forker(self._modules))
        return self._forkers[number % self._num_forkers].start(arguments, errors, env, cwd)

    def close(self) -> None:
        """End the processes that fork, and so whatever they forked."""
        for forker in self._forkers:
            forker.close()


# ---------------------------------------------------------------- the process that forks


def _import_all(modules: Sequence[str]) -> None:
    import swarmtrain.cli.bootstrap
    import swarmtrain.cli.display
    import swarmtrain.cli.join
    import swarmtrain.cli.main
    import swarmtrain.cli.stop_signals
    import swarmtrain.peer.bootstrap
    import swarmtrain.peer.volunteer  # noqa: F401
    from swarmtrain.network.daemon import hivemind_module

    for name in ("dht.node", "dht.validation", "p2p.p2p_daemon", "p2p.servicer", "utils.multiaddr"):
        hivemind_module(name)
    for name in modules:
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork has no other threads than the one that forks"


def _fork_for_requests(requests: socket.socket) -> dict[str, Any]:
    """Fork for each request; returns in the child, with what it is to do."""
    statuses: dict[int, int] = {}
    waking, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([requests, waking], [], [])
        if waking in ready:
            os.read(waking, 512)
            while statuses:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                with contextlib.suppress(BrokenPipeError):
                    os.write(statuses[pid], str(os.waitstatus_to_exitcode(status)).encode())
                os.close(statuses.pop(pid))
        if requests not in ready:
            continue
        said, handed, _, _ = socket.recv_fds(requests, _MOST_BYTES, 3)
        if not said:
            sys.exit(0)
        output, errors, status = handed
        forker = os.getpid()
        if pid := os.fork():
            os.close(output)
            os.close(errors)
            statuses[pid] = status
            requests.send(str(pid).encode())
            continue
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != forker:
            os._exit(1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(errors, 2)
        requests.detach()
        for other in (output, errors, status, waking, wakes, *statuses.values()):
            os.close(other)
        return json.loads(said)


def _become(wanted: Mapping[str, Any]) -> None:
    """Set up this process as if it had been started with these arguments."""
    os.chdir(wanted["cwd"])
    os.environ.clear()
    os.environ.update(wanted["env"])
    sys.argv = ["swarmtrain", *wanted["arguments"]]
    sys.orig_argv[:] = [sys.executable, "-m", "swarmtrain.cli", *wanted["arguments"]]
    # New objects: a stream remembers properties of its file, such as whether it can seek.
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # Python seeds its own generator at each fork


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path.remove(str(Path(__file__).parent))  # as `python -m` has it
    _import_all(sys.argv[1:])
    _become(_fork_for_requests(socket.socket(fileno=0)))
    sys.modules["swarmtrain.cli.main"].main()
