"""Knowledge of a bootstrap with its archive: whose tokens it holds, what was counted since, which data were seen."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.network.discovery.token_accounting import TokenAccounting
from swarmtrain.network.identity import new_identity, sign
from swarmtrain.peer.checkpoints.archive import Archive
from swarmtrain.peer.checkpoints.checkpoint import Checkpoint
from swarmtrain.peer.merging.consensus_state import ConsensusState
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.protocol.tokens.tally import CountingRules
from swarmtrain.v1 import snapshot_pb2 as pb

ME, ANNA, BEN, CARL = (new_identity(bytes([i]) * 32) for i in range(1, 5))
RUN = "ab" * 32
STATE = OuterState(torch.zeros(4), torch.zeros(4))


class Boot:
    """Archive of a bootstrap, its folder's counts and its offered state, without a network."""

    def __init__(self, **counts_on_disk: int) -> None:
        rules = CountingRules(began_s=0.0, burst_tokens=200, most_tokens=10**9)
        reading: Any = None
        self.accounting = TokenAccounting(ME.peer_id, rules, reading, dict, lambda: 100.0, lambda *told: None)
        self.offered: list[Checkpoint] = []
        self.swarm: Any = SimpleNamespace(
            accounting=self.accounting,
            published=SimpleNamespace(sha256=RUN, run=SimpleNamespace(round_tokens=100)),
        )
        extras: dict[str, Any] = {}
        manager: Any = SimpleNamespace(
            extras=extras,
            extra=lambda: {name: give() for name, give in extras.items()},
            restore_counts=lambda: self.accounting.learn(counts_on_disk),
            offer=self._offer,
        )
        self.archive = Archive(self.swarm, manager)

    async def _offer(self, kept: Checkpoint) -> None:
        self.offered.append(kept)


def present(holds: dict[str, int], rows: list[pb.Signed] | None = None, counted: int = 0) -> ConsensusState:
    progress = Progress(round=5, run_tokens=counted, peer_tokens=holds)
    places = [{ANNA.peer_id: (4, 32)}, {ANNA.peer_id: (5, 8)}]
    return ConsensusState(
        state=STATE, progress=progress, holds=holds, places=places, shard_rows=[(ANNA.peer_id, rows or [])]
    )


def test_what_the_weights_hold_and_the_seen_data_outlive_a_restart() -> None:
    row = sign(ANNA, "coverage", RUN, pb.ShardRow(corpus_sha256=b"c" * 32, tokens=[5, 0], on=1))
    before = Boot()
    kept = before.archive.kept_of(present({ANNA.peer_id: 5000, BEN.peer_id: 4000}, [row], counted=20_000))
    extra = json.loads(json.dumps(dict(kept.extra)))
    again = Boot()
    again.archive.restore(Checkpoint(state=STATE, progress=kept.progress, roster=None, signed_roster=None, extra=extra))
    assert again.archive.holds == {ANNA.peer_id: 5000, BEN.peer_id: 4000}
    (sent,) = again.archive.serving().rows()
    assert sent.payload == row.payload
    assert again.archive.serving().places() == [{ANNA.peer_id: (4, 32)}, {ANNA.peer_id: (5, 8)}]
    newcomer = {ANNA.peer_id: 5000, BEN.peer_id: 4000, CARL.peer_id: 768}
    assert again.archive.is_wanted(newcomer, [CARL.peer_id]), "whatever the bootstrap counts"


@pytest.mark.parametrize("extra", [{}, {"holds": 5}, {"holds": {"a": "b"}}])
def test_an_archive_of_before_holds_what_it_counts(extra: dict[str, Any]) -> None:
    boot, progress = Boot(), Progress(round=5, run_tokens=900, peer_tokens={ANNA.peer_id: 900})
    odd = {"shard_rows": ["x"], "places": extra.get("holds")}
    boot.archive.restore(Checkpoint(state=STATE, progress=progress, roster=None, signed_roster=None, extra=extra | odd))
    assert boot.archive.holds == {ANNA.peer_id: 900}


def test_what_was_counted_since_is_given_with_the_archive() -> None:
    """Of volunteers that were never archived too: the run's learning rate must not rise again."""
    boot = Boot(**{BEN.peer_id: 700})
    kept = Checkpoint(
        state=STATE,
        progress=Progress(round=5, run_tokens=900, peer_tokens={ANNA.peer_id: 900}),
        roster=None,
        signed_roster=None,
    )
    boot.accounting.learn(kept.progress.peer_tokens)
    boot.archive.restore(kept)
    for _ in range(2):
        asyncio.run(boot.archive.serve_counts(STATE, kept.progress))
    (offered,) = boot.offered
    assert (offered.progress.round, offered.progress.run_tokens) == (5, 1600)
    assert offered.progress.peer_tokens == {ANNA.peer_id: 900, BEN.peer_id: 700} and offered.state is STATE


def test_who_brings_nothing_new_is_not_asked_again_before_it_has_more() -> None:
    boot, infos = Boot(), [PeerInfo(peer=ANNA.peer_id, round=5)]
    boot.archive.kept_of(present({ANNA.peer_id: 5000}))
    assert boot.archive.watch.is_new(infos)
    boot.archive.asks(infos)
    assert not boot.archive.is_wanted({ANNA.peer_id: 5000}, [ANNA.peer_id])
    assert not boot.archive.watch.is_new(infos) and boot.archive.watch.is_new([PeerInfo(peer=ANNA.peer_id, round=6)])


def test_a_bootstrap_without_an_archive_watches_since_the_run_began() -> None:
    boot = Boot()
    boot.archive.restore(None)
    boot.accounting.adopt([{ANNA.peer_id: 10**6}])
    assert boot.accounting.total == 200, "one volunteer alone brings what its time explains"
