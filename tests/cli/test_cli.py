"""Command line: what it offers, how fast it answers, and how it says that something is wrong."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from codes import codes_in, raises_code

from swarmtrain.cli.common import (
    EventSink,
    PeerOptions,
    asking,
    example,
    open_sink,
    peer_directory,
    peer_options,
    to_multiaddr,
    use_hf_token,
)
from swarmtrain.cli.main import _MEANT, ALIASES, COMMANDS, cli, run
from swarmtrain.errors import ClockError, InviteError, RunFileError, RunTimeError
from swarmtrain.events import Event, WarningEvent, parse_event
from swarmtrain.hub_login import USE_LOGIN, hub_token

PEER_OPTIONS = (
    *(
        "--dir",
        "--name",
        "--json",
        "--listen",
        "--announce",
        "--control",
        "--metrics",
        "--web",
        "--report-to",
        "--log-level",
        "--background",
    ),
    "--accept-clock",
    "--use-hf-token",
    "--only-announced",  # hidden, for rehearsals
    "--check-reach",  # hidden, for rehearsals
)

WHICH_PEER = ("[NAME]", "--dir", "--address")

# Every command with its arguments and options. A change here is a change of what people type: say it in CHANGELOG.md.
FROZEN: dict[str, tuple[str, ...]] = {
    "bootstrap": ("RUN.toml", "--wait-for", "--data", "--up", "--down", "--invite-file", "--no-samples", *PEER_OPTIONS),
    "join": (
        *("[INVITE]", "--invite-file"),
        *("--threads", "--memory", "--nice", "--only-when-idle"),
        *("--gpu-share", "--gpu-any-time", "--on-battery", "--max-temperature"),
        *("--hours", "--up", "--down", "--slowdown"),
        *("--device", "--precision", "--compile", "--base-bits", "--vram"),
        *("--data", "--model-dir", "--disk", "--rank"),
        *("--fail-pulls", "--first-stages"),  # hidden, for rehearsals
        *PEER_OPTIONS,
    ),
    "local": (
        "RUN.toml",
        *(
            "--peers",
            "--threads",
            "--device",
            "--precision",
            "--compile",
            "--base-bits",
            "--vram",
            "--slowdown",
            "--ranks",
            "--rtt",
            "--link-up",
            "--link-down",
            "--fail-pulls",
        ),
        *("--jitter", "--loss", "--churn", "--faults"),
        *(
            "--compare-alone",
            "--data",
            "--model-dir",
            "--use-hf-token",
            "--dir",
            "--report-to",
            "--json",
            "--web",
            "--log-level",
        ),
    ),
    "status": (*WHICH_PEER, "--all", "--json", "--healthy"),
    "watch": (*WHICH_PEER, "--json", "--web", "--page-socket"),  # the last one is hidden
    "logs": ("[NAME]", "--dir", "--follow", "--retry", "--lines", "--since"),
    "pause": WHICH_PEER,
    "resume": WHICH_PEER,
    "leave": (*WHICH_PEER, "--no-wait"),
    "limits": (
        *(*WHICH_PEER, "--threads", "--memory", "--nice", "--only-when-idle"),
        *("--gpu-share", "--gpu-when-idle", "--on-battery", "--max-temperature", "--hours", "--up", "--down"),
    ),
    "invite": ("--dir", "--json"),
    "service": ("[NAME]", "--dir", "--address"),
    "init": ("[PATH]", "--example"),
    "check": ("RUN.toml", "--peers", "--data", "--use-hf-token", "--json"),
    "plan": (
        *("RUN.toml", "--peers", "--step-s", "--slowdown", "--rtt", "--link-up", "--link-down"),
        *("--jitter", "--loss", "--churn", "--seed", "--json"),
    ),
    "simulate": (
        "SCENARIO.toml",
        *("--seed", "--method", "--sweep", "--set", "--jobs", "--fresh", "--plot", "--json"),
    ),
    "doctor": ("[INVITE]", "--dir", "--name", "--listen", "--announce", "--json"),
    "export": (
        "[INVITE]",
        "--dir",
        "--to",
        "--push",
        "--private",
        "--model-dir",
        "--use-hf-token",
        "--merge",
        "--dtype",
        "--accept-clock",
    ),
    "report": (*WHICH_PEER, "--to", "--with-machine", "--json"),
    "eval": (
        "MODEL",
        "--text",
        "--tasks",
        "--include-path",
        "--model-dir",
        "--use-hf-token",
        "--threads",
        "--device",
        "--json",
    ),
    "generate": (
        *(
            "[MODEL|INVITE]",
            "--dir",
            "--prompt",
            "--chat",
            "--tokens",
            "--temperature",
            "--seed",
            "--model-dir",
            "--use-hf-token",
            "--threads",
            "--device",
        ),
        "--accept-clock",
    ),
    "explain": ("[CODE]",),
}


# What people type for them; no help lists it.
FROZEN_ALIASES = {
    "stop": ("leave",),
    **dict.fromkeys(("list", "ls", "ps"), ("status", "--all")),
    "log": ("logs",),
}


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def test_commands_and_options_are_the_frozen_ones() -> None:
    found = {name: command(name) for name in COMMANDS}
    for name, group in list(found.items()):
        if isinstance(group, click.Group):
            found |= {f"{name} {inner}": each for inner, each in group.commands.items()}
    offered = {
        name: tuple(
            parameter.opts[-1] if isinstance(parameter, click.Option) else str(parameter.metavar or parameter.name)
            for parameter in each.params
        )
        for name, each in found.items()
    }
    assert offered == FROZEN
    assert ALIASES == FROZEN_ALIASES


@pytest.mark.parametrize("alias", FROZEN_ALIASES)
def test_an_alias_does_what_it_stands_for(alias: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = []
    for words in ((alias,), FROZEN_ALIASES[alias]):
        assert run([*words, "--dir", str(tmp_path), "anna"]) != 0
        outcomes.append(capsys.readouterr().err)
    assert outcomes[0] == outcomes[1] and f"has run in {tmp_path}" in outcomes[0]
    help_text = CliRunner().invoke(cli, [alias, "--help"]).output
    assert help_text.startswith(f"Usage: cli {FROZEN_ALIASES[alias][0]} ")
    assert f"  {alias} " not in CliRunner().invoke(cli, ["--help"]).output


def test_a_word_that_is_no_command_leads_to_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert not _MEANT.keys() & {*COMMANDS, *ALIASES}
    for word, meant in _MEANT.items():
        named = set(re.findall(r"[a-z]+", meant)) & set(COMMANDS)
        assert named or meant.startswith("--"), word
        assert run([word, "x"]) == 2
        said = capsys.readouterr().err
        assert codes_in(said) == ["no-such-command"] and f"'{word}'" in said and f"{meant}?" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_of_the_command(name: str) -> None:
    text = CliRunner().invoke(cli, [name, "--help"]).output
    assert "Example:" in text
    assert text.rstrip().splitlines()[-1].startswith(f"    swarmtrain {name} ")


_WITH_TORCH = """
import atexit, concurrent.futures, sys, threading, types
sys.modules["torch"] = types.ModuleType("torch")
class Kept:
    def __del__(self):
        print("taken apart")
