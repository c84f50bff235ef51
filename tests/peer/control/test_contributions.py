"""Status of the swarm: who is present, who contributed what, and how far the run is."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from swarmtrain.network.answers import Serving
from swarmtrain.peer.control.board import Pulse, StatusBoard, Watched
from swarmtrain.peer.control.session import swarm_looker
from swarmtrain.protocol.membership.membership import Membership, PeerInfo
from swarmtrain.run_adapter import AdapterSection
from swarmtrain.v1 import control_pb2 as pb


class Clock:
    """Clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_contributions_outlive_their_peers_and_a_liar_does_not_move_the_run() -> None:
    members = Membership("me")
    for peer in ("ben", "carl", "liar"):
        members.saw_presence(PeerInfo(peer=peer, name=peer, training=True, run_tokens=10**15), 30.0, 0.0)
    counts = {"me": 500, "ben": 300, "gone": 200, "liar": 7}
    accounting = SimpleNamespace(
        contributions=lambda: counts,
        acknowledged=lambda: {"ben": 250, "gone": 200},
        total=1007,
        names={"gone": "gina", "ben": "another"},
    )
    run = SimpleNamespace(tokens_per_step=4, pipeline=SimpleNamespace(stages=1), adapter=AdapterSection())
    me = PeerInfo(peer="me", name="me", training=True, steps_per_s=2.0)
    everyone = {
        "presence": SimpleNamespace(me=me),
        "membership": members,
        "accounting": accounting,
        "published": SimpleNamespace(run=run),
    }
    node, reaching = SimpleNamespace(num_dht_records=6), SimpleNamespace(in_words=str)
    swarm: Any = SimpleNamespace(**everyone, node=node, serving=Serving(), coverage=None, reaching=reaching)
    status = pb.PeerStatus(own_tokens=400, run_tokens=900)
    swarm_looker(StatusBoard("volunteer", 0.0), swarm)(status)
    assert (status.own_tokens, status.run_tokens) == (500, 900), "what the rosters count"
    assert status.dht_records == 6
    names = {peer.peer: peer.name for peer in status.peers}
    assert names["gone"] == "gina" and names["ben"] == "ben", "of one that left before, by its progress record"
    swarm.presence.me = dataclasses.replace(me, training=False, is_bootstrap=True)
    served = pb.PeerStatus(run_tokens=900)
    swarm_looker(StatusBoard("bootstrap", 0.0), swarm)(served)
    assert served.run_tokens == 1007, "it applies no rosters, and goes by what it has counted"
    clock = Clock()
    members.saw_presence(PeerInfo(peer="ben", stamp=0.5, training=True, run_tokens=10**15, steps_per_s=1.0), 30.0, 0.5)
    swarm_looker(StatusBoard("bootstrap", 0.0), swarm)(served := pb.PeerStatus())
    assert served.run_tokens == 1007 + 15 * 4, "and by the speed that they tell, before it has measured one"
    look = swarm_looker(StatusBoard("bootstrap", 0.0, now=clock), swarm)
    for grown in (0, 100, 100):
        accounting.total += grown
        served = pb.PeerStatus()
        look(served)
        clock.now_s += 10.0
    assert served.run_tokens == 1207 + 150, "it believes what they say 15 s ahead of its counts, at the speed of these"
    for peer in ("ben", "carl"):
        members.saw_presence(PeerInfo(peer=peer, stamp=1.0, training=True, run_tokens=1300), 30.0, 1.0)
    look(served := pb.PeerStatus())
    assert served.run_tokens == 1300, "half of them say it"
    shown = {peer.peer: (peer.tokens, peer.acknowledged_tokens, peer.present) for peer in status.peers}
    assert shown == {
        "me": (500, 0, True),
        "ben": (300, 250, True),
        "liar": (7, 0, True),
        "carl": (0, 0, True),
        "gone": (200, 200, False),
    }


def test_speeds_that_nobody_has_measured_neither_end_the_run_on_the_screen_nor_are_ones_of_a_few() -> None:
    members, said = Membership("me"), {"ben": 2.0, "carl": 3.0, "liar": 9e8}
    for peer, steps_per_s in said.items():
        info = PeerInfo(peer=peer, training=True, run_tokens=10**15, steps_per_s=steps_per_s)
        members.saw_presence(info, 30.0, 0.0)
    run = SimpleNamespace(tokens_per_step=4, pipeline=SimpleNamespace(stages=1), adapter=AdapterSection())
    swarm: Any = SimpleNamespace(
        presence=SimpleNamespace(me=PeerInfo(peer="me", is_bootstrap=True)),
        membership=members,
        accounting=SimpleNamespace(contributions=dict, acknowledged=dict, total=100, names={}),
        published=SimpleNamespace(run=run),
        node=SimpleNamespace(num_dht_records=0),
        serving=Serving(),
        reaching=SimpleNamespace(in_words=str),
    )
    board = StatusBoard("bootstrap", 0.0, now=Clock())
    pulse = Pulse(state=pb.PEER_STATE_SERVING, doing="")
    board.watch(Watched(pulse=lambda: pulse, run_name="tiny", run_sha256="ab" * 32, total_tokens=10**6))
    board.add_looker(swarm_looker(board, swarm))
    assert board.status().run_tokens == 100 + 15 * 4 * 3 * 3, "three at the usual speed"
    for peer in ("ben", "carl"):
        members.left(peer, 1.0)
    assert (board.status().run_tokens, board.status().end_time) == (10**6 - 1, 0.0), "a liar alone ends no run"
    swarm.accounting.total = 10**6
    assert board.status().run_tokens == 10**6 and board.status().end_time
