"""Signed messages and DHT records: what is stored and believed, and what is refused and counted."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from codes import raises_code
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.errors import BadBytesError
from swarmtrain.network.daemon import hivemind_module, set_clock_offset, swarm_time
from swarmtrain.network.discovery import records
from swarmtrain.network.discovery.records import (
    MAX_RECORD_BYTES,
    PRESENCE,
    PROGRESS,
    RecordRules,
    bound_storage,
    bucket_key,
    hashed_key,
    make_validator,
    place_from_proto_untrusted,
    place_to_proto,
    presence_from_proto_untrusted,
    presence_to_proto,
    record_from_value_untrusted,
)
from swarmtrain.network.identity import Identity, new_identity, open_signed_untrusted, payload_sha256, peer_bytes, sign
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.membership.records import bucket_of
from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.rounds.roles import LinkRates
from swarmtrain.v1 import snapshot_pb2 as pb

RUN = hashlib.sha256(b"a run").digest()
ME, OTHER = new_identity(b"m" * 32), new_identity(b"o" * 32)
REASONS = {"oversized", "expired", "malformed", "foreign", "forged"}


def packed(value: Any) -> bytes:
    return bytes(msgpack.packb(value, use_bin_type=True))


def presence_record(prefix: str = "", run: bytes = RUN, name: str = "someone") -> bytes:
    return pb.Record(run_sha256=run, prefix=prefix, presence=pb.Presence(name=name)).SerializeToString()


def stored(
    payload: bytes | None = None, *, by: Identity = ME, key: str | None = None, lifetime_s: float = 30.0
) -> tuple[bytes, bytes, bytes, float]:
    """(key, subkey, signed value, expiry) as another node receives them."""
    hashed = hashed_key(bucket_key(RUN, PRESENCE, "") if key is None else key)
    subkey, value = packed(by.peer_id), packed(presence_record() if payload is None else payload)
    expiry_s = swarm_time() + lifetime_s
    return hashed, subkey, RecordRules(by).sign(hashed, subkey, value, expiry_s), expiry_s


def refused(*record: Any) -> str:
    """Return the reason why another peer refuses this record."""
    rules = RecordRules(OTHER)
    assert not rules.allows(*record)
    assert sum(rules.refused.values()) == 1
    (reason,) = rules.refused
    assert reason in REASONS
    return reason


# ---------------------------------------------------------------- signatures


def test_a_signature_is_bound_to_purpose_run_and_payload() -> None:
    run, other_run = RUN.hex(), hashlib.sha256(b"another").hexdigest()
    signed = sign(ME, "roster", run, pb.Roster(round=7))
    assert open_signed_untrusted(signed, "roster", run, pb.Roster) == (ME.peer_id, pb.Roster(round=7))
    with pytest.raises(BadBytesError):
        open_signed_untrusted(signed, "manifest", run, pb.Roster)
    with pytest.raises(BadBytesError):
        open_signed_untrusted(signed, "roster", other_run, pb.Roster)
    altered = pb.Signed(
        payload=pb.Roster(round=8).SerializeToString(), author=signed.author, signature=signed.signature
    )
    with pytest.raises(BadBytesError):
        open_signed_untrusted(altered, "roster", run, pb.Roster)
    assert payload_sha256(altered) != payload_sha256(signed)


def test_a_signed_message_that_is_long_or_no_message_is_refused() -> None:
    signed = sign(ME, "roster", RUN.hex(), pb.Presence(name="x" * 100))
    with raises_code("bad-size", BadBytesError, "50"):
        open_signed_untrusted(signed, "roster", RUN.hex(), pb.Presence, max_bytes=50)
    nonsense = b"\xff" * 20
    signature = ME.sign(b"swarmtrain roster v1\0" + RUN + nonsense)
    with raises_code("bad-format", BadBytesError):
        open_signed_untrusted(
            pb.Signed(payload=nonsense, author=signed.author, signature=signature), "roster", RUN.hex(), pb.Roster
        )


@given(st.binary(max_size=80), st.binary(max_size=80), st.binary(max_size=80))
def test_random_signed_messages_raise_one_error_only(payload: bytes, author: bytes, signature: bytes) -> None:
    with pytest.raises(BadBytesError):
        open_signed_untrusted(
            pb.Signed(payload=payload, author=author, signature=signature), "roster", RUN.hex(), pb.Roster
        )


# ---------------------------------------------------------------- records


def test_an_own_record_is_stored_and_read() -> None:
    key, subkey, value, expiry_s = stored()
    record = RecordRules(OTHER).check_untrusted(key, subkey, value, expiry_s)
    assert record.presence.name == "someone"
    assert record_from_value_untrusted(value[:-64]) == record


def test_a_record_of_every_bucket_on_the_way_is_allowed() -> None:
    for depth in (1, 5, 24):
        prefix = bucket_of(ME.peer_id, depth)
        record = stored(presence_record(prefix), key=bucket_key(RUN, PRESENCE, prefix))
        assert RecordRules(OTHER).allows(*record)


def test_nobody_signs_for_another() -> None:
    value = RecordRules(ME).sign(b"key", packed(OTHER.peer_id), b"value", 1.0)
    assert value == b"value"


def test_a_forged_record_is_refused() -> None:
    key, subkey, value, expiry_s = stored()
    assert refused(key, packed(new_identity().peer_id), value, expiry_s) == "forged"
    assert refused(key, subkey, value, expiry_s + 1) == "forged", "the expiry is signed too"
    assert refused(key, subkey, value[:-1] + bytes([value[-1] ^ 1]), expiry_s) == "forged"
    assert refused(key, subkey, packed(presence_record(name="mallory")) + value[-64:], expiry_s) == "forged"


def test_a_record_under_a_foreign_key_is_refused() -> None:
    wrong_side = "1" if bucket_of(ME.peer_id, 1) == "0" else "0"
    for key, payload in [
        (bucket_key(RUN, PROGRESS, ""), presence_record()),
        (bucket_key(RUN, PRESENCE, "0"), presence_record()),
        (bucket_key(b"r" * 32, PRESENCE, ""), presence_record()),
        ("something else", presence_record()),
        (bucket_key(RUN, PRESENCE, wrong_side), presence_record(wrong_side)),
        (bucket_key(RUN, PRESENCE, "x"), presence_record("x")),
        (bucket_key(RUN, PRESENCE, "0" * 30), presence_record("0" * 30)),
    ]:
        assert refused(*stored(payload, key=key)) == "foreign"


def test_an_oversized_record_is_refused_before_it_is_read() -> None:
    assert refused(*stored(presence_record(name="x" * MAX_RECORD_BYTES))) == "oversized"
    key, subkey, _, expiry_s = stored()
    assert refused(key, subkey, bytes(10_000_000), expiry_s) == "oversized"
    fits = stored(presence_record(name="x" * 900))
    assert RecordRules(OTHER).allows(*fits)


@pytest.mark.parametrize("lifetime_s", [-61.0, 3 * 86_400.0, math.inf, -math.inf, math.nan])
def test_an_expired_or_too_long_lived_record_is_refused(lifetime_s: float) -> None:
    assert refused(*stored(lifetime_s=lifetime_s)) == "expired"


def test_progress_is_kept_for_a_day_and_a_presence_for_an_hour() -> None:
    payload = pb.Record(run_sha256=RUN, progress=pb.Progress(tokens=1)).SerializeToString()
    assert RecordRules(OTHER).allows(*stored(payload, key=bucket_key(RUN, PROGRESS, ""), lifetime_s=86_400.0))
    assert RecordRules(OTHER).allows(*stored(lifetime_s=3600.0))
    assert refused(*stored(lifetime_s=3700.0)) == "expired"


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"short",
        packed("text") + bytes(64),
        packed([1, 2]) + bytes(64),
        packed({"a": 1}) + bytes(64),
        packed(msgpack.ExtType(5, b"x")) + bytes(64),
        packed(None) + bytes(64),
        packed(b"\xff\xff") + bytes(64),
        packed(b"") + bytes(64),
        packed(b"x") + b"more" + bytes(64),
        b"\xc6\xff\xff\xff\xff" + bytes(64),
        b"\x91" * 900 + bytes(64),
    ],
)
def test_malformed_values_are_refused(value: bytes) -> None:
    key, subkey, _, expiry_s = stored()
    assert refused(key, subkey, value, expiry_s) == "malformed"


@pytest.mark.parametrize(
    "subkey",
    [
        b"",
        packed(None),
        packed(b"bytes"),
        packed("0"),
        packed("QmPlain"),
        packed("x" * 500),
        packed([ME.peer_id]),
        b"\xc1",
    ],
)
def test_a_subkey_that_is_no_peer_is_refused(subkey: bytes) -> None:
    key, _, value, expiry_s = stored()
    assert refused(key, subkey, value, expiry_s) == "malformed"


def test_a_record_without_a_body_is_refused() -> None:
    assert refused(*stored(pb.Record(run_sha256=RUN).SerializeToString())) == "malformed"
    assert refused(*stored(pb.Record(run_sha256=b"r", presence=pb.Presence()).SerializeToString())) == "malformed"


@given(st.binary(max_size=40), st.binary(max_size=60), st.binary(max_size=300), st.floats())
def test_random_bytes_raise_nothing_but_bad_bytes(key: bytes, subkey: bytes, value: bytes, expiry_s: float) -> None:
    rules = RecordRules(OTHER)
    for expiry in (expiry_s, swarm_time() + 5):
        assert not rules.allows(key, subkey, value, expiry)
        assert not rules.allows(key, packed(ME.peer_id), packed(value) + bytes(64), expiry)
    assert set(rules.refused) <= REASONS, "a stranger cannot make the table of reasons grow"


def test_hivemind_keeps_a_bucket_under_the_key_that_is_checked() -> None:
    key = bucket_key(RUN, PRESENCE, "01")
    assert hivemind_module("dht.routing").DHTID.generate(key).to_bytes() == hashed_key(key)


def test_the_validator_signs_strips_and_checks() -> None:
    record_type = hivemind_module("dht.crypto").DHTRecord
    mine, theirs = make_validator(RecordRules(ME)), make_validator(RecordRules(OTHER))
    key, subkey, signed, expiry_s = stored()
    plain = record_type(key, subkey, signed[:-64], expiry_s)
    full = record_type(key, subkey, mine.sign_value(plain), expiry_s)
    assert theirs.validate(full) and not theirs.validate(plain)
    assert theirs.strip_value(full) == signed[:-64]


# ---------------------------------------------------------------- presence


def test_presence_round_trip() -> None:
    info = PeerInfo(
        peer=ME.peer_id,
        name="Zoë's machine",
        stamp=1.5,
        training=True,
        round=3,
        inner_steps=40,
        inner_steps_done=7,
        steps_per_s=2.5,
        loss=2.25,
        run_tokens=1000,
        addresses=("/ip4/1.2.3.4/tcp/5",),
        corpus_sha256="ab" * 32,
    )
    assert presence_from_proto_untrusted(ME.peer_id, presence_to_proto(info)) == info
    hidden = PeerInfo(peer=ME.peer_id, stamp=1.5, hidden=True, hosts=(OTHER.peer_id, new_identity().peer_id))
    assert presence_from_proto_untrusted(ME.peer_id, presence_to_proto(hidden)) == hidden


@pytest.mark.parametrize(
    ("rates", "told"), [((1e7, 0.0), (1e7, 0.0)), ((1e-310, 0.5), (1.0, 1.0)), ((2e12, 1.0), (1e12, 1.0))]
)
def test_a_link_is_told_at_a_rate_that_others_believe(rates: tuple[float, float], told: tuple[float, float]) -> None:
    message = presence_to_proto(PeerInfo(peer=ME.peer_id, link=LinkRates(*rates)))
    assert presence_from_proto_untrusted(ME.peer_id, message).link == LinkRates(*told)


def test_addresses_that_nobody_may_dial_are_not_kept() -> None:
    """They would go into others' invites and folders."""
    message = pb.Presence(addresses=["/x", "/ip4/1.2.3.4/tcp/5", "/dns4/a.org/tcp/7", "/dns4/b.org/tcp/7"])
    assert presence_from_proto_untrusted(ME.peer_id, message).addresses == ("/ip4/1.2.3.4/tcp/5",)
    given = presence_from_proto_untrusted(ME.peer_id, message, ["/dns4/b.org/tcp/7", "/dns4/c.org/tcp/7"])
    assert given.addresses == ("/ip4/1.2.3.4/tcp/5", "/dns4/b.org/tcp/7"), "a name that the user gave, and it says too"