kept = Kept()
atexit.register(print, "last work")
pool = concurrent.futures.ThreadPoolExecutor()
pool.submit(lambda: None).result()
begun = threading.Event()
threading.Thread(target=lambda: (begun.wait(), print("from a thread"))).start()
threading._register_atexit(begun.set)
from swarmtrain.cli.main import main
main()
"""


@pytest.mark.parametrize(("argument", "code"), [("--version", 0), ("--no-such-option", 2)])
def test_a_process_that_has_torch_ends_at_once_with_all_its_last_work_done(argument: str, code: int) -> None:
    """To take torch's modules apart took half a second of each process's end."""
    done = subprocess.run([sys.executable, "-c", _WITH_TORCH, argument], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["from a thread", "last work"], done.stdout + done.stderr
    assert ("swarmtrain " in lines[0]) == (code == 0)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_short_help_is_not_cut(name: str) -> None:
    text = CliRunner().invoke(cli, ["--help"]).output
    line = next(line for line in text.splitlines() if line.startswith(f"  {name} "))
    assert not line.endswith("...")


def test_help_is_quick_and_needs_nothing_heavy() -> None:
    code = (
        "import sys; from swarmtrain.cli.main import run; code = run(['--help'])\n"
        "heavy = {'torch', 'hivemind', 'grpc', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
        "sys.exit(code or ', '.join(heavy) or 0)"
    )
    best_s = 9.0
    for _ in range(5):
        start = os.times()  # processor time: the machine may be busy
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        end = os.times()
        used_s = end.children_user + end.children_system - start.children_user - start.children_system
        best_s = min(best_s, used_s)
        assert done.returncode == 0, done.stderr
        assert "Usage: swarmtrain" in done.stdout
        if best_s < 0.3:
            return
    raise AssertionError(f"{best_s:.2f} s of the processor at best")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["chekc"], "no-such-command", "did you mean check?"),
        (["stpo"], "no-such-command", "did you mean stop?"),
        (["zzz"], "no-such-command", ", ".join(COMMANDS)),
        (["train"], "no-such-command", "did you mean local RUN.toml (train here), join INVITE ("),
        (["kill", "anna"], "no-such-command", "did you mean leave, which ends a peer cleanly?"),
        (["check"], "", "'RUN.toml'"),
        (["check", "x.toml", "--peers", "0"], "", "'--peers'"),
        (["--nope"], "", "'--nope'"),
        (["check", "/nowhere.toml"], "no-run-file", "/nowhere.toml: "),
        (["join", "st1x", "--slowdown", "0.5"], "bad-limit", "'--slowdown': 0.5 "),
        (["local", "x.toml", "--slowdown", "2,,3"], "bad-limit", "'--slowdown': '' "),
        (["local", "x.toml", "--rtt", "-1"], "", "'--rtt': -1.0 "),
        (["local", "x.toml", "--rtt", "fast"], "", "'--rtt': 'fast' "),
        (["local", "x.toml", "--rtt", "nan"], "not-a-number", "'--rtt': nan "),
        (["local", "x.toml", "--link-up", "0"], "", "'--link-up': 0.0 "),
        (["local", "x.toml", "--link-down", "inf"], "", "'--link-down': inf "),
        (["local", "x.toml", "--fail-pulls", "101"], "", "'--fail-pulls': 101.0 "),
        (["join", "st1x", "--up", "nan"], "not-a-number", "'--up': nan "),
        (["limits", "--down", "nan"], "not-a-number", "'--down': nan "),
        (["join", "st1x", "--only-announced"], "nothing-announced", "--announce"),
        (["local", "x.toml", "--peers", "4", "--slowdown", "2,2.6"], "slowdown-count", "--peers 2"),
        (["local", "x.toml", "--peers", "3", "--ranks", "4,8"], "rank-count", "--peers 2"),
        (["local", "x.toml", "--ranks", "4,x,8"], "", "'--ranks': 'x' "),
        (["export", "--to", "x"], "options-conflict", "--dir"),
    ],
)
def test_a_persons_error_is_one_line_and_code_2(
    arguments: list[str], code: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What Click refuses by itself has no code."""
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and says in err
    assert codes_in(err) == [code] * bool(code)
    assert err.count("\n") == 1


