"""Encode, sign and verify presence and progress records for the DHT.

A DHT value is msgpack(bytes of a `Record`) followed by a 64-byte signature over (run, key, subkey, value, expiry). The
validator runs on every node that stores or returns a record. It recomputes the key from the record's own run, kind and
bucket, so a record can live only where it belongs, and drops records that are forged, oversized or expired. Dropped
records are counted by reason: "oversized", "expired", "malformed", "foreign", "forged". hivemind's own storage has no
bounds; `bound_storage` adds some, since identities cost a stranger nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Container
from dataclasses import dataclass, field
from typing import Any

import msgpack
from google.protobuf.message import DecodeError

from swarmtrain.errors import BadBytesError
from swarmtrain.network.daemon import hivemind_module, swarm_time
from swarmtrain.network.identity import (
    Identity,
    base58_decode,
    open_signed_untrusted,
    peer_bytes,
    peer_id_from_bytes_untrusted,
    verify_untrusted,
)
from swarmtrain.protocol.membership.budgets import may_dial
from swarmtrain.protocol.membership.hosts import MAX_HOSTS
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.membership.records import MAX_DEPTH, bucket_of
from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.rounds.roles import LinkRates
from swarmtrain.run_adapter import MOST_GROUPS
from swarmtrain.v1 import snapshot_pb2 as pb

PRESENCE = "presence"
PROGRESS = "progress"
MAX_RECORD_BYTES = 1024
MAX_LOSS = 1000.0
"""Most nats per token that a presence may claim: guessing a vocabulary of a million blindly costs 14."""
MAX_NAME = 64
"""Characters of a peer's name."""
MAX_DEVICE = 32
"""Characters of the device that a presence names."""
_SIGNATURE_BYTES = 64
_MAX_CHECKED = 1024
"""Valid records remembered, so that each is verified once: 2 MB at most."""
_MAX_LIFETIME_S = 2 * 86_400
_MAX_PRESENCE_S = 3600 + 60
"""Longest life of a presence: an hour, the most that a run may set, and a minute for differing clocks."""
# A renewal that advances the expiry by less is refused: each one stays in hivemind's heap until it expires.
_MIN_ADVANCE_S = 0.5
_MAX_BUCKETS = 512  # kept by one node; one of its own run is kept even if there are more
MAX_BUCKET_RECORDS = 128
MAX_BUCKET_BYTES = MAX_BUCKET_RECORDS * (MAX_RECORD_BYTES + 256)
"""Bytes of a full bucket, with signatures, PeerIDs and expiries."""
_MAX_ADDRESSES = 16
_MAX_PRESENCE_BYTES = 2048
MAX_KEPT = 16  # stages of which a peer advertises checkpoints
_MAX_STAGES = 512
_MIN_BYTES_PER_S, _MAX_BYTES_PER_S = 1.0, 1e12  # of a link that is known
_ADDRESS = re.compile(r"/[!-~]{1,254}")
_PURPOSE = b"swarmtrain record v1\0"


def bucket_key(run_sha256: bytes, kind: str, prefix: str) -> str:
    """Return the DHT key of a bucket."""
    return f"swarmtrain/{run_sha256.hex()}/{kind}/{prefix}"


def hashed_key(key: str) -> bytes:
    """Return the 20 bytes under which hivemind stores a key."""
    return hashlib.sha1(msgpack.packb(key, use_bin_type=True)).digest()


