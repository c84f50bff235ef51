"""Report of a run: what is in it, however the peer ended, what is not in it, and what it does in a browser: nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from codes import codes_in
from fake_peer import FakePeer, living, make_status

from swarmtrain.cli.facts import sentence
from swarmtrain.cli.main import run
from swarmtrain.cli.peers import PeerPhase, View
from swarmtrain.cli.report_page import KNOWN_CONTRIBUTORS, ReportSources, report_of
from swarmtrain.peer.control.session import MAX_SHOWN_PEERS
from swarmtrain.v1 import control_pb2 as wire

NOW = 1_800_000_000.0
RUN = """[run]
name = "stdlib-gpt"
total_tokens = 3000000

[data]
source = "python-stdlib"

[published]
created = "2026-12-01T12:00:00.000000+00:00"
swarmtrain = "0.2.0"
held_out_sha256 = "{digest}"
held_out_bytes = 4096
""".format(digest="cd" * 32)
NASTY = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>"


def record(*, about: str = "12D3KooWexampleCleo01") -> wire.RunHistory:
    """The record of a run that anna trained with bert and cleo."""
    told = wire.RunHistory(run_sha256="ab" * 32, total_tokens=3_000_000)
    for number in range(1, 12):
        told.points.add(run_tokens=number * 100_000, time=NOW - 1000 + number, loss=6 - number / 4)
    told.points.add(run_tokens=500_000, time=NOW - 500, held_out_loss=3.5)
    told.points.add(run_tokens=1_100_000, time=NOW - 100, held_out_loss=2.1)
    for after_s, event, words, peer in (
        (1, "peer_joined", "peer cleo joined", about),
        (2, "peer_lost", "peer cleo is lost: it does not answer", about),
        (3, "refused", "refused what mallory sent (finite): 7 NaNs", "12D3KooWexampleMallory"),
        (4, "warning", "warning: /home/anna/secret is full", ""),
    ):
        at = NOW - 900 + after_s
        told.events.add(time=at, event=event, words=words, count=1, last_time=at, about=peer)
    told.sample.prompt, told.sample.text, told.sample.run_tokens = "def ", "f():\n\treturn 1", 1_100_000
    return told


def left(folder: Path, status: wire.PeerStatus | None = None, history: wire.RunHistory | None = None) -> Path:
    """The folder of a peer whose process is gone."""
    peer = FakePeer(folder, status or make_status(role="volunteer"))
    peer.save()
    (folder / "run.toml").write_text(RUN)
    (folder / "history.pb").write_bytes((history or record()).SerializeToString())
    return folder


def reported(folder: Path, *given: str) -> str:
    """The report's document."""
    target = folder.parent / "run.html"
    assert run(["report", "--dir", str(folder), "--to", str(target), *given]) == 0
    return target.read_text(encoding="utf-8")


class _Elements(HTMLParser):
    """All elements of a document, its text, and the contents of its scripts and styles."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self._inside = ""
        self.feed(document)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attributes}))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.raw.get(self._inside, self.text).append(data)


def words_of(document: str) -> str:
    return " ".join(" ".join(_Elements(document).text).split())


def told_by(status: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert run([*status, "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def test_an_old_loss_of_a_running_peer_is_dated_by_the_report(tmp_path: Path) -> None:
    told = record()
    told.points[-1].time = NOW - 7300
    told.points[-2].time = NOW - 7300
    view = View(status=make_status(time=NOW), phase=PeerPhase.RUNNING, now=NOW)
    html = report_of(ReportSources(view=view, history=told, run_toml=b"")).html
    assert ", 2 h before this report" in html and "2 h ago" not in html


@pytest.mark.parametrize("state", [wire.PEER_STATE_DONE, wire.PEER_STATE_TRAINING, wire.PEER_STATE_FAILED])
def test_a_folder_says_how_its_run_went(state: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After an end, after a kill, after a failure."""
    folder = left(tmp_path / "anna", make_status(state=state, end_reason="total_tokens"))
    document = reported(folder)
    words = words_of(document)
    for name in ("anna", "bert", "cleo", "bootstrap"):
        assert name in words
    figures = told_by(["report", "--dir", str(folder), "--to", str(tmp_path / "again.html")], capsys)
    status = told_by(["status", "--dir", str(folder)], capsys)
    assert figures["figures"] == {name: status[name] for name in figures["figures"]}
    assert {"peers", "run_tokens", "held_out_loss", "process", "sent_bytes"} <= figures["figures"].keys()
    assert figures["points"] == {"held_out": 9, "swarm": 11, "own": 11} and figures["size_bytes"] > 50_000
    data = json.loads(next(text for text in _Elements(document).raw["script"] if text.startswith("{")))
    assert data["figures"] == figures["figures"]
    assert data["learning"]["swarm"]["loss"][-1] == 3.25
    process = {wire.PEER_STATE_DONE: "ended", wire.PEER_STATE_TRAINING: "died", wire.PEER_STATE_FAILED: "failed"}[state]
    assert f"stdlib-gpt {process} as anna (volunteer) saw it" in words