def test_no_arguments_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert capsys.readouterr().out.startswith("Usage: swarmtrain")
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("swarmtrain 0.")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            RunTimeError("the disk\nis full", code="folder-not-writable"),
            1,
            "error: the disk is full [folder-not-writable]\n",
        ),
        (InviteError("garbled", code="invite-garbled"), 2, "error: garbled [invite-garbled]\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_of_a_command_become_a_line_and_a_code(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def failing() -> None:
        raise error

    monkeypatch.setattr(cli, "resolve_command", lambda ctx, args: (args[0], failing, args[1:]))
    assert run(["check"]) == code
    # click ends an interrupted line of the terminal first
    assert capsys.readouterr().err.lstrip("\n") == line


def test_a_reader_that_is_gone_ends_it_quietly() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m swarmtrain.cli check --help | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.0.0.0:31337", "/ip4/0.0.0.0/tcp/31337"),
        (":31337", "/ip4/0.0.0.0/tcp/31337"),
        ("[::]:31337", "/ip6/::/tcp/31337"),
        ("[2001:DB8::0001]:1", "/ip6/2001:db8::1/tcp/1"),
        ("home.example.org:31337", "/dns/home.example.org/tcp/31337"),
        ("localhost:0", "/dns/localhost/tcp/0"),
        ("/ip4/1.2.3.4/tcp/5", "/ip4/1.2.3.4/tcp/5"),
        ("/dns4/a.b/tcp/5/p2p/QmX", "/dns4/a.b/tcp/5/p2p/QmX"),
    ],
)
def test_addresses(text: str, expected: str) -> None:
    assert to_multiaddr(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "1.2.3.4", "1.2.3.4:99999", "1.2.3:5", "::1:5", "[1.2:5", "a b:5", "/ip4/1.2.3.4", "a/b:5", "[z::]:1"],
)
def test_no_addresses(text: str) -> None:
    with pytest.raises(ValueError):
        to_multiaddr(text)


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        (
            "--listen",
            "31337",
            "is a port without an address; write :31337 for all addresses of this machine, or HOST:31337",
        ),
        ("--announce", "203.0.113.5", "has no port; write HOST:PORT, such as 203.0.113.5:31337"),
        ("--announce", "home.example.org:", "has no port; write HOST:PORT, such as home.example.org:31337"),
        ("--listen", "2001:db8::1", "has no port; write [2001:db8::1]:31337"),
        ("--listen", "[2001:db8::1]", "has no port; write [2001:db8::1]:31337"),
        ("--listen", "127.0.0.1:70000", "has a port above 65535; write HOST:PORT, [IPv6]:PORT or :PORT, such as 203.0"),
        ("--listen", "a b:5", "is not an address; write HOST:PORT, [IPv6]:PORT or :PORT, such as 203.0.113.5:31337"),
        (
            "--announce",
            ":31337",
            "does not say where others find this machine; write HOST:PORT, such as 203.0.113.5:31337",
        ),
        ("--announce", "[::]:7", "does not say where others find this machine; write HOST:PORT, such as 203.0.113.5:7"),
    ],
)
def test_what_an_address_lacks_is_said_with_an_example(option: str, text: str, said: str) -> None:
    @click.command()
    @peer_options
    def peer(options: PeerOptions) -> None:
        raise AssertionError("it was taken")

    result = CliRunner().invoke(peer, [option, text])
    assert result.exit_code == 2 and f"'{option}': {text!r} {said}" in result.output


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("my name!", "; write my-name, say"),
        ("-anna", "; write anna, say"),
        ("\u00e9", ""),
        ("a" * 40, "; write " + "a" * 32),
    ],
)
def test_a_name_that_is_refused_comes_with_one_that_would_do(
    name: str, near: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["join", "st1abc", "--dir", str(tmp_path / "x"), "--name", name]) == 2
    said = capsys.readouterr().err
    assert f"'--name': {name!r} " in said and "up to 32 letters" in " ".join(said.split())
    assert near in said and ("write" in said) == bool(near)


