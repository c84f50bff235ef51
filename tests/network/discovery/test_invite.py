"""Invites: a word that survives copying or is refused."""

from __future__ import annotations

import hashlib

import pytest
from codes import raises_code
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.compatibility import PROTOCOL
from swarmtrain.errors import InviteError
from swarmtrain.network.discovery.invite import Invite, InvitedPeer, format_invite, parse_invite
from swarmtrain.network.identity import base58_encode, new_identity, peer_bytes

RUN = hashlib.sha256(b"a run").hexdigest()
ALICE, BOB = new_identity(b"a" * 32).peer_id, new_identity(b"b" * 32).peer_id
INVITE = Invite(
    RUN,
    (
        InvitedPeer(ALICE, ("/ip4/203.0.113.7/tcp/31337", "/ip6/2001:db8::7/tcp/4001")),
        InvitedPeer(BOB, ("/dns4/swarm.example.org/tcp/443", "/ip4/127.0.0.1/udp/4001/quic-v1")),
    ),
)
WORD = format_invite(INVITE)
LETTERS = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def sealed(body: bytes, protocol: int = PROTOCOL) -> str:
    """Make an invite with the right checksum, whatever its content."""
    body = bytes([protocol]) + body
    return "st1" + base58_encode(body + hashlib.sha256(body).digest()[:4])


def test_round_trip() -> None:
    assert parse_invite(WORD) == INVITE
    assert parse_invite(f"  {WORD}\n") == INVITE, "copied with its surroundings"
    assert WORD.isalnum(), "a double click selects it"
    assert INVITE.peers[0].full_addresses[0] == f"/ip4/203.0.113.7/tcp/31337/p2p/{ALICE}"


@pytest.mark.parametrize(
    "pasted",
    [
        f"swarmtrain join {WORD}",
        f"$ swarmtrain join '{WORD}' ",
        f"swarmtrain join {WORD[:40]}\n{WORD[40:]}\n",
        f"{WORD[:40]} {WORD[40:90]}\r\n   {WORD[90:]}",
        f"> swarmtrain join {WORD[:40]}\n> {WORD[40:]}",
        f"\u201cswarmtrain join \\\n  {WORD}\u201d",
        f"swarmtrain join {WORD}\nsee you there!",
        f"anna, run tiny (/home/anna):\nswarmtrain join {WORD}",
        f"\ufeff{WORD}\u200b",
    ],
)
def test_the_whole_line_may_be_pasted_however_it_was_broken(pasted: str) -> None:
    assert parse_invite(pasted) == INVITE


def test_a_line_whose_end_is_missing_is_still_refused() -> None:
    with raises_code("invite-garbled", InviteError):
        parse_invite(f"swarmtrain join {WORD[:40]}\n{WORD[40:-3]}")
    with raises_code("not-an-invite", InviteError):
        parse_invite("swarmtrain join")


def test_an_ordinary_invite_is_short() -> None:
    assert len(format_invite(Invite(RUN, INVITE.peers[:1]))) < 160


@given(
    st.lists(
        st.one_of(
            st.builds(lambda ip, port: f"/ip4/{ip}/tcp/{port}", st.ip_addresses(v=4), st.integers(0, 65535)),
            st.builds(lambda ip, port: f"/ip6/{ip}/tcp/{port}", st.ip_addresses(v=6), st.integers(0, 65535)),
            st.from_regex(r"/dns/[a-z]{1,20}/tcp/[0-9]{1,5}", fullmatch=True),
        ),
        max_size=5,
    )
)
def test_any_address_survives(addresses: list[str]) -> None:
    invite = Invite(RUN, (InvitedPeer(ALICE, tuple(addresses)),))
    assert parse_invite(format_invite(invite)) == invite


def test_every_truncation_is_refused() -> None:
    for size in range(len(WORD)):
        with pytest.raises(InviteError):
            parse_invite(WORD[:size])
        with pytest.raises(InviteError):
            parse_invite(WORD[size + 1 :])


