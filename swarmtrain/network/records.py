"""Presence and progress records as bytes: built, signed, checked.

A DHT value here is msgpack(bytes of a `Record`) followed by 64 bytes of signature over (run, key, subkey, value,
expiry). The validator runs on every node that stores or returns a record: it recomputes the key from the record's
own run, kind and bucket, so that a record can live nowhere but where it belongs, and drops what is forged,
oversized or expired. What it drops is counted by reason.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgpack
from google.protobuf.message import DecodeError

from swarmtrain.errors import BadBytesError
from swarmtrain.membership.lifecycle import PeerInfo
from swarmtrain.membership.records import bucket_of
from swarmtrain.network.daemon import hivemind_module, swarm_time
from swarmtrain.network.identity import (
    Identity,
    base58_decode,
    peer_bytes,
    peer_id_from_bytes_untrusted,
    verify_untrusted,
)
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = [
    "MAX_RECORD_BYTES",
    "PRESENCE",
    "PROGRESS",
    "RecordRules",
    "bucket_key",
    "make_validator",
    "presence_from_proto_untrusted",
    "presence_to_proto",
    "record_from_value_untrusted",
]

PRESENCE = "presence"
PROGRESS = "progress"
MAX_RECORD_BYTES = 1024
_SIGNATURE_BYTES = 64
_MAX_LIFETIME_S = 2 * 86_400
_PURPOSE = b"swarmtrain record v1\0"


def bucket_key(run_sha256: bytes, kind: str, prefix: str) -> str:
    """The DHT key of a bucket."""
    return f"swarmtrain/{run_sha256.hex()}/{kind}/{prefix}"


def _hashed_key(key: str) -> bytes:
    return hashlib.sha1(msgpack.packb(key, use_bin_type=True)).digest()


def presence_to_proto(info: PeerInfo) -> pb.Presence:
    """The wire form of what a peer says of itself."""
    return pb.Presence(
        role=pb.ROLE_BOOTSTRAP if info.is_bootstrap else pb.ROLE_VOLUNTEER,
        name=info.name,
        stamp=info.stamp,
        round=info.round,
        inner_steps_done=info.inner_steps_done,
        steps_per_s=info.steps_per_s,
        addresses=info.addresses,
        corpus_sha256=bytes.fromhex(info.corpus_sha256),
        training=info.training,
        run_tokens=info.run_tokens,
    )


def presence_from_proto_untrusted(peer: str, message: pb.Presence) -> PeerInfo:
    """What `peer` says of itself; BadBytesError if a field is out of its range."""
    speed = message.steps_per_s
    if not (0 <= speed < 1e9) or not (0 <= message.stamp < 1e12):
        raise BadBytesError("a presence with a speed or stamp out of range")
    if len(message.name) > 64 or not message.name.isprintable():
        raise BadBytesError("a presence with an unprintable or long name")
    if len(message.addresses) > 16 or any(len(a) > 256 or not a.startswith("/") for a in message.addresses):
        raise BadBytesError("a presence with too many or malformed addresses")
    if len(message.corpus_sha256) not in (0, 32) or message.round >= 2**40 or message.run_tokens >= 2**60:
        raise BadBytesError("a presence with a field out of range")
    return PeerInfo(
        peer=peer,
        name=message.name,
        stamp=message.stamp,
        is_bootstrap=message.role == pb.ROLE_BOOTSTRAP,
        training=message.training,
        round=message.round,
        inner_steps_done=message.inner_steps_done,
        steps_per_s=speed,
        run_tokens=message.run_tokens,
        addresses=tuple(message.addresses),
        corpus_sha256=message.corpus_sha256.hex(),
    )


def _message(key: bytes, subkey: bytes, value: bytes, expiry_s: float) -> bytes:
    parts = (key, subkey, value, repr(float(expiry_s)).encode())
    return _PURPOSE + b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def record_from_value_untrusted(value: bytes) -> pb.Record:
    """The record inside a stored value (without its signature)."""
    try:
        payload = msgpack.unpackb(value, raw=False, max_bin_len=MAX_RECORD_BYTES, max_str_len=0, max_array_len=0)
        if not isinstance(payload, bytes):
            raise BadBytesError("a record that is not bytes")
        return pb.Record.FromString(payload)
    except (DecodeError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise BadBytesError(f"a record that cannot be read ({error})") from error


@dataclass
class RecordRules:
    """Checks records; counts what it refuses, by reason."""

    identity: Identity
    refused: Counter[str] = field(default_factory=Counter)

    def sign(self, key: bytes, subkey: bytes, value: bytes, expiry_s: float) -> bytes:
        """The value with this peer's signature behind it, or as it is if the subkey is another's."""
        if subkey != msgpack.packb(self.identity.peer_id, use_bin_type=True):
            return value
        return value + self.identity.sign(_message(key, subkey, value, expiry_s))

    def check_untrusted(self, key: bytes, subkey: bytes, value: bytes, expiry_s: float) -> pb.Record:
        """The record; BadBytesError with the reason if it is not allowed to be stored or believed."""
        if len(value) > MAX_RECORD_BYTES + _SIGNATURE_BYTES + 8:
            raise BadBytesError(f"oversized record ({len(value)} bytes)")
        now = swarm_time()
        if not (now - 60 < expiry_s < now + _MAX_LIFETIME_S):
            raise BadBytesError("expired record, or one that lives too long")
        record = record_from_value_untrusted(value[:-_SIGNATURE_BYTES])
        peer = _subkey_peer_untrusted(subkey)
        kind = record.WhichOneof("body")
        if kind is None or len(record.run_sha256) != 32:
            raise BadBytesError("a record without a body or a run")
        if not bucket_of(peer, 24).startswith(record.prefix) or key != _hashed_key(
            bucket_key(record.run_sha256, kind, record.prefix)
        ):
            raise BadBytesError("foreign record: it does not belong under its key")
        message = _message(key, subkey, value[:-_SIGNATURE_BYTES], expiry_s)
        try:
            verify_untrusted(peer_bytes(peer), message, value[-_SIGNATURE_BYTES:])
        except BadBytesError:
            raise BadBytesError("forged record") from None
        return record

    def allows(self, key: bytes, subkey: bytes, value: bytes, expiry_s: float) -> bool:
        """Whether the record is fine; counted if not."""
        try:
            self.check_untrusted(key, subkey, value, expiry_s)
        except BadBytesError as error:
            self.refused[str(error)] += 1
            return False
        return True


def _subkey_peer_untrusted(subkey: bytes) -> str:
    try:
        text = msgpack.unpackb(subkey, raw=False, max_str_len=128, max_bin_len=0, max_array_len=0)
        if not isinstance(text, str):
            raise BadBytesError("a record whose subkey is not a PeerID")
        data = base58_decode(text)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise BadBytesError("a record whose subkey is not a PeerID") from error
    if peer_id_from_bytes_untrusted(data) != text:
        raise BadBytesError("a record whose subkey is not a PeerID")
    return text


def make_validator(rules: RecordRules) -> Any:
    """hivemind's validator interface over `rules`."""
    base = hivemind_module("dht.validation").RecordValidatorBase

    class Validator(base):  # type: ignore[misc, valid-type]
        def validate(self, record: Any) -> bool:
            return rules.allows(record.key, record.subkey, record.value, record.expiration_time)

        def sign_value(self, record: Any) -> bytes:
            return rules.sign(record.key, record.subkey, record.value, record.expiration_time)

        def strip_value(self, record: Any) -> bytes:
            return bytes(record.value[:-_SIGNATURE_BYTES])

    return Validator()