def test_a_presence_with_everything_fits_a_record() -> None:
    """A hidden peer has hosts and no address, another addresses and no host; here is more than either."""
    hosts = tuple(new_identity().peer_id for _ in range(4))
    addresses = tuple(f"/ip4/203.0.113.{number}/tcp/31337" for number in range(8))
    numbers = {"round": 10**6, "part": 4, "part_tokens": 10**6, "run_tokens": 10**13}
    numbers |= {"inner_steps": 9999, "inner_steps_done": 999, "loss": 11}
    info = PeerInfo(peer=ME.peer_id, name="n" * 64, stamp=1.5e9, steps_per_s=2.5, corpus_sha256="ab" * 32,
                    hidden=True, hosts=hosts, addresses=addresses, **numbers)  # type: ignore[arg-type] # fmt: skip
    record = pb.Record(run_sha256=RUN, prefix="0" * 24, presence=presence_to_proto(info))
    assert record.ByteSize() < MAX_RECORD_BYTES - 64


@pytest.mark.parametrize(
    "fields",
    [
        {"steps_per_s": math.nan},
        {"steps_per_s": -1.0},
        {"steps_per_s": math.inf},
        {"loss": math.nan},
        {"loss": -1.0},
        {"loss": math.inf},
        {"loss": 1001.0},
        {"stamp": math.nan},
        {"stamp": 1e13},
        {"name": "x" * 65},
        {"name": "\x1b[2J"},
        {"name": "two\nlines"},
        {"addresses": ["/ip4/1.2.3.4/tcp/5"] * 17},
        {"addresses": ["/" + "x" * 300]},
        {"addresses": ["relative"]},
        {"addresses": ["/ip4/1.2.3.4/tcp/5\n"]},
        {"addresses": ["/\x1b[2J"]},
        {"corpus_sha256": b"short"},
        {"hosts": [b"no PeerID"]},
        {"hosts": [peer_bytes(ME.peer_id)] * 5},
        {"round": 2**40},
        {"run_tokens": 2**60},
        *({"link": pb.Link(up_bytes_per_s=rate)} for rate in (1e-310, 0.99, -1.0, 1.01e12, math.inf, math.nan)),
        {"link": pb.Link(up_bytes_per_s=1e6, down_bytes_per_s=1e-310)},
    ],
)
def test_a_presence_out_of_range_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(BadBytesError):
        presence_from_proto_untrusted(ME.peer_id, pb.Presence(**fields))