def collected(*arguments: str) -> PeerOptions:
    got: list[PeerOptions] = []

    @click.command(epilog=example("x"))
    @click.argument("invite")
    @peer_options
    def peer(invite: str, options: PeerOptions) -> None:
        assert invite == "INVITE"
        got.append(options)

    assert tuple(parameter.opts[-1] for parameter in peer.params)[1:] == PEER_OPTIONS
    result = CliRunner().invoke(peer, ["INVITE", *arguments])
    if result.exit_code:
        raise ValueError(result.output)
    return got[0]


def test_the_options_of_a_peer_arrive_as_one_argument(tmp_path: Path) -> None:
    options = collected("--dir", str(tmp_path), "--name", "anna", "--json", "--listen", ":1", "--listen", "[::]:1")
    assert options == PeerOptions(
        dir=tmp_path,
        name="anna",
        json=True,
        listen=("/ip4/0.0.0.0/tcp/1", "/ip6/::/tcp/1"),
        announce=(),
        log_level="warning",
    )
    assert collected("--control", ":7000").control == "127.0.0.1:7000", "this machine only, unless said otherwise"
    assert collected("--control", "0.0.0.0:7000").control == "0.0.0.0:7000"
    assert collected("--control", "[::1]:7000").control == "[::1]:7000"
    assert collected("--metrics", "9100").metrics == "127.0.0.1:9100", "the same"
    assert collected("--metrics", "[::]:9100").metrics == "[::]:9100"
    assert peer_directory(options, "join") == tmp_path
    assert peer_directory(collected(), "join").name == "join"
    assert peer_directory(collected("--name", "bert"), "join").name == "join-bert"


