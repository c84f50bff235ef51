"""`--web`: where a page is served."""

from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from codes import raises_code

from swarmtrain.cli.kept_options import KeptOption, restore
from swarmtrain.cli.page_address import (
    DEFAULT_PORT,
    CommandWithPage,
    PageAddress,
    bound,
    keep_page,
    kept_page,
    page_lines,
    web_option,
)
from swarmtrain.errors import RunTimeError
from swarmtrain.peer.lifecycle.start_options import StartedFile


def given(*words: str, folder: Path | None = None, **variables: str) -> tuple[tuple[str, ...], PageAddress | None]:
    """The arguments and the page's address that a command gets."""
    got: list[tuple[tuple[str, ...], PageAddress | None]] = []

    @click.command(name="join", cls=CommandWithPage)
    @click.argument("words", nargs=-1)
    @click.option("--name")
    @web_option(KeptOption, "Serve a page.")
    def command(words: tuple[str, ...], name: str | None, web: PageAddress | None) -> None:
        if folder is not None:
            kept, started = restore(folder, ("join",))
            web = kept.get("web", web)
            StartedFile(folder).keep_command(started)
        got.append((words, web))

    command.params[-1].envvar = "SWARMTRAIN_JOIN_WEB"  # type: ignore[attr-defined]
    result = CliRunner().invoke(command, list(words), env=variables)
    if result.exit_code:
        raise ValueError(result.output)
    return got[0]


ANY = PageAddress(host="127.0.0.1", port=0)


@pytest.mark.parametrize(
    ("words", "arguments", "address"),
    [
        (["st1abc"], ("st1abc",), None),
        (["--web", "st1abc"], ("st1abc",), ANY),
        (["st1abc", "--web"], ("st1abc",), ANY),
        (["--web", "--name", "anna", "st1abc"], ("st1abc",), ANY),
        (["--web", ":8000", "st1abc"], ("st1abc",), PageAddress(host="127.0.0.1", port=8000)),
        (["--web", "8000"], (), PageAddress(host="127.0.0.1", port=8000)),
        (["--web=0.0.0.0:8000"], (), PageAddress(host="0.0.0.0", port=8000)),
        (["--web", "[::]:8000"], (), PageAddress(host="[::]", port=8000)),
        (["--web", "a-host.example:80", "x"], ("x",), PageAddress(host="a-host.example", port=80)),
        (["--web", "on", "x"], ("x",), ANY),
        (["--web", "off"], (), None),
        (["--web", "--", "--web"], ("--web",), ANY),
    ],
)
def test_the_value_may_be_left_out(words: list[str], arguments: tuple[str, ...], address: PageAddress | None) -> None:
    assert given(*words) == (arguments, address)


@pytest.mark.parametrize(
    ("value", "address"), [("1", ANY), ("on", ANY), ("0", None), (":9", PageAddress(host="127.0.0.1", port=9))]
)
def test_a_variable_turns_it_on_too(value: str, address: PageAddress | None) -> None:
    assert given(SWARMTRAIN_JOIN_WEB=value)[1] == address


@pytest.mark.parametrize("word", ["--web=nowhere", "--web=1.2.3.4", "--web=:70000", "--web=http://x:1"])
def test_no_address(word: str) -> None:
    with pytest.raises(ValueError) as caught:
        given(word)
    assert "such as :7117" in " ".join(str(caught.value).split())


def test_a_folder_remembers_its_page(tmp_path: Path) -> None:
    assert given("--web", folder=tmp_path) == ((), ANY)
    assert given(folder=tmp_path) == ((), ANY)
    assert given("--web", "off", folder=tmp_path) == ((), None)
    assert given(folder=tmp_path) == ((), None)
    assert (
        given("--web", ":8000", folder=tmp_path)[1]
        == given(folder=tmp_path)[1]
        == PageAddress(host="127.0.0.1", port=8000)
    )


def test_port_and_key_are_kept_for_the_user_alone(tmp_path: Path) -> None:
    assert kept_page(None)[0] == kept_page(tmp_path)[0] == 0
    assert kept_page(tmp_path)[1] != kept_page(tmp_path)[1], "a new key each time"
    keep_page(tmp_path, 7118, "k" * 32)
    assert kept_page(tmp_path) == (7118, "k" * 32)
    assert (tmp_path / "page.json").stat().st_mode & 0o777 == 0o600
    for text in ("", "[]", '{"port": "7118", "key": "kkkkkkkkkkkkkkkkkkkkk"}', '{"port": 7118, "key": ""}', "{"):
        (tmp_path / "page.json").write_text(text)
        assert kept_page(tmp_path)[0] == 0
    keep_page(tmp_path / "gone", 7118, "k")  # costs only the file


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as sock:
        return int(sock.getsockname()[1])


def test_a_named_port_that_is_taken_is_refused_and_another_is_found_for_no_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("swarmtrain.cli.page_address._AGAIN_S", 0.001)
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = int(other.getsockname()[1])
        monkeypatch.setattr("swarmtrain.cli.page_address.DEFAULT_PORT", port)
        with raises_code("port-taken", RunTimeError, "choose another with --web"):
            bound(PageAddress(host="127.0.0.1", port=port), 0)
        sock, address = bound(ANY, port)
        with closing(sock):
            assert address.port > port and sock.getsockname() == ("127.0.0.1", address.port)
    kept = free_port()
    sock, address = bound(ANY, kept)
    with closing(sock):
        assert address.port == kept, "the page that browsers show goes on"
    with pytest.raises(click.UsageError, match="choose another with --web"):
        bound(PageAddress(host="192.0.2.1", port=kept), 0)


def test_whom_the_lines_are_for() -> None:
    assert page_lines(PageAddress(host="127.0.0.1", port=DEFAULT_PORT), "c") == [
        "its page: http://127.0.0.1:7117/#code=c"
    ]
    mine, others = page_lines(PageAddress(host="0.0.0.0", port=80), "c")
    assert mine == "its page: http://127.0.0.1:80/#code=c" and "code" not in others and others.endswith(":80/")
    assert page_lines(PageAddress(host="localhost", port=80), "k")[1:] == []
    assert (
        PageAddress(host="[::1]", port=80).url() == "http://[::1]:80/"
        and not PageAddress(host="[::1]", port=1).is_public
    )
