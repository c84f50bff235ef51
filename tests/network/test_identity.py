"""Identities: the key file, PeerIDs, base58, signatures."""

from __future__ import annotations

from pathlib import Path

import pytest
from codes import raises_code
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.errors import BadBytesError, UserError
from swarmtrain.network import files
from swarmtrain.network.files import write_atomically
from swarmtrain.network.identity import (
    base58_decode,
    base58_encode,
    load_or_create_identity,
    new_identity,
    peer_bytes,
    peer_id_from_bytes_untrusted,
    verify_untrusted,
)

SEED = bytes(range(32))


@given(st.binary(max_size=80))
def test_base58_round_trip(data: bytes) -> None:
    assert base58_decode(base58_encode(data)) == data


def test_base58_known_values() -> None:
    assert base58_encode(b"Hello World!") == "2NEpo7TZRRrLZSi2U"
    assert base58_encode(b"\0\0\x28\x7f\xb4\xcd") == "11233QC4"
    for foreign in "0OIl+ ":
        with pytest.raises(ValueError):
            base58_decode(f"2NEpo{foreign}")


def test_a_peer_id_is_its_public_key() -> None:
    identity = new_identity(SEED)
    assert identity.peer_id.startswith("12D3KooW")
    assert peer_id_from_bytes_untrusted(peer_bytes(identity.peer_id)) == identity.peer_id
    assert identity.key_file()[:4] == b"\x08\x01\x12\x40" and identity.key_file()[4:36] == SEED


def test_an_identity_is_kept_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    first = load_or_create_identity(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_or_create_identity(path).peer_id == first.peer_id
    path.chmod(0o644)  # copied by hand, say
    assert load_or_create_identity(path).peer_id == first.peer_id
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("keep", [0, 4, 36, 67])
def test_a_cut_identity_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(new_identity(SEED).key_file()[:keep])
    with raises_code("not-an-identity", UserError):
        load_or_create_identity(path)


@pytest.mark.parametrize("position", [0, 3, 10, 50])
def test_an_altered_identity_is_refused(tmp_path: Path, position: int) -> None:
    path = tmp_path / "identity.key"
    data = bytearray(new_identity(SEED).key_file())
    data[position] ^= 1
    path.write_bytes(data)
    with raises_code("not-an-identity", UserError):
        load_or_create_identity(path)


def test_a_folder_that_cannot_be_used_is_the_users_error(tmp_path: Path) -> None:
    with raises_code("not-an-identity", UserError, "--dir"):
        load_or_create_identity(tmp_path / "missing" / "identity.key")


def test_signatures_are_their_authors() -> None:
    identity, other = new_identity(SEED), new_identity()
    signature = identity.sign(b"message")
    me = peer_bytes(identity.peer_id)
    assert verify_untrusted(me, b"message", signature) == identity.peer_id
    for peer, message, wrong in [
        (peer_bytes(other.peer_id), b"message", signature),
        (me, b"massage", signature),
        (me, b"message", signature[:-1]),
        (me, b"message", b""),
        (me[:-1], b"message", signature),
        (b"", b"message", signature),
    ]:
        with pytest.raises(BadBytesError):
            verify_untrusted(peer, message, wrong)


@given(st.binary(max_size=60), st.binary(max_size=70))
def test_random_bytes_are_no_signature(peer: bytes, signature: bytes) -> None:
    with pytest.raises(BadBytesError):
        verify_untrusted(peer, b"message", signature)


class Crash(BaseException):
    """Stands for the process's end at one place."""


@pytest.mark.parametrize("place", ["fsync", "fchmod"])
def test_a_crash_before_the_rename_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    path = tmp_path / "state"
    write_atomically(path, b"old")

    def crash(*args: object) -> None:
        raise Crash

    monkeypatch.setattr(files.os, place, crash)
    with pytest.raises(Crash):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["state"], "no temporary file is left"


def test_a_failed_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    write_atomically(path, b"old")

    def crash(self: Path, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.Path, "replace", crash)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_writing_replaces_content_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_atomically(path, b"old")
    write_atomically(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o600
