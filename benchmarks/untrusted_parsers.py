"""Measure how long the event loop is blocked by the largest messages that another peer may send.

    .venv/bin/python benchmarks/untrusted_parsers.py

Each message is made as a hostile peer would make it, signed with its own key, and read three times. The longest time
counts, in processor time, which other programs do not stretch.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgpack

from swarmtrain.errors import BadBytesError
from swarmtrain.network.asynchronous.server_link import entered_round_untrusted
from swarmtrain.network.asynchronous.state_fetcher import StateFetcher
from swarmtrain.network.coverage import DataCoverage, ShardsOf
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.discovery.records import (
    MAX_BUCKET_RECORDS,
    PRESENCE,
    RecordRules,
    bucket_key,
    hashed_key,
    open_presence_untrusted,
    presence_from_proto_untrusted,
    presence_to_proto,
)
from swarmtrain.network.identity import new_identity, peer_bytes, sign
from swarmtrain.network.rounds.roster import roster_untrusted
from swarmtrain.network.snapshots.state_provider import state_specs
from swarmtrain.network.snapshots.store import Body, SnapshotStore, TensorSpec, build_snapshot, manifest_untrusted
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.pipeline.ledger import Acknowledged, Key, LedgerLimits, Settlement, StageLedger
from swarmtrain.v1 import pipeline_pb2 as stages
from swarmtrain.v1 import snapshot_pb2 as pb

RUN = "ab" * 32
EVE = new_identity()
SPECS = tuple(TensorSpec(f"layer.{number}", (64, 64)) for number in range(100))
MOST_BYTES = 2 * 1024 * 1024 - 8192


def ids(number: int, salt: int) -> list[bytes]:
    """Return bytes of unknown PeerIDs."""
    return [b"\x00\x24\x08\x01\x12\x20" + hashlib.sha256(b"%d %d" % (salt, each)).digest() for each in range(number)]


def state(fill: Callable[[pb.Manifest], None], specs: Any = None) -> pb.Signed:
    """Return a hostile peer's manifest of a state."""
    table = state_specs(SPECS) if specs is None else specs
    manifest = pb.Manifest(run_sha256=bytes.fromhex(RUN), kind=pb.SNAPSHOT_KIND_STATE, round=3)
    body = Body([bytes(sum(spec.size_bytes for spec in table))])
    held = build_snapshot(EVE, manifest, table, body)
    changed = pb.Manifest.FromString(held.snapshot.signed.payload)
    fill(changed)
    return sign(EVE, "manifest", RUN, changed)


def fetcher() -> StateFetcher:
    """Return the fetcher that reads states."""
    settings: Any = SimpleNamespace(run_sha256=RUN, specs=SPECS, state_specs=state_specs(SPECS))
    return StateFetcher(SimpleNamespace(), SnapshotStore(), settings, lambda peer, error: None)  # type: ignore[arg-type]


def token_rows(number: int, salt: int) -> pb.Signed:
    """Return a state with `number` rows of tokens."""

    def fill(manifest: pb.Manifest) -> None:
        for peer in ids(number, salt):
            manifest.peer_tokens.add(peer=peer, tokens=1)
        manifest.run_tokens = number

    return state(fill)


def measure(what: str, make: Callable[[int], Any], read: Callable[[Any], Any]) -> None:
    """Print a row of the table."""
    longest_s, size_bytes = 0.0, 0
    for salt in range(3):
        message = make(salt)
        size_bytes = message.ByteSize() if hasattr(message, "ByteSize") else 0
        began_s = time.thread_time()
        outcome = "read"
        with contextlib.suppress(BadBytesError):
            try:
                read(message)
            except BadBytesError:
                outcome = "refused"
                raise
        longest_s = max(longest_s, time.thread_time() - began_s)
    print(f"| {what} | {size_bytes / 1024:,.0f} KiB | {outcome} | {longest_s * 1e3:.1f} ms |")