def presence_to_proto(info: PeerInfo) -> pb.Presence:
    """Return the message that advertises a peer."""
    return pb.Presence(
        role=pb.ROLE_BOOTSTRAP if info.is_bootstrap else pb.ROLE_VOLUNTEER,
        name=info.name,
        stamp=info.stamp,
        round=info.round,
        inner_steps=info.inner_steps,
        inner_steps_done=info.inner_steps_done,
        steps_per_s=info.steps_per_s,
        loss=info.loss,
        adapter_groups=info.adapter_groups,
        device=info.device[:MAX_DEVICE],
        addresses=info.addresses,
        corpus_sha256=bytes.fromhex(info.corpus_sha256),
        training=info.training,
        run_tokens=info.run_tokens,
        part=info.part,
        part_tokens=info.part_tokens,
        settled=info.is_finished,
        hidden=info.hidden,
        hosts=map(peer_bytes, info.hosts),
        place=None if info.place is None else place_to_proto(info.place),
        link=None if info.link is None else pb.Link(**_rates(info.link)),
    )


def _rates(link: LinkRates) -> dict[str, float]:
    """Return the rates that are told: a slower one than others accept is the slowest, a faster one the fastest."""
    up, down = (
        min(max(rate, _MIN_BYTES_PER_S), _MAX_BYTES_PER_S) if rate > 0 else 0.0
        for rate in (link.up_bytes_per_s, link.down_bytes_per_s)
    )
    return {"up_bytes_per_s": up, "down_bytes_per_s": down}


def place_to_proto(place: StagePeer) -> pb.Place:
    """Return the message that advertises a peer's place in a pipeline."""
    return pb.Place(
        stages=place.stages,
        moving_to=place.moving_to,
        bound=place.bound,
        tokens_per_s=place.tokens_per_s,
        most_stages=place.most_stages,
        move_s=place.move_s,
        queue=place.queue,
        flow_tokens_per_s=place.flow_tokens_per_s,
        kept=[stage for stage, _ in place.kept],
        kept_rounds=[round for _, round in place.kept],
    )


def place_from_proto_untrusted(peer: str, message: pb.Place, stamp: float) -> StagePeer:
    """Return the place in a pipeline that `peer` advertises. Raises BadBytesError if a field is out of range."""
    lists = message.stages, message.moving_to, message.bound
    if any(len(each) > _MAX_STAGES or list(each) != sorted(set(each)) for each in lists):
        raise BadBytesError("a presence with stages that are not in ascending order", code="bad-presence")
    num_kept = len(message.kept)
    if num_kept > MAX_KEPT or len(set(message.kept)) < num_kept or len(message.kept_rounds) != num_kept:
        raise BadBytesError("a presence with checkpoints of too many stages", code="bad-presence")
    known = all(stage < _MAX_STAGES for each in (*lists, message.kept) for stage in each)
    if not known or not 1 <= message.most_stages <= _MAX_STAGES:
        raise BadBytesError("a presence with a stage number out of range", code="bad-presence")
    numbers = message.tokens_per_s, message.move_s, message.queue, message.flow_tokens_per_s
    if not all(0 <= number < 1e12 for number in numbers):  # false for NaN too
        raise BadBytesError("a presence with the speed of a stage out of range", code="bad-presence")
    return StagePeer(
        peer=peer,
        stages=tuple(message.stages),
        moving_to=tuple(message.moving_to),
        bound=tuple(message.bound),
        tokens_per_s=message.tokens_per_s,
        most_stages=message.most_stages,
        move_s=message.move_s,
        queue=message.queue,
        flow_tokens_per_s=message.flow_tokens_per_s,
        kept=tuple(zip(message.kept, message.kept_rounds, strict=True)),
        seen_s=stamp,
    )


def open_presence_untrusted(signed: pb.Signed, run_sha256: str) -> tuple[str, pb.Presence]:
    """Return (author's PeerID, presence). Raises BadBytesError if it is oversized, forged, or no presence."""
    return open_signed_untrusted(signed, PRESENCE, run_sha256, pb.Presence, _MAX_PRESENCE_BYTES)


