"""Protocol number: changes of the wire must consider it, and a peer too old or too new is told which version to use."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from codes import raises_code

from swarmtrain import __version__, compatibility
from swarmtrain.compatibility import KEYS_SINCE, PROTOCOL, Needs, needs_untrusted
from swarmtrain.errors import BadBytesError, InviteError, NewerRunError, UserError, VersionError
from swarmtrain.network.discovery import run_lookup
from swarmtrain.network.discovery.invite import Invite, InvitedPeer, format_invite, parse_invite
from swarmtrain.network.discovery.run_lookup import find_run, refusal_untrusted
from swarmtrain.network.identity import new_identity
from swarmtrain.peer.bootstrap import publish_run
from swarmtrain.peer.lifecycle import run_fetch
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.problems import section_fields
from swarmtrain.run import DataSource, RunFile, parse_published_untrusted, parse_run, run_sha256
from swarmtrain.v1 import pipeline_pb2, snapshot_pb2
from swarmtrain.v1 import snapshot_pb2 as pb

BOB = new_identity(b"b" * 32).peer_id
PEERS = (InvitedPeer(BOB, ("/ip4/203.0.113.7/tcp/31337",)),)
RUN = "ab" * 32
LATER = Needs(PROTOCOL + 1, "0.99")
TOO_OLD = (
    f"you have swarmtrain {__version__}, this run needs 0.99 or newer: update it where you installed it from, in a "
    "clone of its repository by `git pull` and `pip install .`"
)


def test_whoever_changes_the_wire_looks_at_the_number() -> None:
    keys = {
        f"{name}.{key}" for name, section in RunFile.model_fields.items() for key in section_fields(section.annotation)
    }
    keys |= {f"data.sources.{key}" for key in DataSource.model_fields}
    digest = hashlib.sha256()
    for module in (snapshot_pb2, pipeline_pb2):
        digest.update(module.DESCRIPTOR.serialized_pb)  # without comments
    digest.update("\n".join(sorted(keys - set(KEYS_SINCE))).encode())
    assert digest.hexdigest() == compatibility.WIRE_SHA256, (
        "the messages between peers or the keys of a published run have changed: read above PROTOCOL in "
        "swarmtrain/compatibility.py whether a number rises and whether a key goes into KEYS_SINCE; then set "
        f'WIRE_SHA256 = "{digest.hexdigest()}"'
    )


VALUES_OF_PROTOCOL_1 = {
    "model.tokenizer": "bytes bpe",
    "data.source": "python-stdlib text jsonl datasets",
    "merge.method": "gossip diloco server PACKAGE:METHOD",
    "merge.init": "common own",
    "merge.partners": "uniform freshest longest-unmerged random-permutation",
    "merge.theta_format": "fp32 bf16 int8 int4",
    "merge.gradient_format": "auto fp32 bf16 int8 int4 int2",
    "merge.robust": "none clip direction trimmed flag PACKAGE:RULE",
    "pipeline.activations": "fp32 bf16 int8",
    "pipeline.wiring": "round-robin least-completion",
    "pipeline.balance": "rates queues none",
}
"""Values of each key that takes one of a few. This never grows: later values go into `KEYS_SINCE`."""


def test_each_value_of_a_key_has_the_protocol_that_it_came_with() -> None:
    """Older peers refuse a value that they do not know: a run that uses it must ask them to update.

    That the description of a key lists all its values is checked in `test_docs.py`.
    """
    for name, section in RunFile.model_fields.items():
        for key, field in section_fields(section.annotation).items():
            where, (_, *items) = f"{name}.{key}", (field.description or "").split("\n")
            first = VALUES_OF_PROTOCOL_1.get(where, "").split()
            values = [item.split('"')[1] for item in items]
            assert where in KEYS_SINCE or set(first) <= set(values), f"{where} has lost a value of protocol 1"
            for value in values:
                since = {where, f"{where}={value}"} & set(KEYS_SINCE)
                assert (value in first) != bool(since), (
                    f'{where} = "{value}": add "{where}={value}" to KEYS_SINCE in swarmtrain/compatibility.py, with '
                    "the protocol that it came with"
                )


def test_the_numbers_fit_each_other() -> None:
    assert 1 <= compatibility.OLDEST_PROTOCOL <= PROTOCOL
    assert list(compatibility.FIRST_VERSIONS) == list(range(1, PROTOCOL + 1)), "each protocol has its first version"
    assert all(2 <= since <= PROTOCOL for since in KEYS_SINCE.values())
    assert __version__.startswith(compatibility.FIRST_VERSIONS[PROTOCOL]), "the version rises with the protocol"


# ---------------------------------------------------------------- a newcomer that is too old


def test_an_invite_of_before_has_no_number_and_one_of_a_later_protocol_says_its_version() -> None:
    assert format_invite(Invite(RUN, PEERS)).startswith("st1"), "peers of before can read it"
    assert parse_invite(format_invite(Invite(RUN, PEERS))).needs == Needs()
    same = Invite(RUN, PEERS, Needs(PROTOCOL, "0.2"))
    assert format_invite(same).startswith("st2") and parse_invite(format_invite(same)) == same
    with pytest.raises(InviteError) as told:
        parse_invite(format_invite(Invite(RUN, PEERS, LATER)))
    assert str(told.value) == TOO_OLD


def published(folder: Path, text: str = "") -> bytes:
    run = parse_run(f"[run]\ntotal_tokens = 100_000\n{text}", "run.toml")
    return publish_run(run, folder, datetime.datetime(2030, 1, 2, tzinfo=datetime.UTC)).data


def read(data: bytes) -> RunFile:
    return parse_published_untrusted(data, run_sha256(data))


def test_a_run_file_without_a_number_is_of_before(tmp_path: Path) -> None:
    data = published(tmp_path)
    assert b"protocol" not in data, "peers of before refuse keys that they do not know"
    assert read(data).needs == Needs()


def test_a_run_file_of_a_later_protocol_says_its_version_whatever_else_is_in_it(tmp_path: Path) -> None:
    later = f'protocol = {PROTOCOL + 1}\nneeds = "0.99"\n[telepathy]\nrange_m = 3\n'
    data = published(tmp_path) + later.encode()
    with pytest.raises(NewerRunError) as told:
        read(data)
    assert str(told.value) == TOO_OLD
    (tmp_path / "run.toml").write_bytes(data)
    with raises_code("run-needs-newer", UserError, "0.99"):
        PeerFolder(tmp_path).kept_run()
    hostile = data.replace(b'"0.99"', b'"9\\u001b[2J"')
    with raises_code("run-needs-newer", BadBytesError):
        read(hostile)


def test_a_run_that_older_peers_cannot_join_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "OLDEST_PROTOCOL", PROTOCOL)
    run = read(published(tmp_path))
    assert run.needs == Needs(PROTOCOL, compatibility.FIRST_VERSIONS[PROTOCOL])


def test_a_new_key_is_published_only_with_another_value_than_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmtrain.run.KEYS_SINCE", {"merge.num_partners": 2})
    monkeypatch.setattr(compatibility, "KEYS_SINCE", {"merge.num_partners": 2})
    data = published(tmp_path)
    assert b"num_partners" not in data and read(data).needs == Needs()
    data = published(tmp_path, "[merge]\nnum_partners = 3\n")
    assert read(data).merge.num_partners == 3 and read(data).needs == Needs(2, "0.2")


# ---------------------------------------------------------------- the answers of present peers, both ways


class _Node:
    identity = new_identity(b"a" * 32)

    async def connect(self, peer: str, addresses: object, limit_s: float) -> None: ...


def asked(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> Callable[[], Any]:
    """Let a newcomer look up the run; the only peer, BOB, answers with `fields`."""

    class Calls:
        def __init__(self, node: object, run_sha256: str) -> None: ...

        async def hello(self, peer: str, request: pb.HelloRequest, limit_s: float) -> pb.HelloReply:
            return pb.HelloReply(time=run_lookup.own_time(), **fields)

    monkeypatch.setattr(run_lookup, "PeerCalls", Calls)

    async def find() -> object:
        return await find_run(_Node(), RUN, PEERS)  # type: ignore[arg-type]

    return lambda: asyncio.run(find())


def test_a_peer_of_before_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, swarmtrain_version="0.1.0")().peer == BOB


def test_a_newcomer_too_old_is_told_by_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    find = asked(monkeypatch, protocol=PROTOCOL + 1, needs_protocol=PROTOCOL + 1, needs_version="0.99")
    with pytest.raises(VersionError) as told:
        find()
    assert str(told.value) == TOO_OLD
    hostile = pb.HelloReply(needs_protocol=PROTOCOL + 1, needs_version="\x1b[2J")
    assert "needs a newer one: update it" in refusal_untrusted("bob", hostile)


def test_a_newcomer_too_new_is_told_whose_swarmtrain_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "OLDEST_PROTOCOL", PROTOCOL)
    says = "/ip4/203.0.113.7/tcp/31337", "swarmtrain 0.1.0", __version__, "0.2 or newer", "install 0.1.0"
    with raises_code("peer-needs-newer", VersionError, *says):
        asked(monkeypatch, swarmtrain_version="0.1.0")()
    assert asked(monkeypatch, protocol=PROTOCOL)().peer == BOB


def test_no_number_is_that_of_before() -> None:
    assert needs_untrusted(0, "") == needs_untrusted(1, "9.9") == Needs(1, "0.1")


def test_nobody_goes_on_alone_while_peers_answer_that_it_cannot_train_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(*args: object) -> str:
        raise VersionError("the peer at somewhere runs swarmtrain 0.1.0")

    monkeypatch.setattr(run_fetch, "run_to_resume", lambda *args: SimpleNamespace())
    peer: Any = SimpleNamespace(find=find, folder=None, invite=Invite(RUN, PEERS))
    with pytest.raises(VersionError):
        run_fetch.RunFetcher.fetch(peer)