def many_tensors(manifest: pb.Manifest) -> None:
    for number in range(MOST_BYTES // 14):
        manifest.tensors.add(name=f"{number}", shape=[1], dtype="int8")


def long_shape(manifest: pb.Manifest) -> None:
    manifest.tensors[0].shape.extend([1] * (MOST_BYTES - 30_000))


def many_entered(salt: int) -> pb.Manifest:
    manifest = pb.Manifest()
    for peer in ids(MOST_BYTES // 44, salt):
        manifest.entered.add(peer=peer, round=1)
    return manifest


def many_coverage_rows(salt: int) -> Any:
    row = pb.ShardRow(corpus_sha256=bytes(32), tokens=[2**40] * 1024, on=1)
    rows = [sign(new_identity(), "coverage", RUN, row) for _ in range(20)]
    return SimpleNamespace(rows=rows, ByteSize=lambda: sum(each.ByteSize() for each in rows))


def roster(number: int, salt: int) -> pb.Signed:
    message = pb.Roster(round=1, attempt=0, base=bytes(32))
    for peer in sorted(ids(number, salt)):
        message.entries.add(peer=peer, snapshot_sha256=bytes(32), tokens=1, inner_steps=1)
    return sign(EVE, "roster", RUN, message)


def presences(salt: int) -> Any:
    """Return all presences that a greeting may name."""
    address = "/ip6/2001:db8:1234:5678:9abc:def0:1234:5678/tcp/31337"
    found = []
    for _ in range(64):
        identity = new_identity()
        info = PeerInfo(peer=identity.peer_id, name="n" * 64, stamp=1e9, addresses=(address,) * 16)
        found.append(sign(identity, "presence", RUN, presence_to_proto(info)))
    return SimpleNamespace(found=found, ByteSize=lambda: sum(each.ByteSize() for each in found))


def read_presences(message: Any) -> None:
    for signed in message.found:
        presence_from_proto_untrusted(*open_presence_untrusted(signed, RUN))


def bucket(salt: int) -> Any:
    """Return a full bucket of the DHT, of the largest allowed records: (key, subkey, value, expiry) of each."""
    key, found, expiry_s = hashed_key(bucket_key(bytes.fromhex(RUN), PRESENCE, "")), [], swarm_time() + 30
    for _ in range(MAX_BUCKET_RECORDS):
        identity = new_identity()
        info = PeerInfo(peer=identity.peer_id, name="n" * 64, stamp=1e9, addresses=("/ip4/203.0.113.7/tcp/31337",) * 16)
        record = pb.Record(run_sha256=bytes.fromhex(RUN), presence=presence_to_proto(info)).SerializeToString()
        value, subkey = msgpack.packb(record, use_bin_type=True), msgpack.packb(identity.peer_id, use_bin_type=True)
        found.append((key, subkey, RecordRules(identity).sign(key, subkey, value, expiry_s), expiry_s))
    return SimpleNamespace(found=found, ByteSize=lambda: sum(len(value) for _, _, value, _ in found))


def read_bucket(message: Any) -> None:
    """Read a bucket as a node that stores it does."""
    rules = RecordRules(EVE)
    for item in message.found:
        rules.check_untrusted(*item)


def settlement(salt: int) -> stages.StageQuestion:
    """Return a question that settles as many microbatches as it may name."""
    keys = [stages.MicrobatchKey(sequence=number, attempt=0, loss=1.0) for number in range(4096)]
    return stages.StageQuestion(
        kind=stages.STAGE_KIND_SETTLE, settlement=stages.Settlement(acknowledged=keys, oldest_open=1)
    )


def settle(question: stages.StageQuestion) -> None:
    """Read the question as a stage's peer does."""
    ledger = StageLedger(LedgerLimits(batch_tokens=1000))
    said = question.settlement
    keys = tuple(Acknowledged(Key("eve", key.sequence, key.attempt), key.loss) for key in said.acknowledged)
    ledger.settle("eve", Settlement(said.life, keys, (), said.oldest_open), 0.0)


def main() -> None:
    """Print the table."""
    shards = ShardsOf(run_sha256=RUN, corpus_sha256="00" * 32, num_shards=1024, seed=1, round_tokens=1)
    coverage = DataCoverage(
        EVE,
        shards,
        lambda peer, tokens: tokens,
        lambda *_: None,
        time.monotonic,
    )
    whole = fetcher()
    read_state = lambda signed: whole._state_untrusted(signed, EVE.peer_id, 0)  # noqa: E731
    print("| message | size | outcome | the loop stands still |\n|---|---|---|---|")
    measure("a state, 44,000 rows of tokens", lambda salt: token_rows(44_000, salt), read_state)
    measure("a state, 16,384 rows of tokens", lambda salt: token_rows(16_384, salt + 9), read_state)
    measure("a state, 4,096 rows of tokens", lambda salt: token_rows(4096, salt + 19), read_state)
    measure("a manifest, as many tensors as fit", lambda _: state(many_tensors), read_state)
    measure("a manifest, a shape as long as fits", lambda _: state(long_shape), read_state)
    measure("a server's manifest, as many `entered` as fit", many_entered,
            lambda manifest: entered_round_untrusted(manifest, EVE.peer_id))  # fmt: skip
    measure("rows of coverage, 20 of 1,024 shards", many_coverage_rows,
            lambda message: coverage.receive_untrusted(EVE.peer_id, message.rows))  # fmt: skip
    measure("a roster of 4,096", lambda salt: roster(4096, salt), lambda it: roster_untrusted(it, RUN, 10))
    measure("a roster as large as fits", lambda salt: roster(24_000, salt), lambda it: roster_untrusted(it, RUN, 10))
    measure("64 presences of others", presences, read_presences)
    measure("a bucket of the DHT, 128 records", bucket, read_bucket)
    measure("a settlement of 4,096 microbatches", settlement, settle)
    kinds = pb.SNAPSHOT_KIND_STATE
    measure("a forged manifest of 2 MiB", lambda salt: pb.Signed(payload=bytes(MOST_BYTES), author=peer_bytes(
        EVE.peer_id), signature=bytes(64)), lambda it: manifest_untrusted(it, RUN, kinds, SPECS))  # fmt: skip


if __name__ == "__main__":
    main()
