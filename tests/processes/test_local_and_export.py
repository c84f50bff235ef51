"""Whole swarm by one command, and the resulting model."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from codes import codes_in
from preloaded import Preloaded
from safetensors import safe_open
from swarm import Finished, Swarm, exit_limit_s, write_run

from swarmtrain.errors import RunTimeError, UserError
from swarmtrain.events import ArchivedEvent, DoneEvent, RoundEvent, WarningEvent
from swarmtrain.model.export import load_exported
from swarmtrain.model.provenance import tokens_of_export
from swarmtrain.peer.control.history import read_history

pytestmark = pytest.mark.processes

TOTAL_TOKENS = 160 * 8 * 64
"""Tokens of 160 inner steps."""


@dataclass(frozen=True)
class Trained:
    """Files and output of `swarmtrain local`."""

    swarm: Swarm
    folder: Path
    said: Finished

    @property
    def model(self) -> Path:
        return self.folder / "bootstrap" / "model"

    @property
    def run_tokens(self) -> int:
        """Return the tokens that the run was trained on: slightly more than it wants, since reports arrive late."""
        tokens = tokens_of_export(self.model)
        assert TOTAL_TOKENS <= tokens < 2 * TOTAL_TOKENS
        return int(tokens)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, preloaded: Preloaded) -> Iterator[Trained]:
    with Swarm(tmp_path_factory.mktemp("local"), preloaded=preloaded) as swarm:
        run_file = write_run(swarm.folder, run={"total_tokens": TOTAL_TOKENS}, merge={"method": "gossip"})
        folder = swarm.folder / "trained"
        unequal = ("--peers", "2", "--slowdown", "1,2")
        said = swarm.run("local", str(run_file), *unequal, "--compare-alone", "--dir", str(folder))
        yield Trained(swarm, folder, said)


def test_local_ends_with_its_losses(trained: Trained) -> None:
    assert trained.said.code == 0, trained.said.stderr
    last = trained.said.stdout.splitlines()[-1]
    match = re.fullmatch(r"held-out loss (\d+\.\d{3}) nats/byte; one volunteer alone (\d+\.\d{3})", last)
    assert match, last
    assert all(0.5 < float(loss) < math.log(256) for loss in match.groups())
    assert f"the model is in {trained.model}; try: swarmtrain generate {trained.model}\n" in trained.said.stdout
    part = r"(?m)^(volunteer-\d|alone): (\d+(?:\.\d+)? k) tokens(?:, (\d+) rounds merged)?$"
    *parts, alone = re.findall(part, trained.said.stdout)
    assert [name for name, _, _ in parts] == ["volunteer-1", "volunteer-2"]
    assert all(int(rounds) > 0 for _, _, rounds in parts)
    most = max((tokens for _, tokens, _ in parts), key=lambda tokens: float(tokens.split()[0]))
    assert alone == ("alone", most, ""), "for as many inner steps as the fastest"
    trained.swarm.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_the_children_of_local_end_with_it(swarm: Swarm, number: signal.Signals) -> None:
    """Ctrl-C ends one behind links, in `test_bad_networks.py`."""
    run_file, folder = write_run(swarm.folder), swarm.folder / "trained"
    typed = ["local", str(run_file), "--peers", "2", "--json", "--dir", str(folder)]
    local = swarm.start("local", typed)
    local.wait_event(RoundEvent, lambda event: len(event.partners) == 2)
    assert len(swarm.leftovers()) == 7, "local, three peers, three daemons"
    os.killpg(local.process.pid, number)  # as a terminal does
    code = local.wait(2 * exit_limit_s())
    swarm.assert_nothing_left()
    if number is not signal.SIGKILL:
        assert code == 0, local.story()
        assert "rounds-not-archived" not in [event.code for event in local.all(WarningEvent)]
        assert f"\n  swarmtrain {shlex.join(typed)}" in local.log.read_text()
        assert [event.reason for event in local.all(DoneEvent)] == 3 * ["interrupted"], "each had its goodbye"
    assert "Traceback" not in local.log.read_text()


def test_a_report_of_it_has_everyone_with_the_figures_of_its_status(trained: Trained) -> None:
    swarm, folder, page = trained.swarm, str(trained.folder), trained.swarm.folder / "run.html"
    assert f"to keep how it went: swarmtrain report --dir {folder} --to run.html\n" in trained.said.stdout
    made, told = (
        swarm.run("report", "--dir", folder, "--to", str(page), "--json"),
        swarm.run("status", "bootstrap", "--dir", folder, "--json"),
    )
    assert (made.code, told.code) == (0, 0), made.stderr + told.stderr
    (report,), (status,) = map(json.loads, made.lines), map(json.loads, told.lines)
    assert report["figures"] == {name: status[name] for name in report["figures"]}
    assert sum(peer["tokens"] for peer in report["figures"]["peers"]) == trained.run_tokens
    document = page.read_text()
    for peer in status["peers"]:
        assert peer["peer"] in document and (peer["bootstrap"] or peer["last_tokens_per_s"] > 0)
    assert document.count(">left, <time") == 2, "both volunteers"
    history = read_history(trained.folder / "bootstrap")
    assert history is not None and history.sample.run_tokens == tokens_of_export(trained.model)
    assert all(event.time > 1e9 for event in history.events) and history.events


def test_a_stranger_reads_the_model(trained: Trained) -> None:
    """With safetensors and JSON alone."""
    config = json.loads((trained.model / "config.json").read_text())
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    with safe_open(trained.model / "model.safetensors", framework="np") as weights:
        shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        assert all(bool((weights.get_tensor(name) ** 2).sum() < 1e9) for name in shapes), "finite"
        assert all(weights.get_tensor(name).dtype.name == "float32" for name in shapes)
    assert (config["vocab_size"], width) in shapes.values()
    assert any(re.search(rf"\b{layers - 1}\b", name) for name in shapes)
    assert not any(re.search(rf"\.{layers}\.", name) for name in shapes)
    assert {path.name for path in trained.model.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "run.toml",
        "held-out.txt",
    }


def test_eval_measures_what_the_run_said(trained: Trained) -> None:
    measured = trained.swarm.run("eval", str(trained.model), "--json")
    assert measured.code == 0, measured.stderr
    found = json.loads(measured.stdout)
    said = trained.said.stdout.splitlines()[-1]
    assert f"held-out loss {found['held_out_loss']:.3f} nats/byte" in said
    assert found["run_tokens"] == trained.run_tokens and found["bytes"] > 3000
    text = trained.swarm.folder / "zeros.txt"
    text.write_bytes(bytes(1000))
    other = trained.swarm.run("eval", str(trained.model), "--text", str(text))
    assert re.fullmatch(
        r"loss \d+\.\d{4} nats/byte over 1000 bytes\n"
        r"the same in other units: \d+\.\d{4} bits/byte, perplexity \S+ a token",
        other.stdout.strip(),
    ), other.stderr


def test_generate_is_as_its_seed(trained: Trained) -> None:
    def written(*options: str) -> str:
        finished = trained.swarm.run("generate", str(trained.model), "--tokens", "60", *options)
        assert finished.code == 0, finished.stderr
        return finished.stdout

    first = written("--prompt", "the ")
    assert first.startswith("the ") and len(first.encode()) >= 64
    assert written("--prompt", "the ") == first
    assert written("--prompt", "the ", "--seed", "7") != first


def test_export_of_a_folder(trained: Trained) -> None:
    target = trained.swarm.folder / "exported"
    finished = trained.swarm.run("export", "--dir", str(trained.folder / "volunteer-1"), "--to", str(target))
    assert finished.code == 0, finished.stderr
    kept = trained.folder / "volunteer-1" / "model"
    tokens = tokens_of_export(kept)
    assert finished.stdout.strip() == f"wrote the model after {tokens} tokens to {target}"
    for name in ("model.safetensors", "held-out.txt", "run.toml"):
        assert (target / name).read_bytes() == (kept / name).read_bytes()
    assert (kept / "run.toml").read_bytes() == (trained.model / "run.toml").read_bytes()
    again = trained.swarm.run("export", "--dir", str(trained.folder / "volunteer-1"), "--to", str(target))
    assert again.code == UserError.exit_code and codes_in(again.stderr) == ["folder-not-empty"]
    copied = trained.swarm.run("export", "--dir", str(target), "--to", str(trained.swarm.folder / "copied"))
    assert copied.code == 0 and load_exported(trained.swarm.folder / "copied").run_tokens == tokens
    empty = trained.swarm.folder / "empty"
    empty.mkdir()
    none = trained.swarm.run("export", "--dir", str(empty), "--to", str(trained.swarm.folder / "none"))
    assert none.code == UserError.exit_code and codes_in(none.stderr) == ["no-model"]


def test_export_from_a_live_swarm(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap(write_run(swarm.folder, network={"archive_every_s": 2.0}))
    invite = bootstrap.invite.invite
    early = swarm.run("export", invite, "--to", str(swarm.folder / "early"))
    assert early.code == RunTimeError.exit_code and codes_in(early.stderr) == ["no-model"]
    assert not (swarm.folder / "early").exists()

    (anna,) = swarm.join_all(["anna"], invite)
    anna.wait_round(3)
    target = swarm.folder / "live"
    finished = swarm.run("export", invite, "--to", str(target))
    assert finished.code == 0, finished.stderr
    exported = load_exported(target)
    assert exported.run_tokens >= 4 * 10 * 8 * 64
    assert f"wrote the model after {exported.run_tokens} tokens to {target}" in finished.stdout
    written = swarm.run("generate", invite, "--tokens", "20", "--prompt", "the ")
    assert written.code == 0, written.stderr
    assert written.stdout.startswith("the ") and "the swarm's model after" in written.stderr
    before = anna.last_round
    anna.wait_more_rounds(2)
    assert before >= 3 and max(event.num_peers for event in anna.rounds().values()) == 1, "an onlooker is no volunteer"

    archived = bootstrap.wait_event(ArchivedEvent)
    of_folder = swarm.run("export", "--dir", str(bootstrap.folder), "--to", str(swarm.folder / "archive-copy"))
    assert of_folder.code == 0, of_folder.stderr
    assert load_exported(swarm.folder / "archive-copy").run_tokens >= archived.run_tokens
    swarm.interrupt_all([bootstrap, anna])
