"""Measure what a flood of Watch clients costs the trainer, or browsers that show its page.

    python benchmarks/watch_flood.py
    python benchmarks/watch_flood.py --blocks 50 --retry-s 0.2
    python benchmarks/watch_flood.py --browsers 8
    python benchmarks/watch_flood.py --browsers 8 --elsewhere

A trainer takes inner steps of a real model in the main thread, as a volunteer does, beside a status board of fifty
peers with a full loss curve, and a control server. Half a block without clients, a block while 32 clients watch and 200
more are refused and ask again after `--retry-s`, and half a block without, so that a machine that slows down steadily
changes nothing. A step's time excludes its waits for a processor (Linux: schedstat), so that other programs do not
count but waits for Python's lock do. The processor time of the server's threads is printed beside it; together they are
the cost of the flood. Where a machine's speed changes within seconds, blocks differ by more than what is looked for:
"from step to step" compares each step in which the server's threads worked with the steps beside it.

With `--browsers`, the page is served by a process of its own at a niceness of 10, as `--web` does, and instead of the
flood so many windows of Chromium show it, on the same machine. With `--elsewhere` as many readers take the page's
stream and draw nothing, as for the trainer's machine browsers on other machines do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import torch

from swarmtrain.algorithm.inner import InnerOptimizer
from swarmtrain.events import RoundEvent, StartedEvent
from swarmtrain.model.gpt import build_model
from swarmtrain.peer.control.board import Pulse, StatusBoard, Watched
from swarmtrain.peer.control.health import health
from swarmtrain.peer.control.server import MAX_WATCHERS, ControlHandlers, ControlServer
from swarmtrain.peer.training.loop import inner_constants
from swarmtrain.run import load_run
from swarmtrain.v1 import control_pb2 as pb
from swarmtrain.v1 import control_pb2_grpc as pb_grpc

NUM_REFUSED = 200
NUM_PEERS = 50
ROOT = Path(__file__).resolve().parent.parent


class Step(NamedTuple):
    """Step of the trainer: its seconds without its waits for a processor, and the processor time that the other
    threads of the process used meanwhile."""

    seconds: float
    others_s: float


class Trainer:
    """Trainer that takes inner steps of the example's model, over made-up tokens."""

    def __init__(self) -> None:
        run = load_run(ROOT / "examples" / "stdlib-gpt.toml")
        self.model = build_model(run.model, 0)
        self.optimizer = InnerOptimizer(self.model.named_parameters(), inner_constants(run))
        self.batch = torch.randint(0, run.model.vocabulary_size, (4, run.model.context_tokens + 1))
        self.num_steps = 0

    def step(self) -> None:
        """Take one inner step."""
        loss = self.model.loss(self.batch)
        loss.backward()
        float(loss.detach())
        self.optimizer.step(0.5, 1.0)
        self.num_steps += 1

    def steps_for(self, seconds: float) -> list[Step]:
        """Take steps for `seconds`."""
        steps, ends_s = [], time.monotonic() + seconds
        while time.monotonic() < ends_s:
            before_s, others_s = _time_less_queueing_s(), _others_s()
            self.step()
            steps.append(Step(_time_less_queueing_s() - before_s, _others_s() - others_s))
        return steps


def _time_less_queueing_s() -> float:
    """Read a clock that stops while this thread is ready but has no processor."""
    return time.monotonic() - int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def board_of(trainer: Trainer) -> StatusBoard:
    """Return a board in the middle of a run of fifty peers."""
    board = StatusBoard("volunteer", time.time())
    peers = [f"12D3KooW{number:044d}" for number in range(NUM_PEERS)]
    board.take(StartedEvent(inner_steps_per_round=64, num_parameters=10**6, total_tokens=10**9, startup_s=1.0))
    for number in range(512):
        fields = {"round": number, "inner_steps": 64, "tokens": 1, "run_tokens": number, "loss": 3.0, "first_loss": 3.0}
        fields |= {"learning_rate": 0.1, "seconds": 9.0, "merge_s": 1.0, "stall_s": 1.0, "bytes_sent": 1}
        fields |= {"bytes_received": 1, "partners": (), "weights": (), "signer": "", "state_sha256": "ab" * 32}
        board.take(RoundEvent(**fields))

    def look(status: pb.PeerStatus) -> None:
        for peer in peers:
            status.peers.add(peer=peer, name="somebody", tokens=10**6, present=True, round=512, tokens_per_s=1000.0)

    board.add_looker(look)
    board.watch(
        Watched(
            pulse=lambda: Pulse(
                state=pb.PEER_STATE_TRAINING,
                doing=f"training round 512: {trainer.num_steps} of 10000 steps",
                num_steps=trainer.num_steps,
            )
        )
    )
    return board


