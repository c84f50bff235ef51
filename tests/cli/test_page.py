"""State of the page: what it says of a peer, to everybody and to the peer's own user."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fake_peer import make_status

from swarmtrain.cli.page import MachineUse, page_of
from swarmtrain.cli.peers import PeerPhase, View
from swarmtrain.v1 import control_pb2 as wire

NOW = 1_800_000_000.0


def view_of(phase: PeerPhase = PeerPhase.RUNNING, **changes: Any) -> View:
    status = make_status(**{"time": NOW - 2, "started_time": NOW - 4000, "end_time": NOW + 147, **changes})
    return View(status=status, phase=phase, folder=Path("/home/anna/secret"), now=NOW)


def everybody(view: View) -> tuple[dict[str, Any], dict[str, Any]]:
    (panels, rows), _ = page_of(view)
    json.dumps([panels, rows], allow_nan=False)
    return dict(panels), dict(rows)


def owner(view: View, use: MachineUse | None = None) -> dict[str, Any]:
    _, (panels, _) = page_of(view, use)
    return dict(panels)


def test_the_first_answers_are_those_of_the_terminal() -> None:
    panels, _ = everybody(view_of())
    learns, ends, here = ((each["answer"], each["more"]) for each in panels["answers"])
    assert learns == ("Yes: 2.100 nats/byte", "held-out loss, down from 4.750")
    assert ends == ("about 2 min 27 s left", "40% of 3 M tokens")
    assert here == ("2 volunteers", "12.3 k tokens/s together, 1 more took part before")
    assert panels["head"]["sentence"] == "training round 12: 14 of 25 steps" and panels["head"]["tone"] == "good"
    assert panels["progress"]["done"] == 0.4 and panels["progress"]["end_time"] == NOW + 147


def test_a_held_out_loss_of_long_ago_is_no_answer() -> None:
    view = view_of()
    for point in view.status.losses[1:]:
        point.held_out_loss = 0
    view.status.losses[1].held_out_loss = 4.5
    learns = everybody(view)[0]["answers"][0]
    assert (learns["answer"], learns["more"]) == ("Yes: 2.250 nats/token", "training loss, down from 4.750")


def test_an_old_held_out_loss_and_an_old_sample_have_their_age() -> None:
    """Seen: a loss of an hour ago looked like one of now."""

    def told(view: View, history: wire.RunHistory | None) -> tuple[str, str]:
        panels = page_of(view, None, history)[0][0]
        return panels["answers"][0]["more"], panels["sample"]["age"] if history else ""

    sampled = history()
    sampled.sample.time = NOW - 3 * 3600
    del sampled.points[:]
    assert told(view_of(held_out_time=NOW - 299), None)[0] == "held-out loss, down from 4.750"
    assert told(view_of(held_out_time=math.nan), None)[0] == "held-out loss, down from 4.750"
    assert told(view_of(held_out_time=NOW - 725), sampled) == (
        "held-out loss, down from 4.750, 12 min ago",
        ", 3 h ago",
    )
    ended = view_of(PeerPhase.ENDED, time=NOW - 3 * 3600 + 7, held_out_time=NOW - 4 * 3600)
    assert told(ended, sampled) == ("held-out loss, down from 4.750, 1 h before the end", "")
    sampled.points.add(run_tokens=1_150_000, time=NOW - 600, held_out_loss=2.1)
    assert told(view_of(held_out_time=NOW - 9000), sampled)[0].endswith(", 10 min ago"), "of the swarm's newest"


@pytest.mark.parametrize(
    ("newest", "answer", "more"),
    [
        (4.0, "Yes: 4.000 nats/token", "training loss, down from 4.750"),
        (4.7, "4.700 nats/token", "training loss, down from 4.750"),
        (4.8, "4.800 nats/token", "training loss, up from 4.750"),
        (6.5, "No: 6.500 nats/token", "training loss, up from 4.750"),
    ],
)
def test_whether_it_learns_is_said_where_it_is_more_than_chance(newest: float, answer: str, more: str) -> None:
    view = view_of(held_out_loss=0)
    for point in view.status.losses:
        point.held_out_loss = 0
    view.status.losses[-1].loss = newest
    learns = everybody(view)[0]["answers"][0]
    assert (learns["answer"], learns["more"]) == (answer, more)


def test_losses_are_explained() -> None:
    view = view_of(vocabulary_size=256)
    told = everybody(view)[0]["learning"]["help"]
    assert "A blind guess among its 256 tokens would be 5.545 nats/token; 2.250 is as unsure as a blind guess" in told
    assert "among 9.5 tokens" in told and "a blind guess: 5.545" in told
    del view.status.losses[:]
    view.status.vocabulary_size = 50_257
    told = everybody(view)[0]["learning"]["help"]
    assert "among its 50.3 k tokens would be 10.825 nats/token. Nats/byte" in told
    view.status.vocabulary_size = 0
    assert everybody(view)[0]["learning"]["help"].startswith("Nats say how unsure the model is")
    view.status.losses.add(round=1, run_tokens=1, loss=900.0, time=NOW)
    assert "as unsure as a blind guess among" in everybody(view)[0]["learning"]["help"]


def test_a_peer_that_has_ended_says_how_far_it_came() -> None:
    learnt, how_far, who = everybody(view_of(PeerPhase.ENDED, end_time=0))[0]["answers"]
    assert (learnt["name"], how_far["name"], who["name"]) == ("Did it learn?", "How far did it come?", "Who took part?")
    assert how_far["answer"] == "40% of 3 M tokens"


def test_a_folder_is_named_from_the_home_folder_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    assert dict(owner(view_of())["machine"]["facts"])["Folder"] == "~/secret"
    monkeypatch.setenv("HOME", "/home/anna2")
    assert dict(owner(view_of())["machine"]["facts"])["Folder"] == "/home/anna/secret"


def test_rows_are_the_peers_with_their_shares() -> None:
    _, rows = everybody(view_of())
    by_name = {row["name"]: row for row in rows.values()}
    assert [by_name[name]["share"] for name in ("anna", "bert", "cleo", "bootstrap")] == ["33%", "50%", "17%", ""]
    assert by_name["anna"]["me"] and by_name["anna"]["reached"] == ""
    assert by_name["bert"]["here"] and not by_name["cleo"]["here"] and by_name["cleo"]["speed"] == ""
    assert by_name["bootstrap"]["bootstrap"] and by_name["bootstrap"]["round"] == -1


def test_a_paused_peer_is_here_on_its_own_page() -> None:
    view = view_of(state=wire.PEER_STATE_PAUSED, end_time=0)
    for peer in view.status.peers:
        peer.present = peer.bootstrap
    panels, rows = everybody(view)
    by_name = {row["name"]: row for row in rows.values()}
    assert by_name["anna"]["here"] and by_name["anna"]["doing"] == "paused" and by_name["anna"]["round"] == -1
    assert not by_name["bert"]["here"] and by_name["bert"]["doing"] == ""
    _, ends, here = ((each["answer"], each["more"]) for each in panels["answers"])
    assert ends == ("nobody trains now", "40% of 3 M tokens")
    view.status.peers[1].present = True
    assert everybody(view)[0]["answers"][1]["answer"] == "not known while paused"
    assert here[0] == "0 volunteers" and here[1].endswith("this peer is paused, 2 took part before")


def test_who_is_hidden_and_when_it_was_heard_of() -> None:
    view = view_of()
    view.status.peers[1].hidden, view.status.peers[1].heard_time, view.status.peers[1].device = True, NOW - 7, "cpu"
    row = everybody(view)[1][view.status.peers[1].peer]
    assert (row["reached"], row["heard"], row["device"]) == ("through hosts", NOW - 7, "cpu")


def test_curves_are_of_what_was_measured() -> None:
    view = view_of()
    view.status.losses.add(round=12, run_tokens=1_200_000, loss=math.inf, time=NOW)
    learning = everybody(view)[0]["learning"]
    assert learning["own"]["loss"][:2] == [4.75, 4.5] and len(learning["own"]["loss"]) == 11
    assert learning["swarm"]["loss"] == []
    assert learning["held_out"]["loss"][-1] == 2.25 and len(learning["held_out"]["tokens"]) == 9


def test_a_long_curve_is_thinned() -> None:
    view = view_of()
    del view.status.losses[:]
    for number in range(1, 2001):
        view.status.losses.add(round=number, run_tokens=number, loss=3 + math.sin(number), time=NOW + number)
    curve = everybody(view)[0]["learning"]["own"]
    assert len(curve["loss"]) == len(curve["time"]) == len(curve["tokens"]) == 600
    assert (curve["tokens"][0], curve["tokens"][-1]) == (1, 2000)


def test_strangers_do_not_see_the_machine() -> None:
    view = view_of(end_reason="/home/anna/secret is full", exit_code=1)
    told = json.dumps(everybody(view))
    assert "secret" not in told and everybody(view)[0]["machine"] is None
    assert everybody(View(status=view.status, phase=PeerPhase.FAILED, folder=view.folder, now=NOW))[0]["head"][
        "sentence"
    ].startswith("failed ")
    for phase in PeerPhase:
        seen = View(status=view.status, phase=phase, folder=view.folder, now=NOW)
        assert "secret" not in json.dumps(page_of(seen)[0]), phase
    assert "secret" in json.dumps(owner(view))
    assert owner(view)["notices"][0][1].startswith("the disk is full")
    assert everybody(view)[0]["notices"] == []


def test_the_own_user_sees_the_machine_and_its_limits() -> None:
    machine = owner(view_of(), MachineUse(processor_share=1.84, memory_bytes=512_000_000))["machine"]
    facts = dict(machine["facts"])
    assert facts["Uses now"] == "1.8 processors, 512 MB of memory"
    assert facts["Contributed"] == "400 k tokens, 33% of all" and facts["Folder"] == "/home/anna/secret"
    assert machine["limits"] | {"threads": 2, "hours": "22-7", "nice": 10, "memory": "none"} == machine["limits"]
    assert machine["limits"]["gpu_share"] is None, "there is no card"
    assert machine["running"] and machine["volunteer"] and not machine["paused"]
    assert owner(view_of(state=wire.PEER_STATE_PAUSED))["machine"]["paused"]
    assert not owner(view_of(PeerPhase.ENDED))["machine"]["running"]


def test_a_bootstrap_has_no_limits_to_change() -> None:
    machine = owner(view_of(role="bootstrap"))["machine"]
    assert machine["limits"] is None and not machine["volunteer"] and "Contributed" not in dict(machine["facts"])


def test_stages_are_shown_with_their_holders() -> None:
    view = view_of()
    assert everybody(view)[0]["pipeline"] is None
    view.status.stages.add(number=1, num_peers=0, most_tokens_per_s=0)
    view.status.stages.add(number=0, num_peers=2, tokens_per_s=1200, most_tokens_per_s=2000, mine=True, queue=3)
    for peer in view.status.peers[:2]:
        peer.stages.append(0)
    first, second = everybody(view)[0]["pipeline"]
    assert first == {
        "number": 0,
        "mine": True,
        "holders": "anna, bert",
        "speed": "1.2 k tokens/s",
        "most": "2 k tokens/s",
        "queue": 3.0,
    }
    assert second["holders"] == "nobody"
    assert everybody(view)[1][view.status.peers[0].peer]["stages"] == "stage 0"


@pytest.mark.parametrize("name", ["<img src=x onerror=alert(1)>", "a\x1b[2Jb", "a\u202eb", "x" * 500, "\ud800"])
def test_hostile_names_are_short_text(name: str) -> None:
    view = view_of()
    if name.isascii() or name.isprintable() or name != "\ud800":
        view.status.peers[1].name = name
    row = everybody(view)[1][view.status.peers[1].peer]
    assert row["name"].isprintable() and len(row["name"]) <= 32


def test_numbers_that_are_none_are_zero() -> None:
    nan = math.nan
    view = view_of(end_time=nan, swarm_tokens_per_s=nan, stall_share=math.inf, held_out_loss=nan, sent_bytes_per_s=nan)
    view.status.peers[1].tokens_per_s = view.status.peers[1].heard_time = nan
    panels, _ = everybody(view)
    assert panels["progress"]["end_time"] == 0


def test_before_there_is_a_status() -> None:
    panels, rows = everybody(View(status=wire.PeerStatus(), phase=PeerPhase.STARTING, now=NOW))
    assert rows == {} and panels["answers"][0]["answer"] == "no loss yet"
    assert panels["head"]["sentence"] == "it is starting, and does not answer yet"


def history() -> wire.RunHistory:
    """The record of the run of a volunteer that came late."""
    told = wire.RunHistory(run_sha256="ab" * 32, total_tokens=3_000_000)
    for number in range(1, 12):
        told.points.add(run_tokens=number * 100_000, time=NOW - 5000 + number, loss=6 - number / 4)
    told.points.add(run_tokens=500_000, time=NOW - 4000, held_out_loss=3.5)
    told.points.add(run_tokens=1_150_000, time=NOW - 100, held_out_loss=1.5)
    told.events.add(time=1, event="peer_joined", words="peer anna joined", count=1, last_time=1)
    told.events.add(time=2, event="refused", words="refused what <b>m</b> sent", count=7, last_time=9)
    told.events.add(time=3, event="warning", words="warning: /home/anna/secret is full", count=1, last_time=3)
    told.sample.prompt, told.sample.text, told.sample.run_tokens = "def ", "f():\n\x1b[2J<script>", 1_150_000
    return told


def with_history(view: View, told: wire.RunHistory) -> tuple[dict[str, Any], dict[str, Any]]:
    (anybodys, _), (mine, _) = page_of(view, None, told)
    return dict(anybodys), dict(mine)


def test_a_late_volunteers_curves_begin_with_the_run() -> None:
    view = view_of(held_out_loss=0)
    del view.status.losses[:]
    view.status.losses.add(round=11, run_tokens=1_100_000, loss=3.2, time=NOW - 60)
    learning = with_history(view, history())[0]["learning"]
    assert learning["swarm"]["tokens"][0] == 100_000 and len(learning["swarm"]["tokens"]) == 11
    assert learning["own"]["tokens"] == [1_100_000]
    assert learning["held_out"]["loss"] == [3.5, 1.5]
    answer = with_history(view, history())[0]["answers"][0]
    assert (answer["answer"], answer["more"]) == (
        "Yes: 1.500 nats/byte",
        "held-out loss, down from 3.500",
    )


def test_what_happened_is_told_without_what_is_the_machines() -> None:
    anybodys, mine = with_history(view_of(), history())
    assert [event[1] for event in mine["events"]] == [
        "refused what <b>m</b> sent",
        "warning: /home/anna/secret is full",
        "peer anna joined",
    ]
    assert mine["events"][0][2] == 7 and "secret" not in json.dumps(anybodys)
    assert len(anybodys["events"]) == 2


def test_a_sample_is_text_with_lines_and_nothing_else() -> None:
    sample = with_history(view_of(), history())[0]["sample"]
    assert sample["text"] == "f():\n\ufffd[2J<script>" and sample["tokens"] == "1.15 M"
    assert everybody(view_of())[0]["sample"] is None


def test_the_invite_is_the_own_users_unless_the_run_shows_it() -> None:
    anybodys, mine = with_history(view_of(), history())
    assert anybodys["invite"] is None and mine["invite"]["line"].startswith("swarmtrain join st1")
    code = mine["invite"]["code"]
    assert code["width"] > 20 and code["path"].startswith("M0 0h7v1h-7z"), "a finder pattern of seven modules"
    shown = view_of(shows_invite=True)
    assert with_history(shown, history())[0]["invite"] == mine["invite"]
    assert with_history(view_of(invite_line="x" * 5000), history())[1]["invite"]["code"] is None
    assert with_history(view_of(invite_line=""), history())[1]["invite"] is None