def test_everyone_has_a_row_the_most_work_first(tmp_path: Path) -> None:
    status = make_status(state=wire.PEER_STATE_DONE)
    status.peers[2].device, status.peers[2].last_tokens_per_s = "RTX 4090", 1234.0
    document = reported(left(tmp_path / "anna", status))
    table = document[document.index('id="contributors"') :]
    rows = [words_of(row) for row in re.findall(r"<tr.*?</tr>", table[: table.index("</section>")])[1:]]
    bert, anna, cleo, bootstrap = rows
    assert bert.startswith("bert Bert01 50% 600 k 4 k tokens/s") and bert.endswith("was here at the last look")
    assert anna.startswith("anna Anna01 this peer 33% 400 k 4 k tokens/s ended, ")
    assert cleo.startswith("cleo Cleo01 17% 200 k 4 k tokens/s RTX 4090 was lost, 2027-01-15 07:45 UTC")
    assert bootstrap.startswith("bootstrap Boot01 bootstrap")


def test_a_running_peer_is_asked(peer: FakePeer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer.history = record()
    told = told_by(["report", "anna", "--dir", str(peer.folder), "--to", str(tmp_path / "now.html")], capsys)
    assert told["figures"]["process"] == "running" and told["points"]["swarm"] == 11
    words = words_of((tmp_path / "now.html").read_text())
    assert "The run file is not known here" in words and "is here" in words and "about 2 min" in words


def test_what_happened_is_grouped_bounded_and_in_order(tmp_path: Path) -> None:
    history = record()
    for number in range(700):
        words = f"peer n{number} joined" if number % 2 else "peer again joined"
        at = NOW + number
        history.events.add(time=at, event="peer_joined", words=words, count=1, last_time=at, about=f"p{number}")
    document = reported(left(tmp_path / "anna", history=history))
    section = document[document.index('id="events"') :]
    section = section[: section.index("</section>")]
    assert re.findall(r"<h3>(.*?)</h3>", section) == ["Who came and went", "What failed", "What was refused"]
    words = words_of(section)
    assert "peer again joined (350 times, the last 2027-01-15 08:11 UTC )" in words
    assert "… 152 more …" in words and section.count("<li") == 202 + 1 + 1 - 1
    assert words.index("peer n1 joined") < words.index("peer n699 joined") < words.index("peer cleo is lost")


def test_the_run_file_and_how_to_make_it_again(tmp_path: Path) -> None:
    document = reported(left(tmp_path / "anna"))
    words = words_of(document)
    link = next(found for tag, found in _Elements(document).found if tag == "a")
    saved = base64.b64decode(link["href"].partition(",")[2]).decode()
    assert link["download"] == "stdlib-gpt.toml"
    assert saved == RUN[: RUN.index("\n[published]")], "as one writes it: `bootstrap` refuses the rest"
    assert "swarmtrain local stdlib-gpt.toml --peers 3" in words and "swarmtrain check stdlib-gpt.toml" in words
    assert "ab" * 32 in words and "4096 bytes, SHA-256 " + "cd" * 32 in words
    assert "It learns from the standard library of Python" in words
    assert "was 2.100 nats/byte, at 1.1 M tokens" in words


def test_what_is_the_machines_own_is_told_only_if_asked_for(tmp_path: Path) -> None:
    folder = left(tmp_path / "anna", make_status(state=wire.PEER_STATE_FAILED, end_reason="/home/anna/secret is full"))
    document = reported(folder)
    assert "secret" not in document and str(folder) not in document and "st1xxx" not in document
    assert "the disk is full" not in document
    assert "1 event of this peer's own machine is not in this report." in words_of(document)
    told = words_of(reported(folder, "--with-machine"))
    assert "/home/anna/secret is full" in told and str(folder) in told and "the disk is full" in told
    assert "st1xxx" not in told, "the invite is nobody's to keep"


@pytest.mark.parametrize("phase", PeerPhase)
def test_strangers_are_not_told_why_it_failed_whatever_its_process_does(phase: PeerPhase) -> None:
    status = make_status(
        state=wire.PEER_STATE_FAILED, end_reason="/home/anna/secret is full", doing="ended: /home/anna/secret is full"
    )
    view = View(status=status, phase=phase, now=NOW)
    assert "secret" not in sentence(view, for_strangers=True)
    is_told = phase in (PeerPhase.RUNNING, PeerPhase.ENDING, PeerPhase.SILENT, PeerPhase.FAILED, PeerPhase.ENDED)
    assert ("secret" in sentence(view)) == is_told
    if phase in (PeerPhase.RUNNING, PeerPhase.ENDING):
        assert sentence(view, for_strangers=True) == "ending"
        status.end_reason = "asked"
        assert sentence(view, for_strangers=True) == "ending: it was asked to leave"


@pytest.mark.parametrize("nasty", [NASTY, '"><svg onload=alert(1)>', "</script><b>", "</title><b>", "a\x1b[2J\u202eb"])
def test_hostile_text_stays_text(nasty: str, tmp_path: Path) -> None:
    status, history = make_status(state=wire.PEER_STATE_DONE), record()
    status.run_name = status.last_merge = status.reach = status.data = nasty
    for peer in status.peers:
        peer.name = peer.device = nasty
    status.peers[1].peer = nasty
    for event in history.events:
        event.words = event.about = nasty
    history.sample.prompt = history.sample.text = nasty
    folder = left(tmp_path / "anna", status, history)
    (folder / "run.toml").write_text(
        RUN.replace('"python-stdlib"', json.dumps("text") + f"\npaths = [{json.dumps(nasty)}]")
    )
    for given in ((), ("--with-machine",)):
        document = reported(folder, *given)
        elements = _Elements(document)
        assert len(elements.raw["script"]) == 3 and sum(tag == "script" for tag, _ in elements.found) == 3
        assert not {tag for tag, _ in elements.found} & {"img", "svg", "b", "iframe", "object"}
        names = {name for _, attributes in elements.found for name in attributes}
        assert not [name for name in names if name.startswith("on")]
        assert "\x1b" not in document and "\u202e" not in document


def test_it_asks_nobody_for_anything(tmp_path: Path) -> None:
    document = reported(left(tmp_path / "anna"))
    elements = _Elements(document)
    for tag, attributes in elements.found:
        for name in {"src", "href", "srcset", "action", "poster", "style"} & attributes.keys():
            assert attributes[name].startswith("data:"), (tag, attributes[name])
    (policy,) = (found["content"] for tag, found in elements.found if found.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    data, *scripts = elements.raw["script"]
    for text in (*scripts, *elements.raw["style"]):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert json.loads(data) and "fetch(" not in "".join(scripts) and "@import" not in elements.raw["style"][0]


def test_it_needs_neither_the_page_nor_torch(tmp_path: Path) -> None:
    words = ["report", "--dir", str(left(tmp_path / "anna")), "--to", str(tmp_path / "run.html")]
    code = (
        "import sys\n"
        "for name in ('starlette', 'uvicorn', 'segno', 'torch', 'matplotlib'): sys.modules[name] = None\n"
        f"from swarmtrain.cli.main import run; sys.exit(run({words!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote the report of stdlib-gpt to ")


def test_of_a_folder_with_all_peers_of_a_run_it_takes_the_bootstrap(tmp_path: Path) -> None:
    for name in ("volunteer-1", "bootstrap", "volunteer-2"):
        role = "bootstrap" if name == "bootstrap" else "volunteer"
        left(tmp_path / "runs" / name, make_status(name=name, role=role, state=wire.PEER_STATE_DONE))
    assert "as bootstrap (bootstrap) saw it" in words_of(reported(tmp_path / "runs"))
    assert "as volunteer-2 (volunteer) saw it" in words_of(reported(tmp_path / "runs", "volunteer-2"))
    with living(FakePeer(tmp_path / "runs" / "volunteer-1", make_status(name="volunteer-1")).start()):
        assert "as volunteer-1 (volunteer) saw it" in words_of(reported(tmp_path / "runs")), "who runs knows the most"


def test_a_record_of_an_earlier_run_is_not_this_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = record()
    history.run_sha256 = "ef" * 32
    folder = left(tmp_path / "anna", history=history)
    told = told_by(["report", "--dir", str(folder), "--to", str(tmp_path / "x.html")], capsys)
    assert told["points"]["swarm"] == 0 and told["points"]["own"] == 11 and told["events"] == 0


def test_without_a_run_there_is_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "run.html"
    (tmp_path / "empty").mkdir()
    for folder, code, said in (("empty", 2, "no-such-peer"), ("nowhere", 2, "no-such-folder")):
        assert run(["report", "--dir", str(tmp_path / folder), "--to", str(target)]) == code
        assert codes_in(capsys.readouterr().err) == [said]
    FakePeer(tmp_path / "anna", wire.PeerStatus(name="anna", state=wire.PEER_STATE_STARTING)).save()
    assert run(["report", "--dir", str(tmp_path / "anna"), "--to", str(target)]) == 1
    assert codes_in(capsys.readouterr().err) == ["nothing-to-report"] and not target.exists()


def test_damaged_files_cost_what_was_in_them(tmp_path: Path) -> None:
    folder = left(tmp_path / "anna")
    (folder / "history.pb").write_bytes(b"\xff" * 100)
    (folder / "run.toml").write_bytes(b"\xff\x00 not toml [")
    words = words_of(reported(folder))
    assert "bert" in words and "The run file is not known here" in words and "What happened" not in words


@pytest.mark.parametrize(
    "text",
    [
        "published = 3\n",
        "data = 3\n",
        "model = []\n",
        "[data]\nsources = 3\n",
        "[data]\nsources = [3]\n",
        '[data]\nsource = "text"\npaths = 3\n',
        '[[data.sources]]\nsource = "text"\npaths = 3\n',
        "[published]\ndataset_revisions = 3\n",
    ],
)
def test_a_run_file_with_other_types_is_one_that_is_not_known(text: str, tmp_path: Path) -> None:
    folder = left(tmp_path / "anna")
    (folder / "run.toml").write_text(text)
    assert "The run file is not known here" in words_of(reported(folder))


@pytest.mark.parametrize("created", ["3", '"yesterday"', '"0001-01-01T00:00:00"'])
def test_a_time_that_is_none_is_left_out(created: str, tmp_path: Path) -> None:
    folder = left(tmp_path / "anna")
    (folder / "run.toml").write_text(f'[run]\nname = "r"\n[published]\ncreated = {created}\n')
    assert "Save it as stdlib-gpt.toml" in words_of(reported(folder))


def test_only_its_own_files_are_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = left(tmp_path / "anna")
    first = reported(folder)
    assert reported(folder, "--with-machine") != first, "an earlier report is replaced"
    mine = tmp_path / "mine.html"
    mine.write_text("<p>my thesis</p>")
    for target, code, said in (
        (mine, 2, "file-exists"),
        (tmp_path / "run.pdf", 2, "bad-report-name"),
        (tmp_path / "nowhere" / "run.html", 2, "no-such-folder"),
    ):
        assert run(["report", "--dir", str(folder), "--to", str(target)]) == code
        assert codes_in(capsys.readouterr().err) == [said]
    assert mine.read_text() == "<p>my thesis</p>" and not list(tmp_path.glob(".run*"))
    assert run(["report", "--dir", str(folder)]) == 2


def test_of_a_thousand_peers_all_have_a_row(tmp_path: Path) -> None:
    status = make_status()
    del status.peers[:]
    for number in range(KNOWN_CONTRIBUTORS):
        status.peers.add(peer=f"12D3KooW{number:05}", name=f"n{number}", tokens=number)
    assert KNOWN_CONTRIBUTORS == MAX_SHOWN_PEERS
    document = reported(left(tmp_path / "anna", status))
    assert all(f"<bdi>n{number}</bdi>" in document for number in range(KNOWN_CONTRIBUTORS))
    assert "those present and those with the most work" in words_of(document)


def test_a_pipeline_has_its_stages(tmp_path: Path) -> None:
    status = make_status()
    status.stages.add(number=0, num_peers=2, tokens_per_s=1200, most_tokens_per_s=2000, mine=True)
    status.peers[0].stages.append(0)
    view = View(status=status, phase=PeerPhase.RUNNING, now=NOW)
    made = report_of(ReportSources(view=view, history=None, run_toml=b""))
    assert "0 anna 1.2 k tokens/s 2 k tokens/s" in words_of(made.html)
