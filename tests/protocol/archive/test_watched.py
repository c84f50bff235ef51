"""Bootstraps that a volunteer asks, beside its rounds, how far their archives are."""

from __future__ import annotations

from swarmtrain.protocol.archive.watched import ArchivesSeen
from swarmtrain.protocol.membership.membership import Membership, PeerInfo


def comes(membership: Membership, peer: str, now: float, *, trains: bool = False) -> None:
    info = PeerInfo(peer=peer, training=trains, is_bootstrap=not trains, stamp=now)
    membership.saw_presence(info, now + 999, now)


def test_an_archive_is_asked_until_it_tells_and_again_when_it_is_back_or_this_peer_was_deaf() -> None:
    membership = Membership("a")
    seen = ArchivesSeen(membership)
    comes(membership, "b", 0.0, trains=True)
    assert seen.to_ask(0.0) == [] and not seen.told(["b"]), "there is none"
    comes(membership, "z", 1.0)
    comes(membership, "y", 1.0)
    assert seen.to_ask(0.0) == ["y", "z"]
    assert seen.told(["b", "z"]) and seen.to_ask(0.0) == ["y"], "that did not answer"
    assert not seen.told(["b"]) and seen.told(["y"]) and seen.to_ask(0.0) == []
    membership.left("z", 2.0)
    assert seen.to_ask(0.0) == []
    comes(membership, "z", 3.0)
    assert seen.to_ask(0.0) == ["z"] and seen.told(["z"]), "it is back"
    assert seen.to_ask(5.0) == ["y", "z"] and seen.told(["y", "z"]), "this process stood still"
    seen.forget()
    assert seen.to_ask(5.0) == ["y", "z"] and seen.told(["y", "z"]), "this peer was away"
    membership.left("b", 6.0)
    assert seen.to_ask(5.0) == ["y", "z"] and seen.told(["y", "z"]) and seen.to_ask(5.0) == ["y", "z"], "it is alone"