# ---------------------------------------------------------------- what a peer holds of a pipeline

PLACE = StagePeer(
    peer=ME.peer_id,
    stages=(0, 3, 511),
    moving_to=(1, 3),
    bound=(0,),
    tokens_per_s=1234.5,
    most_stages=4,
    move_s=12.25,
    queue=7.0,
    flow_tokens_per_s=1000.0,
    kept=((2, 5), (511, 2**40), (0, 7)),
    seen_s=1.5e9,
)


@pytest.mark.parametrize(
    "place",
    [
        PLACE,
        StagePeer(peer=ME.peer_id, stages=(), tokens_per_s=0.0, move_s=0.0, seen_s=1.5e9),
        StagePeer(peer=ME.peer_id, stages=tuple(range(512)), tokens_per_s=1.0, most_stages=512, seen_s=1.5e9),
    ],
    ids=["something of everything", "nothing yet", "all that there can be"],
)
def test_a_place_round_trip(place: StagePeer) -> None:
    data = place_to_proto(place).SerializeToString()
    assert place_from_proto_untrusted(ME.peer_id, pb.Place.FromString(data), 1.5e9) == place
    info = PeerInfo(peer=ME.peer_id, stamp=1.5e9, training=True, place=place)
    message = pb.Presence.FromString(presence_to_proto(info).SerializeToString())
    assert presence_from_proto_untrusted(ME.peer_id, message) == info


