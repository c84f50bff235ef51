"""Tokens by peer in a manifest: few rows, and cheap to read."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest
import torch
from codes import raises_code
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.errors import BadBytesError
from swarmtrain.network import identity
from swarmtrain.network.asynchronous.server_link import entered_round_untrusted
from swarmtrain.network.asynchronous.state_fetcher import StateFetcher
from swarmtrain.network.codec import body_of
from swarmtrain.network.discovery.token_accounting import TokenAccounting
from swarmtrain.network.identity import base58_decode, base58_encode, new_identity, peer_bytes, sign
from swarmtrain.network.snapshots.state_provider import StateProvider, state_specs
from swarmtrain.network.snapshots.store import SnapshotStore, TensorSpec
from swarmtrain.network.token_rows import MAX_ROWS_READ, MAX_ROWS_TOLD, add_token_rows, check_token_rows_untrusted
from swarmtrain.peer.merging.consensus import counts_in_untrusted
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.protocol.tokens.tally import ALL_OTHERS, CountingRules
from swarmtrain.v1 import snapshot_pb2 as pb

RUN = "ab" * 32
EVE = new_identity(b"e" * 32)
SPECS = (TensorSpec("w", (4, 5)),)


def ids(number: int) -> list[bytes]:
    return [b"\x00\x24\x08\x01\x12\x20" + hashlib.sha256(b"%d" % each).digest() for each in range(number)]


def manifest_of(number: int) -> pb.Manifest:
    manifest = pb.Manifest(run_tokens=number)
    for peer in ids(number):
        manifest.peer_tokens.add(peer=peer, tokens=1)
    return manifest


def test_as_many_rows_as_fit_are_refused_and_none_is_turned_into_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """44,000 of them held the event loop up for a third of a second."""
    monkeypatch.setattr(identity, "base58_encode", lambda data: pytest.fail("turned into text"))
    with raises_code("bad-size", BadBytesError, "44000", "16384"):
        check_token_rows_untrusted(manifest_of(44_000))
    check_token_rows_untrusted(manifest_of(MAX_ROWS_READ))


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([(ids(1)[0], 2)], "bad-tokens"),
        ([(ids(1)[0], 1), (ids(1)[0], 1)], "bad-tokens"),
        ([(b"short", 3)], "bad-format"),
        ([(bytes(38), 3)], "bad-format"),
        ([], "bad-tokens"),
    ],
)
def test_rows_that_make_no_sense_are_refused(rows: list[tuple[bytes, int]], code: str) -> None:
    manifest = pb.Manifest(run_tokens=3, peer_tokens=[pb.PeerTokens(peer=peer, tokens=n) for peer, n in rows])
    with raises_code(code, BadBytesError):
        check_token_rows_untrusted(manifest)


def test_of_very_many_the_greatest_counts_are_told_and_the_rest_as_one_that_adds_up() -> None:
    counts = {base58_encode(peer): number for number, peer in enumerate(ids(10_000), 1)}
    for _ in range(2):  # who was told of nobody's row tells it on
        manifest = pb.Manifest(run_tokens=sum(counts.values()))
        add_token_rows(manifest, counts)
        check_token_rows_untrusted(manifest)
        told = {base58_encode(item.peer): item.tokens for item in manifest.peer_tokens}
        assert MAX_ROWS_TOLD - 1 <= len(manifest.peer_tokens) <= MAX_ROWS_TOLD
        assert sum(told.get(peer, 0) == tokens for peer, tokens in counts.items()) >= MAX_ROWS_TOLD - 2
        counts = told | {base58_encode(peer): 1 for peer in ids(20_000)[10_000:]}


def test_nobodys_row_is_of_no_key_that_anybody_made() -> None:
    assert peer_bytes(ALL_OTHERS)[-32:] == hashlib.sha256(b"swarmtrain: all others").digest()


def test_two_that_exchange_states_of_very_many_count_nobody_twice() -> None:
    counts = {base58_encode(peer): 1000 + number for number, peer in enumerate(ids(MAX_ROWS_TOLD + 900))}
    rules = CountingRules(began_s=0.0, burst_tokens=10**6, most_tokens=10**12)
    now = 1e6

    def who_knows_all() -> TokenAccounting:
        found = TokenAccounting("me", rules, AsyncMock(), lambda: {"fast": 1e5}, lambda: now, lambda *_: None)
        found.learn(counts)
        return found

    both = [who_knows_all(), who_knows_all()]
    for giver, taker in (both, both[::-1], both):
        manifest = pb.Manifest()
        add_token_rows(manifest, giver.contributions())
        now += 3600
        taker.adopt([counts_in_untrusted(manifest)] * 3)
        assert taker.total == sum(counts.values())


def test_few_rows_are_told_as_they_are() -> None:
    counts = {EVE.peer_id: 7, new_identity(b"f" * 32).peer_id: 0}
    manifest = pb.Manifest()
    add_token_rows(manifest, counts)
    assert [item.peer for item in manifest.peer_tokens] == sorted(map(peer_bytes, counts))
    assert sum(item.tokens for item in manifest.peer_tokens) == 7


def test_a_state_of_a_run_of_many_is_read_by_who_asks_for_it() -> None:
    counts = {base58_encode(peer): 5 for peer in ids(6000)}
    offer = StateProvider(EVE, RUN, state_specs(SPECS), SnapshotStore())
    held = offer._build(
        Progress(round=1, run_tokens=30_000, peer_tokens=counts),
        body_of(torch.zeros(20), torch.zeros(20)),
        lambda manifest: None,
    )
    settings: Any = SimpleNamespace(run_sha256=RUN, state_specs=state_specs(SPECS))
    calls: Any = SimpleNamespace()
    fetcher = StateFetcher(calls, SnapshotStore(), settings, lambda peer, error: None)
    assert fetcher._state_untrusted(held.snapshot.signed, EVE.peer_id, 0).snapshot.manifest.run_tokens == 30_000
    changed = pb.Manifest.FromString(held.snapshot.signed.payload)
    changed.run_tokens += 1
    with raises_code("bad-tokens", BadBytesError):
        fetcher._state_untrusted(sign(EVE, "manifest", RUN, changed), EVE.peer_id, 0)


def test_a_servers_manifest_tells_of_few_workers() -> None:
    manifest = pb.Manifest()
    for peer in ids(48_000):
        manifest.entered.add(peer=peer, round=1)
    with raises_code("bad-size", BadBytesError, "48000"):
        entered_round_untrusted(manifest, EVE.peer_id)
    few = pb.Manifest(entered=[pb.Entered(peer=peer_bytes(EVE.peer_id), round=9)])
    assert entered_round_untrusted(few, EVE.peer_id) == 9
    assert entered_round_untrusted(few, new_identity(b"f" * 32).peer_id) is None


@given(st.binary(max_size=64))
def test_base58_goes_there_and_back(data: bytes) -> None:
    text = base58_encode(data)
    assert base58_decode(text) == data
    number, digits = int.from_bytes(data, "big"), ""
    while number:
        number, rest = divmod(number, 58)
        digits = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"[rest] + digits
    assert text == "1" * (len(data) - len(data.lstrip(b"\0"))) + digits, "digit by digit"