def presence_from_proto_untrusted(peer: str, message: pb.Presence, given: Collection[str] = ()) -> PeerInfo:
    """Return what `peer` advertises, without the addresses that may not be dialled.

    Its addresses are kept and put into invites, so only those that `may_dial` allows, or that the user gave (`given`,
    which may be names), pass. Raises BadBytesError if a field is out of range.
    """
    speed = message.steps_per_s
    if not (0 <= speed < 1e9) or not (0 <= message.stamp < 1e12):
        raise BadBytesError("a presence with a speed or stamp out of range", code="bad-presence")
    if not 0 <= message.loss <= MAX_LOSS:  # false for NaN too
        raise BadBytesError("a presence with a loss out of range", code="bad-presence")
    if len(message.name) > MAX_NAME or not message.name.isprintable():
        raise BadBytesError("a presence with an unprintable or long name", code="bad-presence")
    if len(message.device) > MAX_DEVICE or not message.device.isprintable():
        raise BadBytesError("a presence with an unprintable or long device", code="bad-presence")
    if len(message.addresses) > _MAX_ADDRESSES or not all(map(_ADDRESS.fullmatch, message.addresses)):
        raise BadBytesError("a presence with too many or malformed addresses", code="bad-presence")
    if len(message.corpus_sha256) not in (0, 32) or max(message.run_tokens, message.part_tokens) >= 2**60:
        raise BadBytesError("a presence with a field out of range", code="bad-presence")
    if len(message.hosts) > MAX_HOSTS:
        raise BadBytesError("a presence with too many hosts", code="bad-presence")
    if message.round >= 2**40 or message.part >= 2**16 or message.adapter_groups > MOST_GROUPS:
        raise BadBytesError("a presence with a field out of range", code="bad-presence")
    place = None
    if message.HasField("place"):
        place = place_from_proto_untrusted(peer, message.place, message.stamp)
    link = None
    if message.HasField("link"):
        link = LinkRates(message.link.up_bytes_per_s, message.link.down_bytes_per_s, not message.hidden)
        told = (message.link.up_bytes_per_s, message.link.down_bytes_per_s)
        if not all(rate == 0 or _MIN_BYTES_PER_S <= rate <= _MAX_BYTES_PER_S for rate in told):  # false for NaN too
            raise BadBytesError("a presence with the rate of a link out of range", code="bad-presence")
    return PeerInfo(
        peer=peer,
        name=message.name,
        stamp=message.stamp,
        is_bootstrap=message.role == pb.ROLE_BOOTSTRAP,
        training=message.training,
        round=message.round,
        part=message.part,
        part_tokens=message.part_tokens,
        is_finished=message.settled,
        inner_steps=message.inner_steps,
        inner_steps_done=message.inner_steps_done,
        steps_per_s=speed,
        loss=message.loss,
        adapter_groups=message.adapter_groups,
        device=message.device,
        run_tokens=message.run_tokens,
        addresses=tuple(address for address in message.addresses if address in given or may_dial(address)),
        hidden=message.hidden,
        hosts=tuple(dict.fromkeys(map(peer_id_from_bytes_untrusted, message.hosts))),
        corpus_sha256=message.corpus_sha256.hex(),
        place=place,
        link=link,
    )


def progress_to_proto(tokens: int, round: int, stage: int = 0, name: str = "") -> pb.Progress:
    """Return the message that says how many tokens a peer has trained on, its round at that time, and its name."""
    return pb.Progress(stage=stage, tokens=tokens, round=round, name=name)


def progress_from_proto_untrusted(message: pb.Progress, num_stages: int = 1) -> tuple[int, int]:
    """Return (stage, tokens) of a progress record. Raises BadBytesError if a field is out of range."""
    if message.stage >= num_stages:
        raise BadBytesError(
            f"a progress record of stage {message.stage}, where the run has {num_stages} stages", code="bad-number"
        )
    if message.tokens >= 2**60 or message.round >= 2**40:
        raise BadBytesError("a progress record with a field out of range", code="bad-number")
    if len(message.name) > MAX_NAME or not message.name.isprintable():
        raise BadBytesError("a progress record with an unprintable or long name", code="bad-number")
    return message.stage, message.tokens