def test_bad_options_of_a_peer() -> None:
    for arguments in (
        ["--name", "a/b"],
        ["--name", "x" * 33],
        ["--listen", "nowhere"],
        ["--control", "7000"],
        ["--metrics", "70000"],
        ["--metrics", "here"],
        ["--log-level", "loud"],
    ):
        with pytest.raises(ValueError, match="Invalid value"):
            collected(*arguments)


def test_json_goes_to_standard_output_as_events(capsys: pytest.CaptureFixture[str]) -> None:
    with open_sink(collected("--json", "--name", "anna"), lambda: pytest.fail("no display")) as emit:
        emit(WarningEvent(message="early"))
        emit.identify("P", "anna")
        emit(WarningEvent(message="later"))
    first, second = (parse_event(line) for line in capsys.readouterr().out.splitlines())
    assert (first.name, first.peer) == ("anna", "")
    assert (second.name, second.peer) == ("anna", "P")
    assert abs(first.time - time.time()) < 60


def test_with_json_an_error_is_an_event_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunTimeError), open_sink(collected("--json"), lambda: pytest.fail("no display")):
        raise RunTimeError("nobody", code="nobody-answers")
    (line,) = capsys.readouterr().out.splitlines()
    event = parse_event(line)
    assert event.event == "error"
    assert (event.message, event.code, event.exit_code) == ("nobody", "nobody-answers", 1)


def test_piped_output_has_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunTimeError), open_sink(collected(), lambda: pytest.fail("no display")) as emit:
        emit(WarningEvent(message="m"))
        raise RunTimeError("the caller says it, not the sink")
    assert capsys.readouterr().out[8:] == " warning: m\n"


class FakeDisplay:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def start(self) -> None:
        self.seen.append("start")

    def show(self, event: Event) -> None:
        self.seen.append(event.event)

    def stop(self) -> None:
        self.seen.append("stop")


def test_a_terminal_gets_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", screen)
    display = FakeDisplay()
    with open_sink(
        PeerOptions(dir=None, name="", json=False, listen=(), announce=(), log_level="error"), lambda: display
    ) as emit:
        emit(WarningEvent(message="m"))
    assert display.seen == ["start", "warning", "stop"]
    assert screen.getvalue() == ""


def test_a_closed_output_costs_the_output_only() -> None:
    def write(event: Event) -> None:
        raise BrokenPipeError

    sink = EventSink(write)
    sink(WarningEvent(message="m"))
    sink(WarningEvent(message="m"))
    assert sink.broken


