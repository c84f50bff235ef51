"""Prometheus metrics: a scrape tells what `status` shows, and what the events add up to."""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from codes import raises_code
from prometheus_client import REGISTRY
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as plain_text

from swarmtrain.errors import UserError
from swarmtrain.events import (
    DeviceEvent,
    EvalEvent,
    FetchedEvent,
    JoinedEvent,
    RefusedEvent,
    RoundEvent,
    StartedEvent,
    WarningEvent,
)
from swarmtrain.peer.control.board import Pulse, StatusBoard, Watched
from swarmtrain.peer.control.metrics import METRICS, EventCounts, MetricsServer, PeerCollector, serving_metrics
from swarmtrain.peer.control.server import read_status
from swarmtrain.peer.control.session import control_session
from swarmtrain.peer.estimate import estimate, estimates_of
from swarmtrain.peer.lifecycle.folder import peer_folder
from swarmtrain.peer.lifecycle.node import PeerSettings
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.run import parse_run
from swarmtrain.v1 import control_pb2 as pb

ROOT = Path(__file__).resolve().parents[3]
RUN = parse_run("[run]\ntotal_tokens = 9000\n", "r")
ANY_PORT = "127.0.0.1:0"
LIMIT_S = 30.0
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


def get(where: str, accept: str = "text/plain") -> tuple[int, str]:
    with closing(http.client.HTTPConnection(where, timeout=LIMIT_S)) as connection:
        connection.request("GET", "/metrics", headers={"Accept": accept})
        reply = connection.getresponse()
        return reply.status, reply.read().decode()


def scraped(where: str) -> dict[str, float]:
    """Every sample by its name, with the label's value after a colon."""
    status, text = get(where)
    assert status == 200
    found = {}
    for family in plain_text(text):
        for sample in family.samples:
            if not sample.name.endswith("_info"):
                found[":".join([sample.name, *sample.labels.values()])] = sample.value
    return found


def round_event(number: int = 6, **changes: Any) -> RoundEvent:
    given = {"round": number, "inner_steps": 64, "tokens": 1000, "run_tokens": 7000, "loss": 2.5, "first_loss": 3.0}
    given |= {
        "learning_rate": 0.1,
        "seconds": 8.0,
        "merge_s": 1.5,
        "stall_s": 1.75,
        "bytes_sent": 1,
        "bytes_received": 1,
    }
    given |= {"partners": ("P",), "weights": (1,), "signer": "P", "state_sha256": "ab"}
    return RoundEvent.model_validate(given | changes)


class Peer:
    """Status board whose clock the test moves, and its metrics."""

    def __init__(self) -> None:
        self.now = 0.0
        self.healthy = True
        self.board = StatusBoard("volunteer", 1000.5, now=lambda: self.now, wall=lambda: 2000.0)
        self.estimates = estimates_of(RUN, 1_000_000)
        state = pb.PEER_STATE_TRAINING
        self.board.watch(Watched(pulse=lambda: Pulse(state=state, doing=""), estimates=self.estimates))
        self.where = ""

    def train(self) -> None:
        """Train to the middle of round 7."""
        board = self.board
        board.take(
            FetchedEvent(run_sha256="ab" * 32, run_name="tiny", held_out_bytes=1, from_peer="B", total_tokens=9000)
        )
        board.take(JoinedEvent(round=6, run_tokens=6000, num_peers=2, state_from="", wall_s=1.0))
        board.take(StartedEvent(inner_steps_per_round=64, num_parameters=10, total_tokens=9000, startup_s=1.0))
        for event in (round_event(5), round_event(6)):
            board.take(event)
        board.add_looker(self.look)
        for self.now, steps in ((0.0, 0), (10.0, 20)):
            self.pulse(steps, 4000)
            board.tick()

    def pulse(self, steps: int, sent_bytes: int) -> None:
        state = pb.PEER_STATE_TRAINING
        self.board.watch(
            Watched(
                pulse=lambda: Pulse(state=state, doing="training", round=7, num_steps=steps, sent_bytes=sent_bytes),
                peer="P",
                name="anna",
                run_name="tiny",
                run_sha256="ab" * 32,
                total_tokens=9000,
                tokens_per_step=512,
                estimates=self.estimates,
            )
        )

    def look(self, status: pb.PeerStatus) -> None:
        status.own_tokens, status.dht_records = 2000, 12
        status.checkpoint.time = 1999.0
        for name, bootstrap, present in (("anna", False, True), ("ben", False, False), ("boot", True, True)):
            status.peers.add(peer=name, bootstrap=bootstrap, present=present)


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    with serving_metrics(ANY_PORT, peer.board, lambda: peer.healthy) as peer.where:
        yield peer


