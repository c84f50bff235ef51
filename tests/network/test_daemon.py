"""End of the daemon, without a daemon: what is reported, and what is released if it hangs."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swarmtrain.network.daemon import stop_daemon
from swarmtrain.network.node import Node


async def a_child(code: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(sys.executable, "-I", "-S", "-c", code, stdin=pipe, stdout=pipe)


SLEEPER = "import time; print(flush=True); time.sleep(600)"


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_daemon_that_hangs_is_killed_and_nothing_of_it_is_left(
    tmp_path: Path, cancelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    unraisable: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append(repr(args.exc_value)))
    returned: list[int | None] = []

    async def body() -> None:
        child = await a_child(SLEEPER)
        assert child.stdout is not None
        await child.stdout.readline()
        child.send_signal(signal.SIGSTOP)

        async def shutdown() -> None:
            if cancelled:
                await asyncio.Event().wait()

        sockets = tmp_path / "sockets"
        sockets.mkdir()
        p2p = SimpleNamespace(_child=child, shutdown=shutdown)
        stopping = asyncio.create_task(stop_daemon(p2p, sockets))
        await asyncio.sleep(0.01)
        if cancelled:
            stopping.cancel()
        await asyncio.wait({stopping})
        assert stopping.cancelled() == cancelled
        assert not sockets.exists()
        returned.append(await child.wait())

    asyncio.run(body())
    gc.collect()
    assert returned == [-signal.SIGKILL]
    assert not unraisable


def a_node(child: Any, reading: asyncio.Task[None]) -> Node:
    control = SimpleNamespace(_read_task=reading, _write_task=asyncio.create_task(asyncio.sleep(600)))
    node = Node(SimpleNamespace(), SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    node._p2p = SimpleNamespace(_client=SimpleNamespace(control=control), _child=child)
    return node


@pytest.mark.parametrize(
    ("status", "said"), [(-9, "was ended by SIGKILL"), (3, "ended with status 3"), (-99, "was ended by signal 99")]
)
def test_a_daemon_whose_sockets_close_before_its_status_is_known_has_a_status(status: int, said: str) -> None:
    async def wait() -> int:
        await asyncio.sleep(0.05)
        return status

    async def body() -> str:
        return await a_node(SimpleNamespace(wait=wait), asyncio.create_task(asyncio.sleep(0))).wait_until_dead()

    assert asyncio.run(body()) == said


def test_a_daemon_that_lives_behind_closed_sockets_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmtrain.network.node._REAPED_S", 0.01)

    async def wait() -> int:
        return await asyncio.Event().wait()  # type: ignore[return-value]

    async def body() -> str:
        return await a_node(SimpleNamespace(wait=wait), asyncio.create_task(asyncio.sleep(0))).wait_until_dead()

    assert asyncio.run(body()) == "was cut off from this process"