def _message(key: bytes, subkey: bytes, value: bytes, expiry_s: float) -> bytes:
    parts = (key, subkey, value, repr(float(expiry_s)).encode())
    return _PURPOSE + b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def unsigned_untrusted(value: bytes) -> bytes:
    """Return the signed payload of a stored value, or b"" if it has no valid form."""
    with contextlib.suppress(BadBytesError):
        payload = _unpack_untrusted(value[:-_SIGNATURE_BYTES], "its value")
        return payload if isinstance(payload, bytes) else b""
    return b""


def record_from_value_untrusted(value: bytes) -> pb.Record:
    """Return the record inside a stored value without its signature. Raises BadBytesError if it cannot be read."""
    payload = _unpack_untrusted(value, "its value")
    if not isinstance(payload, bytes):
        raise BadBytesError("malformed: its value is not bytes", code="bad-format")
    try:
        return pb.Record.FromString(payload)
    except DecodeError as error:
        raise BadBytesError("malformed: its value is not a record", code="bad-format") from error


def _unpack_untrusted(data: bytes, what: str) -> Any:
    """Return one msgpack string or bytes: nothing that nests, or could take more memory than `data`."""
    if len(data) > MAX_RECORD_BYTES + 8:
        raise BadBytesError(f"oversized: {len(data)} bytes", code="bad-size")
    try:
        return msgpack.unpackb(data, raw=False, max_array_len=0, max_map_len=0, max_ext_len=0)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise BadBytesError(f"malformed: {what} is not msgpack", code="bad-format") from error


@dataclass
class RecordRules:
    """Signs this peer's records and checks all others; counts refused records by reason."""

    identity: Identity
    refused: Counter[str] = field(default_factory=Counter)

    def sign(self, key: bytes, subkey: bytes, value: bytes, expiry_s: float) -> bytes:
        """Return the value with this peer's signature appended, or unchanged if the subkey is another peer's."""
        if subkey != msgpack.packb(self.identity.peer_id, use_bin_type=True):
            return value
        return value + self.identity.sign(_message(key, subkey, value, expiry_s))

    def check_untrusted(self, key: bytes, subkey: bytes, value: bytes, expiry_s: float) -> pb.Record:
        """Return the record if it is valid for this key, subkey and expiry. Raises BadBytesError ("reason: detail")
        otherwise."""
        if not isinstance(value, bytes):
            raise BadBytesError("malformed: its value is not bytes", code="bad-format")
        if len(value) > MAX_RECORD_BYTES + _SIGNATURE_BYTES:
            raise BadBytesError(f"oversized: {len(value)} bytes", code="bad-size")
        now = swarm_time()
        if not (now - 60 < expiry_s < now + _MAX_LIFETIME_S):
            raise BadBytesError("expired: it has expired, or its lifetime is too long", code="bad-time")
        _check_signed_untrusted(key, subkey, value, expiry_s)
        record = record_from_value_untrusted(value[:-_SIGNATURE_BYTES])
        if record.HasField(PRESENCE) and expiry_s >= now + _MAX_PRESENCE_S:
            raise BadBytesError(
                "expired: it has expired, or its lifetime is too long for a presence", code="bad-presence"
            )
        return record

    def allows(self, key: bytes, subkey: bytes, value: bytes, expiry_s: float) -> bool:
        """Return whether the record is allowed; count it by reason if not."""
        try:
            self.check_untrusted(key, subkey, value, expiry_s)
        except BadBytesError as error:
            self.refused[str(error).partition(":")[0]] += 1
            return False
        return True


