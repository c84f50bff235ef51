"""Process that holds one stage of a small model; that of the first stage drives, and prints each batch's loss.

    python tests/processes/stage_peer.py FOLDER '{"stage": 0, ...}'

It prints its PeerID and address, and reads those of the other stages as a line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from swarmtrain.algorithm.inner import InnerConstants, InnerOptimizer
from swarmtrain.errors import PeerError
from swarmtrain.model.stage_work import StageWork
from swarmtrain.model.stages import build_stage, stage_shapes
from swarmtrain.network.identity import load_or_create_identity
from swarmtrain.network.node import NetworkThread, Node, NodeSettings
from swarmtrain.network.stage_calls import StageClient, StageHost, stage_stream_name
from swarmtrain.peer.lifecycle.stop import StopTraining
from swarmtrain.peer.pipeline.driver import Driver
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue
from swarmtrain.peer.pipeline.stage_loop import StageLoop
from swarmtrain.peer.pipeline.stage_service import StageServer, StageShapes, WireCalls
from swarmtrain.protocol.pipeline.ledger import Key, LedgerLimits, StageLedger
from swarmtrain.protocol.pipeline.router import Router
from swarmtrain.run_model import ModelSection

RUN = hashlib.sha256(b"a run of stages").hexdigest()
MODEL = ModelSection(context_tokens=16, num_layers=3, width=32, num_heads=2)
CONSTANTS = InnerConstants(
    learning_rate=1e-2,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    gradient_clip=1.0,
    warmup_fraction=0.1,
    floor_fraction=0.1,
)
SEQUENCES, MICROBATCHES = 2, 4
MICROBATCH_TOKENS = SEQUENCES * MODEL.context_tokens
BATCH_TOKENS = MICROBATCHES * MICROBATCH_TOKENS


def microbatch(number: int) -> torch.Tensor:
    """Return sequences (B, T + 1) that count upwards by one or two."""
    generator = torch.Generator().manual_seed(number)
    starts, steps = torch.randint(0, 100, (2, SEQUENCES, 1), generator=generator)
    return (starts + (1 + steps % 2) * torch.arange(MODEL.context_tokens + 1)) % 256


class Told:
    """Log on standard error."""

    def retried(self, sequence: int, stage: int, peer: str, reason: str) -> None:
        print(f"retried {sequence} at stage {stage} by {peer}: {reason}", file=sys.stderr)

    def refused(self, peer: str, error: PeerError) -> None:
        print(f"refused {peer}: {error}", file=sys.stderr)

    def lost(self, stage: int, peer: str, key: Key, reason: str) -> None:
        print(f"lost {key} at stage {stage} by {peer}: {reason}", file=sys.stderr)


class StagePeer:
    """Peer of one stage."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.settings, boundaries = settings, tuple(settings["boundaries"])
        self.stage, self.num_stages = settings["stage"], len(boundaries) + 1
        self.network = NetworkThread()
        identity = load_or_create_identity(folder / "identity.key")
        node_settings = NodeSettings(directory=folder, listen=("/ip4/127.0.0.1/tcp/0",))
        self.node = self.network.run(Node.start(node_settings, identity, folder / "identity.key"), 30)
        self.me = identity.peer_id
        limits = LedgerLimits(batch_tokens=BATCH_TOKENS)
        self.queue = StageRequestQueue(StageLedger(limits), time.monotonic)
        stage = build_stage(stage_shapes(MODEL, boundaries)[self.stage], seed=5)
        inner = InnerOptimizer(stage.named_parameters(), CONSTANTS)
        self.loop = StageLoop(self.queue, StageWork(stage), inner, BATCH_TOKENS)
        self.shapes = StageShapes(
            most_sequences=SEQUENCES,
            context_tokens=MODEL.context_tokens,
            width=MODEL.width,
            vocabulary_size=MODEL.vocabulary_size,
            activations=settings["activations"],
        )
        server = StageServer(self.shapes, self.num_stages, {self.stage: self.queue}, Told().refused)
        host = StageHost(self.node.traffic, server)
        self.network.run(self.node.serve_pipes(stage_stream_name(RUN), host.serve), 10)
        self.ended = threading.Event()

    def run(self) -> None:
        addresses = self.network.run(self.node.addresses(), 5)
        print(json.dumps([self.me, self.stage, list(addresses)]), flush=True)
        others = json.loads(sys.stdin.readline())
        if self.stage == 0:
            driving = self.network.submit(self.drive(others))
            driving.add_done_callback(lambda _: self.ended.set())
        else:
            threading.Thread(target=self.until_stdin_ends, daemon=True).start()
        for step in range(1_000_000):
            try:
                self.loop.step(step / self.settings["batches"], 1.0, self.ended.is_set)
            except StopTraining:
                break
        if self.stage == 0:
            driving.result()
        self.network.run(self.node.stop(), 5)
        self.network.stop()

    def until_stdin_ends(self) -> None:
        sys.stdin.read()
        self.ended.set()

    async def _drive(self, driver: Driver, number: int) -> float:
        sequences = microbatch(number)
        x, targets = sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()
        return (await driver.drive(MICROBATCH_TOKENS, x, targets)).loss

    async def drive(self, others: list[Any]) -> None:
        routers = [Router(random.Random(0)) for _ in range(self.num_stages - 1)]
        for peer, _, addresses in others:
            await self.node.connect(peer, tuple(addresses))
        for stage, router in enumerate(routers, 1):
            router.set_peers([peer for peer, of, _ in others if of == stage])
        calls = WireCalls(self.me, StageClient(self.node, RUN), self.shapes, {0: self.queue})
        driver = Driver(self.me, routers, calls, Told(), time.monotonic, 0)
        for batch in range(self.settings["batches"]):
            numbers = range(batch * MICROBATCHES, (batch + 1) * MICROBATCHES)
            losses = []
            for number in numbers:  # one at a time, and a flush between batches, as one process computes them
                losses.append(await self._drive(driver, number))
            await driver.settled()
            print(json.dumps(losses), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    StagePeer(Path(sys.argv[1]), json.loads(sys.argv[2])).run()