def test_events_of_many_threads_stay_whole() -> None:
    seen: list[str] = []
    busy = threading.Lock()

    def write(event: Event) -> None:
        assert busy.acquire(blocking=False)
        seen.append(event.event)
        busy.release()

    sink = EventSink(write)
    threads = [threading.Thread(target=lambda: [sink(WarningEvent(message="m")) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 200


# ---------------------------------------------------------------- by whose clock


class Doubted:
    """Peer that finds the others' clock far from this machine's, unless it is accepted."""

    def __init__(self) -> None:
        self.lived: list[bool] = []

    def __call__(self, agreed: Mapping[str, bool]) -> None:
        self.lived.append(agreed["accept_clock"])
        if not agreed["accept_clock"]:
            raise ClockError("31 years apart")


class Keyboard(io.StringIO):
    """Fake standard input of a terminal."""

    def isatty(self) -> bool:
        return True


def options_of(*, json: bool = False, accept_clock: bool = False) -> PeerOptions:
    return PeerOptions(
        dir=None, name="", json=json, listen=(), announce=(), log_level="info", accept_clock=accept_clock
    )


def at_a_terminal(monkeypatch: pytest.MonkeyPatch, typed: str) -> Keyboard:
    screen = Keyboard()
    monkeypatch.setattr(sys, "stdin", Keyboard(typed))
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


@pytest.mark.parametrize("typed", ["y\n", "n\n", "\n"])
def test_who_sits_at_a_terminal_is_asked_asking(monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    screen, doubted = at_a_terminal(monkeypatch, typed), Doubted()
    if typed.startswith("y"):
        asking(options_of(), doubted)
        assert doubted.lived == [False, True]
    else:
        with pytest.raises(ClockError):
            asking(options_of(), doubted)
        assert doubted.lived == [False]
    assert "31 years apart" in screen.getvalue() and "Go by their clock? [y/N]" in screen.getvalue()


def test_where_nobody_is_nobody_is_asked_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither with --json nor without a terminal: whoever waits for an answer there would wait for ever."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(click, "confirm", refuse)
    at_a_terminal(monkeypatch, "")
    for options in (options_of(json=True), options_of()):
        doubted = Doubted()
        with pytest.raises(ClockError):
            asking(options, doubted)
        assert doubted.lived == [False]
        monkeypatch.setattr(sys, "stdin", io.StringIO())
    accepted = Doubted()
    asking(options_of(accept_clock=True), accepted)
    assert accepted.lived == [True]


def test_a_run_that_takes_much_and_one_that_needs_a_login_ask_first(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, lived = at_a_terminal(monkeypatch, "y\ny\n"), []
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("SWARMTRAIN_USE_HF_TOKEN", "0")

    def live(agreed: Mapping[str, bool]) -> None:
        lived.append((agreed.get("accept_size", False), hub_token()))
        if not agreed.get("accept_size"):
            raise RunTimeError("this run takes about 90 GB", code="takes-much")
        if not hub_token():
            raise RunFileError("cannot load anna/diary", code="dataset-not-loaded")

    asking(options_of(), live)
    assert lived == [(False, False), (True, False), (True, "hf_secret")]
    assert (
        "Take part all the same? [y/N]" in screen.getvalue() and "Use your login of Hugging Face" in screen.getvalue()
    )
    monkeypatch.delenv("HF_TOKEN")
    with raises_code("dataset-not-loaded", RunFileError, "anna/diary"):
        asking(options_of(), lambda agreed: live({"accept_size": True}))


@pytest.mark.parametrize(
    ("words", "variable", "token"),
    [([], None, False), (["--use-hf-token"], None, "hf_secret"), ([], "1", "hf_secret"), ([], "0", False)],
)
def test_a_login_is_used_only_by_the_word_of_its_owner(
    monkeypatch: pytest.MonkeyPatch, words: list[str], variable: str | None, token: str | bool
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv(USE_LOGIN, variable or "")  # so that it is as before after the test
    if variable is None:
        monkeypatch.delenv(USE_LOGIN)
    found = []
    command = click.command()(use_hf_token()(lambda: found.append(hub_token())))
    command.main(words, standalone_mode=False)
    assert found == [token]