def test_a_scrape_tells_what_the_status_shows_and_the_events_add_up_to(peer: Peer) -> None:
    peer.train()
    for rule in ("hash", "shape", "hash"):
        peer.board.take(RefusedEvent(from_peer="Q", rule=rule, detail="?"))
    peer.board.take(WarningEvent(message="the disk is full"))
    found, status = scraped(peer.where), peer.board.status()
    assert found.pop("swarmtrain_memory_bytes") > 1e6
    expected = estimate(RUN, 1_000_000, 1)
    assert {key: value for key, value in found.items() if not key.startswith(("process_", "swarmtrain_state:"))} == {
        "swarmtrain_training": 1.0,
        "swarmtrain_healthy": 1.0,
        "swarmtrain_start_time_seconds": 1000.5,
        "swarmtrain_peers:volunteer": 1.0,
        "swarmtrain_peers:bootstrap": 1.0,
        "swarmtrain_round": status.round,
        "swarmtrain_loss": 2.5,
        "swarmtrain_tokens_total": status.own_tokens,
        "swarmtrain_tokens_per_second": status.own_tokens_per_s,
        "swarmtrain_run_tokens": status.run_tokens,
        "swarmtrain_run_target_tokens": 9000.0,
        "swarmtrain_run_tokens_per_second": status.swarm_tokens_per_s,
        "swarmtrain_rounds_total": 2.0,
        "swarmtrain_inner_steps_total": 128.0,
        "swarmtrain_inner_steps_per_second": status.own_tokens_per_s / 512,
        "swarmtrain_round_seconds_total": 16.0,
        "swarmtrain_merge_seconds_total": 3.0,
        "swarmtrain_stall_seconds_total": 3.5,
        "swarmtrain_sent_bytes_total": 4000.0,
        "swarmtrain_received_bytes_total": 0.0,
        "swarmtrain_estimated_round_sent_bytes": expected.bytes_sent_per_round,
        "swarmtrain_estimated_round_most_sent_bytes": expected.bytes_sent_most_per_round,
        "swarmtrain_estimated_round_received_bytes": expected.bytes_received_per_round,
        "swarmtrain_estimated_memory_bytes": expected.memory_bytes,
        "swarmtrain_checkpoint_time_seconds": 1999.0,
        "swarmtrain_dht_records": 12.0,
        "swarmtrain_refused_total:hash": 2.0,
        "swarmtrain_refused_total:shape": 1.0,
        "swarmtrain_warnings_total": 1.0,
        "swarmtrain_catch_ups_total": 0.0,
        "swarmtrain_peers_lost_total": 0.0,
    }
    assert (status.own_tokens, status.round) == (2000, 7)
    assert status.own_tokens_per_s == pytest.approx(1024, rel=0.01), "two steps of 512 tokens a second"
    assert {key for key, value in found.items() if key.startswith("swarmtrain_state:") and value} == {
        "swarmtrain_state:training"
    }
    assert found["process_resident_memory_bytes"] > 1e6
    peer.healthy = False
    assert scraped(peer.where)["swarmtrain_healthy"] == 0.0


def test_it_is_said_which_peer_it_is_and_in_the_strict_format_too(peer: Peer) -> None:
    peer.train()
    status, text = get(peer.where, OPEN_METRICS)
    assert status == 200
    families = {family.name: family for family in open_metrics(text)}
    (sample,) = families["swarmtrain"].samples
    assert sample.labels.items() >= {"run": "tiny", "name": "anna", "peer": "P", "role": "volunteer"}.items()
    assert families["swarmtrain_stall_seconds"].unit == "seconds" and families["swarmtrain_sent_bytes"].unit == "bytes"
    assert all(family.documentation for name, family in families.items() if name.startswith("swarmtrain"))