def test_every_changed_character_is_refused() -> None:
    for place in range(len(WORD)):
        for letter in (LETTERS[place % 58], LETTERS[(place + 29) % 58], "0", " ", "é"):
            if letter != WORD[place]:
                with pytest.raises(InviteError):
                    parse_invite(WORD[:place] + letter + WORD[place + 1 :])


def test_every_added_or_swapped_character_is_refused() -> None:
    for place in range(3, len(WORD) - 1):
        with pytest.raises(InviteError):
            parse_invite(WORD[:place] + "1" + WORD[place:])
        if WORD[place] != WORD[place + 1]:
            with pytest.raises(InviteError):
                parse_invite(WORD[:place] + WORD[place + 1] + WORD[place] + WORD[place + 2 :])


@pytest.mark.parametrize(
    ("word", "code", "says"),
    [
        ("", "not-an-invite", ""),
        ("http://example.org", "not-an-invite", ""),
        ("st9", "run-needs-newer", ""),
        ("st1", "invite-garbled", "garbled or cut off"),
        (WORD + "z" * 5000, "invite-too-long", "characters"),
        (WORD[:40] + "l" + WORD[41:], "invite-garbled", "wrong character"),
        (sealed(b"x" * 33, protocol=2), "peer-needs-newer", "ask its owner to update"),
        (sealed(bytes.fromhex(RUN) + b"\x01" + b"k" * 31), "invite-garbled", "cannot be read"),
        (sealed(bytes.fromhex(RUN) + b"\x01" + b"k" * 32 + b"\x01\x04\x7f\x00"), "invite-garbled", "cannot be read"),
        (sealed(bytes.fromhex(RUN) + b"\x01" + b"k" * 32 + b"\x01\x09abcdef"), "invite-garbled", "cannot be read"),
        (sealed(bytes.fromhex(RUN) + b"\x01" + b"k" * 32 + b"\x01\x01\xff/x"), "invite-garbled", "cannot be read"),
        (
            sealed(bytes.fromhex(RUN) + b"\x01" + b"k" * 32 + b"\x01\x01\x05/\x1b[2J"),
            "invite-garbled",
            "cannot be read",
        ),
        (sealed(bytes.fromhex(RUN) + b"\x00" + b"more"), "invite-garbled", "4 bytes too many"),
    ],
)
def test_what_is_no_invite_is_refused_with_the_next_step(word: str, code: str, says: str) -> None:
    with raises_code(code, InviteError, says):
        parse_invite(word)


@given(st.binary(min_size=33, max_size=120))
def test_random_content_with_a_right_checksum_raises_nothing_else(body: bytes) -> None:
    try:
        parse_invite(sealed(body))
    except InviteError:
        pass


def test_addresses_that_strangers_made_up_are_left_out() -> None:
    bad = ("/ip4/999.1.1.1/tcp/1", "/ip4/1.2.3.4/tcp/99999", "/" + "x" * 300, "/dns/a b/tcp/1", "/\x1b[2J", "nonsense")
    invite = Invite(RUN, (InvitedPeer(ALICE, (*bad, "/ip4/1.2.3.4/tcp/5")),))
    assert parse_invite(format_invite(invite)).peers[0].addresses == ("/ip4/1.2.3.4/tcp/5",)


def test_an_invite_that_nobody_could_read_is_not_made() -> None:
    long = tuple(f"/dns/{'x' * 240}/tcp/{port}" for port in range(20))
    with raises_code("invite-too-long", InviteError):
        format_invite(Invite(RUN, (InvitedPeer(ALICE, long),)))


def test_the_key_travels_as_32_bytes() -> None:
    assert len(peer_bytes(ALICE)) == 38
    assert parse_invite(format_invite(Invite(RUN, (InvitedPeer(ALICE, ()),)))).peers[0].peer == ALICE
