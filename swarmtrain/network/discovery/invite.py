"""Format and parse an invite: one word that names a run and where to dial its peers.

`st1` + base58 of: a byte for the protocol that the run's peers speak, the run's 32-byte hash, then for each peer its
public key and addresses, then 4 bytes of SHA-256 over all that, so that a truncated or mistyped word is noticed before
anything is dialled. An address is a byte for its kind and its binary form (IPv4 or IPv6 with a TCP port), or text for
anything else.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from swarmtrain.compatibility import PROTOCOL, UPDATE, protocol_mismatch
from swarmtrain.errors import BadBytesError, InviteError
from swarmtrain.network.identity import base58_decode, base58_encode, peer_bytes, peer_id_from_bytes_untrusted

_PREFIX = "st1"
_NEXT_STEP = "ask for the whole line again and copy it in one piece"
_PLAIN = re.compile(r"/(ip4|ip6)/([0-9A-Fa-f:.]+)/tcp/([0-9]{1,5})")
_READABLE = re.compile(r"/[!-~]+")
_IP4, _IP6, _TEXT = 4, 6, 1
_MAX_WORD = 4096
_MAX_PARTS = 64  # pieces into which line breaks may have cut an invite
_SHOWN = 2  # addresses named in an explanation
_EXAMPLES = ipaddress.ip_network("203.0.113.0/24")
"""Example addresses of our documentation. Other example ranges may be in use in somebody's network."""
_AROUND = re.compile(r"""["'`\\<>|\u200b\u200e\ufeff\u2018\u2019\u201c\u201d\u00ab\u00bb]""")
_BEGIN = re.compile(r"(?<![0-9A-Za-z])st[0-9]")


@dataclass(frozen=True)
class InvitedPeer:
    """Peer that serves the run: PeerID in base58, multiaddresses without the /p2p part."""

    peer: str
    addresses: tuple[str, ...]

    @property
    def full_addresses(self) -> tuple[str, ...]:
        """Multiaddresses with /p2p/PeerID."""
        return tuple(f"{address}/p2p/{self.peer}" for address in self.addresses)


@dataclass(frozen=True)
class Invite:
    """Content of an invite: the run (SHA-256, hex), and the peers that serve it."""

    run_sha256: str
    peers: tuple[InvitedPeer, ...]


def _pack_address(address: str) -> bytes:
    match = _PLAIN.fullmatch(address)
    if match is not None:
        host = ipaddress.IPv4Address(match[2]) if match[1] == "ip4" else ipaddress.IPv6Address(match[2])
        return bytes([_IP4 if match[1] == "ip4" else _IP6]) + host.packed + int(match[3]).to_bytes(2, "big")
    text = address.encode()
    if len(text) > 255 or not _READABLE.fullmatch(address):
        raise ValueError("not an address that an invite can hold")
    return bytes([_TEXT, len(text)]) + text


def _packed(addresses: Iterable[str]) -> list[bytes]:
    """Return addresses in binary form. Invalid ones are left out, since other peers' addresses come from strangers."""
    packed = []
    for address in addresses:
        with contextlib.suppress(ValueError, OverflowError):
            packed.append(_pack_address(address))
    return packed[:255]


def _unpack_address(data: bytes) -> tuple[str, bytes]:
    kind = data[0]
    if kind == _TEXT:
        text = data[2 : 2 + data[1]].decode()
        if len(text) != data[1] or not _READABLE.fullmatch(text):
            raise ValueError("an address that is cut off or unreadable")
        return text, data[2 + data[1] :]
    size = {_IP4: 4, _IP6: 16}[kind]
    if len(data) < 3 + size:
        raise ValueError("an address that is cut off")
    host = ipaddress.ip_address(data[1 : 1 + size])
    port = int.from_bytes(data[1 + size : 3 + size], "big")
    return f"/ip{kind}/{host}/tcp/{port}", data[3 + size :]