def test_a_place_is_its_authors_and_as_old_as_its_record() -> None:
    message = presence_to_proto(PeerInfo(peer=ME.peer_id, stamp=77.0, place=PLACE))
    place = presence_from_proto_untrusted(OTHER.peer_id, message).place
    assert place is not None and (place.peer, place.seen_s) == (OTHER.peer_id, 77.0)


_LISTS = ("stages", "moving_to", "bound")
_NUMBERS = ("tokens_per_s", "move_s", "queue", "flow_tokens_per_s")


@pytest.mark.parametrize(
    "fields",
    [
        *({"kept": stages, "kept_rounds": [1] * len(stages)} for stages in ([2, 2], [512], list(range(17)))),
        {"kept": [1, 2], "kept_rounds": [3]},
        {"kept_rounds": [3]},
        *({name: stages} for name in _LISTS for stages in ([1, 0], [2, 2], [512], [0, 2**32 - 1], list(range(513)))),
        *({name: [0] * 100_000} for name in _LISTS),
        *({name: number} for name in _NUMBERS for number in (math.nan, -1.0, math.inf, -math.inf, 1.1e12)),
        {"most_stages": 0},
        {"most_stages": 513},
        {"most_stages": 2**32 - 1},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_a_place_out_of_range_is_refused(fields: dict[str, Any]) -> None:
    message = pb.Place(**{"most_stages": 1} | fields)
    with pytest.raises(BadBytesError):
        place_from_proto_untrusted(ME.peer_id, message, 1.0)
    with pytest.raises(BadBytesError):
        presence_from_proto_untrusted(ME.peer_id, pb.Presence(place=message))


def test_a_place_of_which_nothing_is_said_is_refused() -> None:
    with raises_code("bad-presence", BadBytesError):
        presence_from_proto_untrusted(ME.peer_id, pb.Presence(place=pb.Place()))
    assert presence_from_proto_untrusted(ME.peer_id, pb.Presence()).place is None


@given(st.binary(max_size=80))
def test_random_places_are_in_range_or_one_error(data: bytes) -> None:
    try:
        message = pb.Place.FromString(data)
    except DecodeError:
        return
    try:
        place = place_from_proto_untrusted(ME.peer_id, message, 1.0)
    except BadBytesError:
        return
    for stages in (place.stages, place.moving_to, place.bound):
        assert stages == tuple(sorted(set(stages))) and all(0 <= stage < 512 for stage in stages)
    assert all(0 <= number < 1e12 for number in (place.tokens_per_s, place.move_s, place.queue))


def test_a_presence_with_everything_and_a_place_fits_a_record() -> None:
    hosts = tuple(new_identity().peer_id for _ in range(4))
    addresses = tuple(f"/ip4/203.0.113.{number}/tcp/31337" for number in range(8))
    numbers = {"round": 10**6, "part": 4, "part_tokens": 10**6, "inner_steps_done": 999, "run_tokens": 10**13}
    stages = tuple(range(500, 508))
    place = replace(PLACE, stages=stages, moving_to=stages, bound=stages, most_stages=512)
    info = PeerInfo(peer=ME.peer_id, name="n" * 64, stamp=1.5e9, steps_per_s=2.5, corpus_sha256="ab" * 32, place=place,
                    hidden=True, hosts=hosts, addresses=addresses, **numbers)  # type: ignore[arg-type] # fmt: skip
    record = pb.Record(run_sha256=RUN, prefix="0" * 24, presence=presence_to_proto(info))
    assert record.ByteSize() < MAX_RECORD_BYTES - 64


# ---------------------------------------------------------------- what strangers can make us keep


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(records, "_MAX_BUCKETS", 3)
    monkeypatch.setattr(records, "MAX_BUCKET_RECORDS", 2)
    return hivemind_module("dht.storage").DHTLocalStorage()


def dht_id(number: int) -> Any:
    return hivemind_module("dht.routing").DHTID(number)


def test_storage_takes_so_many_buckets_and_always_ours(storage: Any) -> None:
    ours = dht_id(99)
    bound_storage(storage, {ours.to_bytes()})
    expiry_s = swarm_time() + 100
    assert [storage.store(dht_id(i), b"v", expiry_s, subkey="a") for i in range(5)] == [True, True, True, False, False]
    assert storage.store(ours, b"v", expiry_s, subkey="a")
    assert storage.get(dht_id(4)) is None and storage.get(ours).value.get("a").value == b"v"


def test_a_bucket_takes_so_many_records_and_their_renewals(storage: Any) -> None:
    bound_storage(storage, set())
    expiry_s = swarm_time() + 100
    assert [storage.store(dht_id(1), b"v", expiry_s, subkey=name) for name in "abc"] == [True, True, False]
    assert storage.store(dht_id(1), b"w", expiry_s + 1, subkey="a")
    for _ in range(100):
        assert not storage.store(dht_id(1), b"w", expiry_s + 1, subkey="a"), "a replay"
        assert not storage.store(dht_id(1), b"w", expiry_s + 1.1, subkey="a"), "hardly newer"
    assert len(storage.get(dht_id(1)).value.expiration_heap) <= 3, "replays leave nothing behind"


def test_room_comes_back_when_records_expire(storage: Any) -> None:
    bound_storage(storage, set())
    assert storage.store(dht_id(1), b"v", swarm_time() + 5, subkey="a")
    assert storage.store(dht_id(1), b"v", swarm_time() + 5, subkey="b")
    try:
        set_clock_offset(10.0)
        assert storage.store(dht_id(1), b"v", swarm_time() + 5, subkey="c")
    finally:
        set_clock_offset(0.0)


def test_a_record_that_was_fine_is_not_verified_again_but_its_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket is read from several nodes, again and again: verifying was most of what a peer's network thread did."""
    verified: list[bytes] = []
    real = records.verify_untrusted
    monkeypatch.setattr(records, "verify_untrusted", lambda *given: verified.append(given[1]) or real(*given))
    record = stored(presence_record(name="once"))
    for _ in range(3):
        assert RecordRules(OTHER).allows(*record)
    assert len(verified) == 1
    forged = (*record[:2], record[2][:-1] + bytes([record[2][-1] ^ 1]), record[3])
    assert [refused(*forged) for _ in range(2)] == ["forged", "forged"] and len(verified) == 3
    monkeypatch.setattr(records, "swarm_time", lambda: record[3] + 100)
    assert refused(*record) == "expired"
