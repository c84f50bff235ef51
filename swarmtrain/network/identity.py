"""Identify a peer: an Ed25519 key in its folder, the PeerID that contains the public half, and its signatures.

The key file has libp2p's own format, so that the daemon reads the same file. The PeerID of an Ed25519 key is an
identity multihash of the public key: whoever knows a PeerID can check its signatures, and nothing else has to travel.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf.message import DecodeError, Message

from swarmtrain.errors import BadBytesError, UserError
from swarmtrain.network.files import write_atomically
from swarmtrain.v1 import snapshot_pb2 as pb

_KEY_PREFIX = b"\x08\x01\x12\x40"  # protobuf PrivateKey{type: Ed25519, data: 64 bytes}
_PEER_PREFIX = b"\x00\x24\x08\x01\x12\x20"  # identity multihash of PublicKey{type: Ed25519, data: 32 bytes}


_MAX_KNOWN = 16_384
"""Limit of PeerIDs whose base58 text is cached: 4 MB."""


def base58_encode(data: bytes) -> str:
    """Return `data` in base58, with Bitcoin's alphabet."""
    text: bytes = base58.b58encode(data)
    return text.decode("ascii")


def base58_decode(text: str) -> bytes:
    """Return the bytes of base58 `text`. Raises ValueError on a foreign character."""
    if text != text.rstrip():  # the library accepts it, and two texts would name one peer
        raise ValueError("white space after a word in base58")
    data: bytes = base58.b58decode(text)
    return data


@dataclass(frozen=True)
class Identity:
    """Private key of a peer, and its PeerID in base58."""

    private_key: Ed25519PrivateKey
    peer_id: str

    def sign(self, message: bytes) -> bytes:
        """Return the signature of `message`, 64 bytes."""
        return self.private_key.sign(message)

    def key_file(self) -> bytes:
        """Return the bytes of libp2p's key file."""
        seed = self.private_key.private_bytes_raw()
        return _KEY_PREFIX + seed + self.private_key.public_key().public_bytes_raw()


def new_identity(seed: bytes | None = None) -> Identity:
    """Return a new identity, or that of a 32-byte seed (for tests)."""
    key = Ed25519PrivateKey.generate() if seed is None else Ed25519PrivateKey.from_private_bytes(seed)
    return Identity(key, base58_encode(_PEER_PREFIX + key.public_key().public_bytes_raw()))


def load_or_create_identity(path: Path) -> Identity:
    """Load the identity in `path`; create it, readable by its owner only, if there is none. Raises UserError."""
    try:
        if not path.exists():
            identity = new_identity()
            write_atomically(path, identity.key_file(), mode=0o600)
            return identity
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot use the identity at {path}: {error.strerror}; give another folder with --dir",
            code="not-an-identity",
        ) from None
    seed = data[len(_KEY_PREFIX) :][:32]
    if len(seed) != 32 or new_identity(seed).key_file() != data:
        raise UserError(f"{path} is not a swarmtrain identity; move it away to get a new one", code="not-an-identity")
    return new_identity(seed)


def peer_bytes(peer_id: str) -> bytes:
    """Return the 38 bytes of a PeerID in base58."""
    return base58_decode(peer_id)


def is_peer_id(data: bytes) -> bool:
    """Return whether these bytes are the PeerID of an Ed25519 key."""
    return len(data) == len(_PEER_PREFIX) + 32 and data.startswith(_PEER_PREFIX)


@functools.lru_cache(_MAX_KNOWN)
def peer_id_from_bytes_untrusted(data: bytes) -> str:
    """Return the PeerID in base58. Raises BadBytesError unless it is that of an Ed25519 key."""
    if not is_peer_id(data):
        raise BadBytesError("not the PeerID of an Ed25519 key", code="bad-format")
    return base58_encode(data)


def verify_untrusted(peer: bytes, message: bytes, signature: bytes) -> str:
    """Return the PeerID (base58) whose signature this is. Raises BadBytesError if it is not."""
    peer_id = peer_id_from_bytes_untrusted(peer)
    try:
        Ed25519PublicKey.from_public_bytes(peer[len(_PEER_PREFIX) :]).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise BadBytesError(f"a signature that is not {peer_id}'s", code="bad-signature") from error
    return peer_id


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