def test_what_is_expected_follows_who_is_there(peer: Peer) -> None:
    """By the estimate of `check`; nothing is expected of a bootstrap, or before it is known who is there."""
    before = scraped(peer.where)
    assert not [name for name in before if "estimated" in name] and before["swarmtrain_memory_bytes"] > 1e6
    peer.train()
    peer.board.add_looker(lambda status: [status.peers.add(peer=f"{n}", present=True) for n in range(3)] and None)
    found, expected = scraped(peer.where), estimate(RUN, 1_000_000, 4)
    assert found["swarmtrain_estimated_memory_bytes"] == expected.memory_bytes
    assert found["swarmtrain_estimated_round_sent_bytes"] == expected.bytes_sent_per_round > 0
    assert estimate(RUN, 1_000_000, 1).memory_bytes < expected.memory_bytes


def test_the_loss_on_each_source_has_its_name_as_a_label(peer: Peer) -> None:
    peer.train()
    assert not [name for name in scraped(peer.where) if "source" in name]
    peer.board.take(EvalEvent(round=3, held_out_loss=2.0, sources=("code", "prose"), source_losses=(2.5, 1.5)))
    found = {name: value for name, value in scraped(peer.where).items() if "source" in name}
    assert found == {"swarmtrain_source_held_out_loss:code": 2.5, "swarmtrain_source_held_out_loss:prose": 1.5}


def test_what_is_not_known_yet_is_left_out(peer: Peer) -> None:
    """A count of tokens that began at 0 and then had those of earlier lives would look like a leap."""
    found = scraped(peer.where)
    assert found["swarmtrain_training"] == 0.0 and found["swarmtrain_state:starting"] == 1.0
    assert not {"swarmtrain_tokens_total", "swarmtrain_loss", "swarmtrain_held_out_loss", "swarmtrain_round"} & set(
        found
    )


def test_a_bootstrap_has_no_speed_and_no_tokens() -> None:
    board = StatusBoard("bootstrap", 0.0)
    board.doing(pb.PEER_STATE_SERVING, "serving the run")
    with serving_metrics(ANY_PORT, board, lambda: True) as where:
        found = scraped(where)
    assert found["swarmtrain_state:serving"] == 1.0 and found["swarmtrain_run_tokens"] == 0.0
    assert not {"swarmtrain_tokens_total", "swarmtrain_inner_steps_per_second"} & set(found)
    assert not [name for name in found if "estimated" in name]


def test_the_device_and_the_precision_are_labels_once_they_are_known(peer: Peer) -> None:
    def told() -> list[dict[str, str]]:
        families = {family.name: family for family in plain_text(get(peer.where)[1])}
        return [sample.labels for name, family in families.items() if "device" in name for sample in family.samples]

    assert told() == []
    event = DeviceEvent(
        device="cuda:0", title='A "Card"', precision="bf16", microbatch_sequences=4, batch_sequences=8, why="it works"
    )
    peer.board.take(event)
    peer.board.take(event.model_copy(update={"microbatch_sequences": 2}))
    assert told() == [{"device": "cuda:0", "title": 'A "Card"', "precision": "bf16"}]
    (family,) = [each for each in open_metrics(get(peer.where, OPEN_METRICS)[1]) if each.name == "swarmtrain_device"]
    assert family.type == "info" and family.samples[0].name == "swarmtrain_device_info"


def test_a_counter_never_shrinks(peer: Peer) -> None:
    """To Prometheus that is a new beginning, and all that was sent is counted again."""
    peer.train()
    peer.pulse(20, 9000)
    assert scraped(peer.where)["swarmtrain_sent_bytes_total"] == 9000.0
    peer.board.doing(pb.PEER_STATE_FINISHING, "saying goodbye")
    assert peer.board.status().sent_bytes < 9000
    assert scraped(peer.where)["swarmtrain_sent_bytes_total"] == 9000.0


def test_rules_do_not_become_endless() -> None:
    counts = EventCounts()
    for number in range(100):
        counts.take(RefusedEvent(from_peer="Q", rule=f"rule {number}", detail="?"))
    counts.take(RefusedEvent(from_peer="Q", rule="rule 3", detail="?"))
    assert len(counts.refused()) == 33 and counts.refused()["other"] == 68 and counts.refused()["rule 3"] == 2