@functools.lru_cache(_MAX_CHECKED)
def _check_signed_untrusted(key: bytes, subkey: bytes, value: bytes, expiry_s: float) -> None:
    """Check what does not change with time: form, place and signature. Raises BadBytesError if any is wrong.

    A bucket is read from many nodes that all send the same records. Verifying each every time took three quarters of
    the network thread's time in a swarm of 24 (decision 33), so valid ones are remembered. lru_cache keeps no
    exceptions.
    """
    record = record_from_value_untrusted(value[:-_SIGNATURE_BYTES])
    peer = _subkey_peer_untrusted(subkey)
    kind = record.WhichOneof("body")
    if kind is None or len(record.run_sha256) != 32:
        raise BadBytesError("malformed: without a body or a run", code="bad-format")
    if not bucket_of(peer, MAX_DEPTH).startswith(record.prefix) or key != hashed_key(
        bucket_key(record.run_sha256, kind, record.prefix)
    ):
        raise BadBytesError("foreign: it does not belong under its key", code="bad-sender")
    message = _message(key, subkey, value[:-_SIGNATURE_BYTES], expiry_s)
    try:
        verify_untrusted(peer_bytes(peer), message, value[-_SIGNATURE_BYTES:])
    except BadBytesError:
        raise BadBytesError(f"forged: the signature is not {peer}'s", code="bad-signature") from None


def _subkey_peer_untrusted(subkey: bytes) -> str:
    text = _unpack_untrusted(subkey[:128], "its subkey")
    try:
        if isinstance(text, str) and peer_id_from_bytes_untrusted(base58_decode(text)) == text:
            return text
    except (BadBytesError, ValueError):
        pass
    raise BadBytesError("malformed: its subkey is not a PeerID", code="bad-format")


def make_validator(rules: RecordRules) -> Any:
    """Return `rules` as hivemind's validator."""
    base = hivemind_module("dht.validation").RecordValidatorBase

    class Validator(base):  # type: ignore[misc, valid-type]
        def validate(self, record: Any) -> bool:
            return rules.allows(record.key, record.subkey, record.value, record.expiration_time)

        def sign_value(self, record: Any) -> bytes:
            return rules.sign(record.key, record.subkey, record.value, record.expiration_time)

        def strip_value(self, record: Any) -> bytes:
            return bytes(record.value[:-_SIGNATURE_BYTES])

    return Validator()


def bound_storage(storage: Any, always: Container[bytes]) -> None:
    """Bound hivemind's dictionary storage: number of buckets, records in each, and how often a record is renewed.

    A renewal that hardly extends the expiry is refused, because each one leaves an entry in hivemind's heap until it
    expires. Buckets whose keys are in `always`, those of this peer's run, are kept however full the storage is.
    """
    plain = storage.store_subkey

    def store_subkey(key: Any, subkey: Any, value: bytes, expiration_time: float) -> bool:
        bucket = storage.get(key)
        if bucket is None and len(storage.data) >= _MAX_BUCKETS and key.to_bytes() not in always:
            return False
        if bucket is not None and not _takes(bucket.value, subkey, expiration_time):
            return False
        stored = bool(plain(key, subkey, value, expiration_time))
        if bucket is None and stored:
            _bound_bucket(storage.get(key).value)
        return stored

    storage.store_subkey = store_subkey


def _takes(bucket: Any, subkey: Any, expiration_time: float) -> bool:
    held = bucket.get(subkey)
    if held is None:
        return len(bucket.data) < MAX_BUCKET_RECORDS
    return bool(expiration_time >= held.expiration_time + _MIN_ADVANCE_S)


def _bound_bucket(bucket: Any) -> None:
    """Bound one bucket's own `store`: hivemind's search puts other nodes' answers directly into the bucket
    kept here."""
    plain = bucket.store

    def store(subkey: Any, value: bytes, expiration_time: float) -> bool:
        return _takes(bucket, subkey, expiration_time) and bool(plain(subkey, value, expiration_time))

    bucket.store = store


def num_records(storage: Any) -> int:
    """Return the number of records in hivemind's storage, expired ones that it has not purged included.

    May be called from any thread.
    """
    buckets = [bucket.value for bucket in list(storage.data.values())]
    return sum(len(getattr(bucket, "data", (bucket,))) for bucket in buckets)