def main() -> None:
    """Alternate blocks, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=20, help="pairs of blocks")
    parser.add_argument("--block-s", type=float, default=4.0)
    parser.add_argument("--retry-s", type=float, default=1.0, help="how soon those who were refused ask again")
    parser.add_argument("--browsers", type=int, default=0, metavar="N", help="N browsers instead of the flood")
    parser.add_argument("--elsewhere", action="store_true", help="they draw nothing here")
    parser.add_argument("--flood", metavar="ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("--page", metavar="ADDRESS", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.page:
        serve_page(given.page)
        return
    if given.flood and given.browsers:
        obey_with_browsers(given.flood, given.browsers, elsewhere=given.elsewhere)
        return
    if given.flood:
        asyncio.run(Flood(given.flood, given.retry_s).obey())
        return
    torch.set_num_threads(1)
    trainer = Trainer()
    board = board_of(trainer)
    powers = ControlHandlers(
        status=board.status, healthy=lambda: health(board.tick(), time.monotonic())[0], leave=lambda: "no"
    )
    with tempfile.TemporaryDirectory() as folder:
        server = ControlServer(Path(folder), powers)
        server.start()
        try:
            measure(trainer, Path(folder, "control.address").read_text().split()[0], given)
        finally:
            server.stop()


def measure(trainer: Trainer, address: str, given: argparse.Namespace) -> None:
    """Measure blocks without and with the flood, in turn."""
    trainer.steps_for(2.0)
    command = [sys.executable, __file__, "--flood", address, "--retry-s", str(given.retry_s)]
    command += ["--browsers", str(given.browsers)] + ["--elsewhere"] * given.elsewhere
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1) as clients:
        assert clients.stdin is not None and clients.stdout is not None

        def say(word: str) -> str:
            clients.stdin.write(word + "\n")
            return clients.stdout.readline().strip()

        steps: dict[str, list[list[Step]]] = {"without": [], "with": []}
        ratios = []

        def half(which: str) -> float:
            taken = trainer.steps_for(given.block_s / 2)
            steps[which].append(taken)
            return statistics.mean(step.seconds for step in taken)

        for number in range(given.blocks):
            quiet = half("without")
            assert say("on") == "on"
            flooded = half("with") + half("with")
            told = say("off")
            quiet += half("without")
            ratios.append(flooded / quiet)
            print(f"block {number}: ratio {ratios[-1]:.4f}; {told}", flush=True)
        say("end")
    medians, slower, shares = dict[str, float](), dict[str, float](), dict[str, float]()
    for name, halves in steps.items():
        every = [step for taken in halves for step in taken]
        total_s = sum(step.seconds for step in every)
        medians[name] = statistics.median(step.seconds for step in every)
        shares[name] = sum(step.others_s for step in every) / total_s
        slower[name] = sum(excess_s(taken) for taken in halves) / total_s
        print(f"{name}: step median {1000 * medians[name]:.2f} ms, mean {1000 * total_s / len(every):.2f} ms; ", end="")
        print(f"the server used {shares[name]:.3%} of a core, in steps that were {slower[name]:.3%} longer by it")
    low, high = interval_of_median(ratios)
    print(f"step time with / without: median of {len(ratios)} pairs of blocks {statistics.median(ratios):.4f} ", end="")
    print(f"(95 %: {low:.4f} to {high:.4f}), of the medians {medians['with'] / medians['without']:.4f}; ", end="")
    print(f"from step to step {1 + slower['with'] - slower['without']:.4f}")


_NEIGHBOURS = 8
"""Steps on each side beside which one is measured."""
_WORKS_S = 1e-4
"""Processor time of the server's threads in a step from which on they worked in it."""


def excess_s(steps: Sequence[Step]) -> float:
    """Return by how many seconds the steps in which the server's threads worked are longer together.

    Each is compared with the median of those close to it in which they did not, so that a machine whose speed changes
    within seconds changes nothing.
    """
    total_s = 0.0
    for place, step in enumerate(steps):
        if step.others_s < _WORKS_S:
            continue
        near = steps[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS + 1]
        if idle := [other.seconds for other in near if other.others_s < _WORKS_S]:
            total_s += step.seconds - statistics.median(idle)
    return total_s


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """Return an interval of 95 % for the median, from order statistics."""
    ordered, num = sorted(values), len(values)
    cut = max(0, math.floor(num / 2 - 0.98 * math.sqrt(num)))
    return ordered[cut], ordered[num - 1 - cut]


def _others_s() -> float:
    """Return the processor time of this process's other threads."""
    return time.process_time() - time.thread_time()