# ---------------------------------------------------------------- the server


def life(folder: Path, metrics: str) -> ExitStack:
    stack = ExitStack()
    held = stack.enter_context(peer_folder(folder))
    settings = PeerSettings(directory=folder, name="anna", metrics=metrics)
    try:
        stack.enter_context(control_session("volunteer", held, settings, lambda event: None, StopFlag()))
    except BaseException:
        stack.close()
        raise
    return stack


def test_a_port_that_is_taken_ends_the_peer_before_it_begins(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        where = f"127.0.0.1:{other.getsockname()[1]}"
        with raises_code("metrics-address", UserError, where, "--metrics"):
            life(tmp_path, where)
    status = read_status(tmp_path)
    assert status is not None and (status.state, status.exit_code) == (pb.PEER_STATE_FAILED, 2)


def test_the_server_lives_as_long_as_the_peer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "swarmtrain.peer.control.metrics")
    with life(tmp_path, ANY_PORT):
        (where,) = re.findall("metrics at http://(.*)/metrics", caplog.text)
        assert scraped(where)["swarmtrain_state:starting"] == 1.0
        assert "metrics" in {thread.name for thread in threading.enumerate()}
    assert "metrics" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(ConnectionError):
        get(where)
    assert not [family.name for family in REGISTRY.collect() if family.name.startswith("swarmtrain")]


def test_a_foreign_name_that_leads_here_is_refused(tmp_path: Path) -> None:
    """DNS rebinding: a page in this machine's browser asks under its own name."""
    with serving_metrics("127.0.0.1:0", StatusBoard("volunteer", 0.0), lambda: True) as where:
        for host, code in (("evil.example", 403), (f"evil.example:{where.rpartition(':')[2]}", 403), (where, 200)):
            call = http.client.HTTPConnection(where, timeout=10)
            call.request("GET", "/metrics", headers={"Host": host})
            assert call.getresponse().status == code
            call.close()


def test_an_address_of_another_machine_is_one_line() -> None:
    with (
        raises_code("metrics-address", UserError, "203.0.113.7:9100", "another with --metrics"),
        serving_metrics("203.0.113.7:9100", StatusBoard("volunteer", 0.0), lambda: True),
    ):
        raise AssertionError("it must not come so far")


def test_who_takes_no_answer_takes_no_more_than_some_room(peer: Peer) -> None:
    host, _, port = peer.where.rpartition(":")
    with ExitStack() as idle:
        for _ in range(8):
            idle.enter_context(socket.create_connection((host, int(port)), LIMIT_S))
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            get(peer.where)
    give_up_s = time.monotonic() + LIMIT_S
    while time.monotonic() < give_up_s:  # they have hung up, which is noticed in a moment
        with suppress(http.client.RemoteDisconnected, ConnectionError):
            assert get(peer.where)[0] == 200
            return
    raise AssertionError("there is no room again")


def test_a_look_that_fails_costs_one_scrape(caplog: pytest.LogCaptureFixture) -> None:
    board = StatusBoard("volunteer", 0.0)
    broken = [True]

    def is_healthy() -> bool:
        if broken[0]:
            raise RuntimeError("dictionary changed size during iteration")
        return True

    server = MetricsServer(ANY_PORT, PeerCollector(board, EventCounts(), is_healthy))
    where = server.start()
    try:
        status, text = get(where)
        assert (status, text) == (500, "metrics could not be collected; the peer's log says why\n")
        broken[0] = False
        assert get(where)[0] == 200
    finally:
        server.stop()
    (record,) = [record for record in caplog.records if record.name == "swarmtrain.peer.control.metrics"]
    assert record.exc_info is not None and "changed size" in str(record.exc_info[1])


def test_all_of_them_are_in_the_document() -> None:
    page = (ROOT / "docs" / "control.md").read_text(encoding="utf-8")
    rows = [f"| `{metric.exposed}` | {metric.meaning} |" for metric in METRICS]
    table = [line for line in page.splitlines() if line.startswith("| `swarmtrain_")]
    assert table == rows, "the table in docs/control.md:\n" + "\n".join(rows)
