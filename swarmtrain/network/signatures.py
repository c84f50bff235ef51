"""Sign and verify messages: author, run and purpose."""

from __future__ import annotations

import hashlib
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from swarmtrain.errors import BadBytesError
from swarmtrain.network.identity import Identity, peer_bytes, verify_untrusted
from swarmtrain.v1 import snapshot_pb2 as pb

_M = TypeVar("_M", bound=Message)


def _signed_bytes(purpose: str, run_sha256: str, payload: bytes) -> bytes:
    return f"swarmtrain {purpose} v1\0".encode() + bytes.fromhex(run_sha256) + payload


def sign(identity: Identity, purpose: str, run_sha256: str, message: Message) -> pb.Signed:
    """Return `message` signed by `identity` for this run and purpose ("manifest", "roster", "presence")."""
    payload = message.SerializeToString(deterministic=True)
    return pb.Signed(
        payload=payload,
        author=peer_bytes(identity.peer_id),
        signature=identity.sign(_signed_bytes(purpose, run_sha256, payload)),
    )


def open_signed_untrusted(
    signed: pb.Signed, purpose: str, run_sha256: str, message_type: type[_M], max_bytes: int = 2 * 1024 * 1024
) -> tuple[str, _M]:
    """Return (author's PeerID, message). Raises BadBytesError if it is oversized, forged, or another kind
    of message."""
    if len(signed.payload) > max_bytes:
        raise BadBytesError(
            f"a signed {purpose} of {len(signed.payload)} bytes, more than {max_bytes}", code="bad-size"
        )
    author = verify_untrusted(signed.author, _signed_bytes(purpose, run_sha256, signed.payload), signed.signature)
    try:
        message = message_type.FromString(signed.payload)
    except DecodeError as error:
        raise BadBytesError(f"a signed {purpose} that cannot be read", code="bad-format") from error
    return author, message


def payload_sha256(signed: pb.Signed) -> str:
    """Return the SHA-256 of the signed payload, hex: the name of a snapshot or a roster."""
    return hashlib.sha256(signed.payload).hexdigest()