class Flood:
    """Clients: those that watch, and those that are refused."""

    def __init__(self, address: str, retry_s: float) -> None:
        self.address, self.retry_s = address, retry_s
        self.num_told = self.num_refused = 0
        self.all_told = asyncio.Event()

    async def watch(self) -> None:
        """Watch, as one client."""
        async with grpc.aio.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            async for _ in pb_grpc.ControlStub(channel).Watch(pb.WatchRequest()):
                self.num_told += 1
                if self.num_told >= MAX_WATCHERS:
                    self.all_told.set()

    async def knock(self) -> None:
        """Ask again and again, as a client that is refused."""
        async with grpc.aio.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            while True:
                try:
                    async for _ in pb_grpc.ControlStub(channel).Watch(pb.WatchRequest()):
                        raise AssertionError("one watcher too many")
                except grpc.aio.AioRpcError as error:
                    # UNAVAILABLE: so many at once that gRPC itself refuses some
                    assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE), error
                    self.num_refused += 1
                await asyncio.sleep(self.retry_s)

    async def obey(self) -> None:
        """Start and stop the clients as standard input says."""
        loop, tasks = asyncio.get_running_loop(), []
        while (word := (await loop.run_in_executor(None, sys.stdin.readline)).strip()) != "end":
            if word == "on":
                self.num_told = 0
                self.all_told.clear()
                tasks = [asyncio.create_task(self.watch()) for _ in range(MAX_WATCHERS)]
                await self.all_told.wait()
                tasks += [asyncio.create_task(self.knock()) for _ in range(NUM_REFUSED)]
                await asyncio.sleep(1.0)
                self.num_told = self.num_refused = 0
                print("on", flush=True)
            else:
                broken = [task.exception() for task in tasks if task.done()]
                assert not broken, broken[0]
                told = f"{MAX_WATCHERS} watchers were told {self.num_told} times, {NUM_REFUSED} others refused"
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                print(f"{told} {self.num_refused} times", flush=True)
        print("ended", flush=True)


# ---------------------------------------------------------------- browsers


def serve_page(address: str) -> None:
    """Serve the page of the peer at `address` on a free port, which is printed, until this process is killed."""
    from swarmtrain.cli.page_address import PageAddress
    from swarmtrain.cli.page_service import PageService
    from swarmtrain.cli.peers import LocalPeer

    os.nice(10)
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    print(port, flush=True)
    PageService(LocalPeer(address=address), sock, PageAddress(host="127.0.0.1", port=port), "k" * 32).run()


class Readers:
    """Readers of the page's stream, which draw nothing."""

    def __init__(self, port: int, number: int) -> None:
        self.num_bytes = 0
        self._connections = [http.client.HTTPConnection("127.0.0.1", port) for _ in range(number)]
        for connection in self._connections:
            connection.request("GET", "/state")
            threading.Thread(target=self._read, args=(connection.getresponse(),), daemon=True).start()

    def _read(self, response: Any) -> None:
        with contextlib.suppress(
            OSError, ValueError, AttributeError, http.client.HTTPException
        ):  # closed while it reads
            while data := response.read1(65536):
                self.num_bytes += len(data)

    def close(self) -> str:
        told = f"{len(self._connections)} readers got {self.num_bytes / 1e6:.1f} MB"
        for connection in self._connections:
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
        return told


class Windows:
    """Windows of a browser that show the page."""

    def __init__(self, engine: Any, port: int, number: int) -> None:
        self._contexts = [engine.new_context(viewport={"width": 1440, "height": 900}) for _ in range(number)]
        self._pages = [context.new_page() for context in self._contexts]
        for page in self._pages:
            page.goto(f"http://127.0.0.1:{port}/")
            page.locator("#here tbody tr").first.wait_for()

    def close(self) -> str:
        sentences = {page.locator("#sentence").inner_text() for page in self._pages}
        for context in self._contexts:
            context.close()
        return f"{len(self._contexts)} windows show {', '.join(sorted(sentences))}"


def obey_with_browsers(address: str, number: int, *, elsewhere: bool) -> None:
    """Serve the page, and open and close browsers, as standard input says."""
    with contextlib.ExitStack() as stack:
        engine: Any = None
        if not elsewhere:
            from playwright.sync_api import sync_playwright

            program = shutil.which("chromium") or shutil.which("google-chrome")
            assert program is not None, "there is no Chromium here: apt-get install chromium"
            engine = stack.enter_context(sync_playwright()).chromium.launch(executable_path=program)
        while (word := sys.stdin.readline().strip()) == "on":
            command = [sys.executable, __file__, "--page", address]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as page:
                assert page.stdout is not None
                port = int(page.stdout.readline())
                readers = Readers(port, number) if elsewhere else Windows(engine, port, number)
                time.sleep(2.0)
                print("on", flush=True)
                assert sys.stdin.readline().strip() == "off"
                told = readers.close()
                page.kill()
            print(told, flush=True)
        assert word == "end"
        print("ended", flush=True)


if __name__ == "__main__":
    main()
