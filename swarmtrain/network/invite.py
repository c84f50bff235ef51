"""The invite: one word that says which run and where to knock.

`st1` + base58 of: 32 bytes run hash, then for each peer its public key and addresses, then 4 bytes of SHA-256
over all that, so that a truncated or mistyped word is noticed before anything is dialled. An address is a byte of
kind and its binary form (IPv4 or IPv6 with a TCP port), or text for anything else.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from dataclasses import dataclass

from swarmtrain.errors import InviteError
from swarmtrain.network.identity import base58_decode, base58_encode, peer_bytes, peer_id_from_bytes_untrusted

__all__ = ["Invite", "InvitedPeer", "format_invite", "parse_invite"]

_PREFIX = "st1"
_NEXT_STEP = "ask for the whole line again and copy it in one piece"
_PLAIN = re.compile(r"^/(ip4|ip6)/([^/]+)/tcp/(\d+)$")
_IP4, _IP6, _TEXT = 4, 6, 1
_MAX_WORD = 4096


@dataclass(frozen=True)
class InvitedPeer:
    """A peer that serves the run: PeerID in base58, multiaddresses without the /p2p part."""

    peer: str
    addresses: tuple[str, ...]

    @property
    def full_addresses(self) -> tuple[str, ...]:
        """Multiaddresses with /p2p/PeerID."""
        return tuple(f"{address}/p2p/{self.peer}" for address in self.addresses)


@dataclass(frozen=True)
class Invite:
    """Which run (SHA-256, hex) and who serves it."""

    run_sha256: str
    peers: tuple[InvitedPeer, ...]


def _pack_address(address: str) -> bytes:
    match = _PLAIN.match(address)
    if match is None:
        text = address.encode()
        if len(text) > 255:
            raise InviteError(f"address longer than 255 characters: {address[:40]}...")
        return bytes([_TEXT, len(text)]) + text
    kind = _IP4 if match[1] == "ip4" else _IP6
    return bytes([kind]) + ipaddress.ip_address(match[2]).packed + int(match[3]).to_bytes(2, "big")


def _unpack_address(data: bytes) -> tuple[str, bytes]:
    kind = data[0]
    if kind == _TEXT:
        size = data[1]
        return data[2 : 2 + size].decode(), data[2 + size :]
    size = {_IP4: 4, _IP6: 16}[kind]
    host = ipaddress.ip_address(data[1 : 1 + size])
    port = int.from_bytes(data[1 + size : 3 + size], "big")
    return f"/ip{kind}/{host}/tcp/{port}", data[3 + size :]


def format_invite(invite: Invite) -> str:
    """The word to hand out."""
    body = bytes.fromhex(invite.run_sha256) + bytes([len(invite.peers)])
    for peer in invite.peers:
        body += peer_bytes(peer.peer)[-32:] + bytes([len(peer.addresses)])
        body += b"".join(_pack_address(address) for address in peer.addresses)
    return _PREFIX + base58_encode(b"\x01" + body + hashlib.sha256(body).digest()[:4])


def parse_invite(word: str) -> Invite:
    """Read an invite; InviteError says what is wrong with it and what to do."""
    word = word.strip()
    if re.match(r"^st[0-9]", word) and not word.startswith(_PREFIX):
        raise InviteError(f"this invite is of another version ({word[:3]}, not {_PREFIX}): upgrade swarmtrain")
    if not word.startswith(_PREFIX):
        raise InviteError(f"not an invite: one begins with {_PREFIX}; {_NEXT_STEP}")
    if len(word) > _MAX_WORD:
        raise InviteError(f"too long for an invite ({len(word)} characters); {_NEXT_STEP}")
    try:
        data = base58_decode(word[len(_PREFIX) :])
    except ValueError:
        raise InviteError(f"the invite holds a character that no invite has; {_NEXT_STEP}") from None
    body, checksum = data[1:-4], data[-4:]
    if len(data) < 38 or hashlib.sha256(body).digest()[:4] != checksum:
        raise InviteError(f"the invite is garbled or cut off; {_NEXT_STEP}")
    try:
        return _parse_body(body)
    except (IndexError, KeyError, ValueError) as error:
        raise InviteError(f"the invite makes no sense ({error}); {_NEXT_STEP}") from None


def _parse_body(body: bytes) -> Invite:
    run_sha256, num_peers, rest = body[:32].hex(), body[32], body[33:]
    peers = []
    for _ in range(num_peers):
        peer = peer_id_from_bytes_untrusted(b"\x00\x24\x08\x01\x12\x20" + rest[:32])
        num_addresses, rest = rest[32], rest[33:]
        addresses = []
        for _ in range(num_addresses):
            address, rest = _unpack_address(rest)
            addresses.append(address)
        peers.append(InvitedPeer(peer, tuple(addresses)))
    if rest:
        raise ValueError(f"{len(rest)} bytes too many")
    return Invite(run_sha256, tuple(peers))