def format_invite(invite: Invite) -> str:
    """Return the invite as a word. Raises InviteError if it would be too long to be parsed again."""
    body = bytes.fromhex(invite.run_sha256) + bytes([len(invite.peers)])
    for peer in invite.peers:
        addresses = _packed(peer.addresses)
        # Only the public key: the rest of a PeerID is the same for all peers.
        body += peer_bytes(peer.peer)[-32:] + bytes([len(addresses)]) + b"".join(addresses)
    body = bytes([PROTOCOL]) + body
    word = _PREFIX + base58_encode(body + hashlib.sha256(body).digest()[:4])
    if len(word) > _MAX_WORD:
        raise InviteError(
            f"an invite of {len(word)} characters is too long; name fewer peers or addresses", code="invite-too-long"
        )
    return word


def invite_in(text: str) -> str:
    """Return the part of `text` that may be an invite.

    Drops a command before it, quotes, the marks of a quoted mail, and line breaks. Parts that a line break or a space
    had separated are joined by one space.
    """
    clean = " ".join(_AROUND.sub(" ", text).split())
    found = _BEGIN.search(clean)
    return clean if found is None else clean[found.start() :]


def where_it_serves(invite: Invite) -> str:
    """Explain in words where alone an invite works, and what to do about it; "" if it has an address of the
    internet."""
    hosts = []
    for address in (address for peer in invite.peers for address in peer.addresses):
        match = _PLAIN.fullmatch(address)
        if match is None:
            return ""  # a name, or a form that only its owner knows
        hosts.append(ipaddress.ip_address(match[2]))
    if any(host.is_global for host in hosts):
        return ""
    if examples := [host for host in hosts if host in _EXAMPLES]:
        return (
            f"this invite leads to {examples[0]}, which is an example of the documentation and nobody's address; give "
            "--announce HOST:PORT with your router's public address, and forward that port to --listen :PORT"
        )
    inside = [host for host in hosts if not host.is_loopback]
    shown = ", ".join(map(str, dict.fromkeys(inside[:_SHOWN])))
    place = f"addresses of a local network only ({shown}): it serves this network" if inside else "this machine only"
    return (
        f"this invite leads to {place}; for others forward a port of the router, and give --listen :PORT --announce "
        "HOST:PORT with the router's public address, such as --announce 203.0.113.5:31337"
    )


def parse_invite(text: str) -> Invite:
    """Parse an invite however it was pasted. Raises InviteError, which says what is wrong and what to do."""
    protocol, body = _whole_body(invite_in(text))
    if refusal := protocol_mismatch("this invite", protocol, ""):
        raise InviteError(refusal)
    try:
        return _parse_body(body)
    except (BadBytesError, IndexError, KeyError, ValueError) as error:
        raise InviteError(f"the invite cannot be read ({error}); {_NEXT_STEP}", code="invite-garbled") from None


def _whole_body(words: str) -> tuple[int, bytes]:
    """Return protocol and content of the invite at the start of `words`.

    Takes the longest run of words whose checksum is right together. Raises the InviteError of all of them if there is
    none.
    """
    parts = words.split(" ")
    for number in range(min(len(parts), _MAX_PARTS), 0, -1):
        with contextlib.suppress(InviteError):
            return _checked("".join(parts[:number]))
    return _checked("".join(parts))


def _checked(word: str) -> tuple[int, bytes]:
    """Return protocol and content of one word. Raises InviteError if it is no invite, or its checksum is wrong."""
    prefix = word[:3]
    if re.match(r"^st[0-9]", word) and prefix != _PREFIX:
        raise InviteError(
            f"this invite has another version ({prefix}, not {_PREFIX}): {UPDATE}", code="run-needs-newer"
        )
    if prefix != _PREFIX:
        raise InviteError(f"not an invite: an invite begins with {_PREFIX}; {_NEXT_STEP}", code="not-an-invite")
    if len(word) > _MAX_WORD:
        raise InviteError(f"the invite is too long ({len(word)} characters); {_NEXT_STEP}", code="invite-too-long")
    try:
        data = base58_decode(word[len(prefix) :])
    except ValueError:
        raise InviteError(f"the invite has a wrong character; {_NEXT_STEP}", code="invite-garbled") from None
    if len(data) < 38 or hashlib.sha256(data[:-4]).digest()[:4] != data[-4:]:
        raise InviteError(f"the invite is garbled or cut off; {_NEXT_STEP}", code="invite-garbled")
    return data[0], data[1:-4]


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
