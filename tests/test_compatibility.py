"""Protocol number: whoever changes the wire raises it, and a peer of another one is told which version to use."""

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
from swarmtrain.compatibility import PROTOCOL, protocol_mismatch
from swarmtrain.errors import InviteError, NewerRunError, UserError, VersionError
from swarmtrain.network.discovery import invite as invites
from swarmtrain.network.discovery import run_lookup
from swarmtrain.network.discovery.invite import Invite, InvitedPeer, format_invite, parse_invite
from swarmtrain.network.discovery.run_lookup import find_run
from swarmtrain.network.identity import new_identity
from swarmtrain.peer.bootstrap import publish_run
from swarmtrain.peer.lifecycle import run_fetch
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.problems import section_fields
from swarmtrain.run import RunFile, parse_published_untrusted, parse_run, run_sha256
from swarmtrain.run_data import DataSource
from swarmtrain.v1 import pipeline_pb2, snapshot_pb2
from swarmtrain.v1 import snapshot_pb2 as pb

BOB = new_identity(b"b" * 32).peer_id
PEERS = (InvitedPeer(BOB, ("/ip4/203.0.113.7/tcp/31337",)),)
RUN = "ab" * 32
UPDATE = "update it where you installed it from, in a clone of its repository by `git pull` and `pip install .`"


def test_whoever_changes_the_wire_looks_at_the_number() -> None:
    keys = {
        f"{name}.{key}" for name, section in RunFile.model_fields.items() for key in section_fields(section.annotation)
    }
    keys |= {f"data.sources.{key}" for key in DataSource.model_fields}
    digest = hashlib.sha256()
    for module in (snapshot_pb2, pipeline_pb2):
        digest.update(module.DESCRIPTOR.serialized_pb)  # without comments
    digest.update("\n".join(sorted(keys)).encode())
    assert digest.hexdigest() == compatibility.WIRE_SHA256, (
        "the messages between peers or the keys of a published run have changed: raise PROTOCOL in "
        "swarmtrain/compatibility.py unless this release has done so already; then set "
        f'WIRE_SHA256 = "{digest.hexdigest()}"'
    )


@pytest.mark.parametrize(
    ("protocol", "version", "code", "says"),
    [
        (PROTOCOL + 1, "0.99", "run-needs-newer", f"of swarmtrain 0.99, and you have {__version__}: {UPDATE}"),
        (PROTOCOL - 1, "0.1.0", "peer-needs-newer", "or install swarmtrain 0.1.0 for this run"),
        (0, "\x1b[2J", "peer-needs-newer", "install another version of swarmtrain for"),
        (None, 7, "peer-needs-newer", "is of another version of swarmtrain, and"),
    ],
)
def test_who_speaks_another_protocol_is_told_which_version_to_use(
    protocol: object, version: object, code: str, says: str
) -> None:
    problem = protocol_mismatch("this run", protocol, version)
    assert problem is not None and problem.code == code and says in problem
    assert protocol_mismatch("this run", PROTOCOL, version) is None


def test_an_invite_of_another_protocol_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    same = Invite(RUN, PEERS)
    assert parse_invite(format_invite(same)) == same
    for number, code in ((PROTOCOL + 1, "run-needs-newer"), (1, "peer-needs-newer")):
        with monkeypatch.context() as other:
            other.setattr(invites, "PROTOCOL", number)
            word = format_invite(same)
        with raises_code(code, InviteError, __version__):
            parse_invite(word)


def published(folder: Path) -> bytes:
    run = parse_run("[run]\ntotal_tokens = 100_000\n", "run.toml")
    return publish_run(run, folder, datetime.datetime(2030, 1, 2, tzinfo=datetime.UTC)).data


def test_a_published_run_states_the_protocol_and_one_of_another_is_refused_whatever_is_in_it(tmp_path: Path) -> None:
    data = published(tmp_path)
    assert parse_published_untrusted(data, run_sha256(data)).published is not None
    later = data.replace(b"protocol = %d\n" % PROTOCOL, b"protocol = %d\n" % (PROTOCOL + 1))
    later += b"[telepathy]\nrange_m = 3\n"
    with raises_code("run-needs-newer", NewerRunError, UPDATE):
        parse_published_untrusted(later, run_sha256(later))
    (tmp_path / "run.toml").write_bytes(later)
    with raises_code("run-needs-newer", UserError, UPDATE):
        PeerFolder(tmp_path).kept_run()


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


def test_a_newcomer_is_told_by_the_answer_of_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    with raises_code("run-needs-newer", VersionError, "/ip4/203.0.113.7/tcp/31337", "0.99", UPDATE):
        asked(monkeypatch, protocol=PROTOCOL + 1, swarmtrain_version="0.99")()
    with raises_code("peer-needs-newer", VersionError, "ask its owner to update", "install swarmtrain 0.1.0"):
        asked(monkeypatch, protocol=1, swarmtrain_version="0.1.0")()
    assert asked(monkeypatch, protocol=PROTOCOL)().peer == BOB


def test_nobody_goes_on_alone_while_peers_answer_that_it_cannot_train_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(*args: object) -> str:
        raise VersionError("the peer at somewhere runs swarmtrain 0.1.0")

    monkeypatch.setattr(run_fetch, "run_to_resume", lambda *args: SimpleNamespace())
    peer: Any = SimpleNamespace(find=find, folder=None, invite=Invite(RUN, PEERS))
    with pytest.raises(VersionError):
        run_fetch.RunFetcher.fetch(peer)
