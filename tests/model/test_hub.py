"""Models of a small hub: what may be pinned is downloaded, at one commit, and errors are one line."""

from __future__ import annotations

import errno
import importlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from codes import raises_code
from model_files import CONTENTS, WEIGHTS
from small_hub import SmallHub, small_hub

from swarmtrain.errors import RunFileError, RunTimeError
from swarmtrain.model.hub import HubError, HubModel
from swarmtrain.protocol.pinned_files.file_list import INDEX

pytest.importorskip("huggingface_hub")
ALL = {**CONTENTS, "pytorch_model.bin": b"a pickle", "README.md": b"# A model"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    with small_hub() as hub:
        hub.use_in(monkeypatch, tmp_path / "cache")
        yield hub


def nothing(*numbers: int) -> None:
    pass


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("anna/tiny", HubModel("anna/tiny")),
        ("anna/tiny@v1.0", HubModel("anna/tiny", "v1.0")),
        ("anna/tiny@refs/pr/1", HubModel("anna/tiny", "refs/pr/1")),
        ("tiny", None),
        ("anna/tiny/more", None),
        ("../tiny", None),
        ("/anna/tiny", None),
        ("anna/tiny@", None),
        ("https://huggingface.co/anna/tiny", None),
    ],
)
def test_a_name_of_the_hub(base: str, expected: HubModel | None) -> None:
    assert HubModel.parse(base) == expected


def test_files_come_at_one_commit_with_progress_and_pickles_stay_there(hub: SmallHub) -> None:
    first, seen = hub.push("anna/tiny", ALL), list[tuple[int, int]]()
    found = HubModel("anna/tiny").download(weights=True, advance=lambda *done: seen.append(done))
    assert (found.commit, found.names) == (first, tuple(sorted(CONTENTS)))
    assert {name: (found.folder / name).read_bytes() for name in found.names} == CONTENTS
    total = sum(map(len, CONTENTS.values()))
    assert seen[-1] == (total, total) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    hub.push("anna/tiny", {**ALL, "config.json": b"{}"})
    again = HubModel("anna/tiny", first).download(weights=True, advance=nothing)
    assert again == found and set(hub.downloads()) == set(CONTENTS), "nothing twice"


def test_without_weights_only_descriptions_come(hub: SmallHub) -> None:
    hub.push("anna/tiny", ALL)
    assert HubModel("anna/tiny").download(weights=False, advance=nothing).names == ("config.json",)
    assert hub.downloads() == ["config.json"]


def test_weights_in_pieces_come_by_their_index(hub: SmallHub) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors"}}).encode()
    hub.push("anna/tiny", {"config.json": b"{}", INDEX: index, "model-1.safetensors": b"a", "other.safetensors": b"b"})
    found = HubModel("anna/tiny").download(weights=True, advance=nothing)
    assert found.names == ("config.json", "model-1.safetensors", INDEX)


def test_without_a_connection_the_cache_is_enough(
    hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("anna/tiny", ALL)
    found = HubModel("anna/tiny").download(weights=True, advance=nothing)
    num_asked = len(hub.asked)
    monkeypatch.setattr(importlib.import_module("huggingface_hub").constants, "HF_HUB_OFFLINE", True)
    assert HubModel("anna/tiny").download(weights=True, advance=nothing) == found
    with raises_code("hub-failed", RunFileError, "anna/other"):
        HubModel("anna/other").download(weights=True, advance=nothing)
    assert len(hub.asked) == num_asked


@pytest.mark.parametrize(("base", "says"), [("anna/none", "no such repository"), ("anna/tiny@v7", "no such revision")])
def test_what_the_hub_does_not_have_is_one_line(hub: SmallHub, base: str, says: str) -> None:
    hub.push("anna/tiny", ALL)
    model = HubModel.parse(base)
    assert model is not None
    with raises_code("hub-failed", RunFileError, says):
        model.download(weights=True, advance=nothing)


def test_a_repository_without_a_model_is_refused(hub: SmallHub) -> None:
    hub.push("anna/tiny", {"model.safetensors": WEIGHTS})
    with raises_code("hub-failed", RunFileError, "config.json"):
        HubModel("anna/tiny").download(weights=True, advance=nothing)


def test_a_model_with_pickles_alone_is_refused_before_anything_large_comes(hub: SmallHub) -> None:
    hub.push("anna/tiny", {"config.json": b"{}", "pytorch_model.bin": b"a pickle"})
    with raises_code("not-safetensors", RunFileError, "anna/tiny"):
        HubModel("anna/tiny").download(weights=True, advance=nothing)
    assert hub.downloads() == []


@pytest.mark.parametrize("weights", [True, False])
def test_a_description_that_is_too_large_is_not_fetched(
    hub: SmallHub, monkeypatch: pytest.MonkeyPatch, weights: bool
) -> None:
    monkeypatch.setattr("swarmtrain.protocol.pinned_files.file_list.MAX_SMALL_FILE_BYTES", 1000)
    hub.push("anna/tiny", {**ALL, "tokenizer.json": bytes(1001)})
    with raises_code("hub-failed", RunFileError, "tokenizer.json"):
        HubModel("anna/tiny").download(weights=weights, advance=nothing)
    assert hub.downloads() == []


def test_one_file_of_a_pinned_model(hub: SmallHub) -> None:
    commit, seen = hub.push("anna/tiny", ALL), list[int]()
    model = HubModel("anna/tiny", commit)
    assert model.is_pinned and not HubModel("anna/tiny").is_pinned
    path = model.download_file("model.safetensors", seen.append, nothing)
    assert path.read_bytes() == WEIGHTS and sum(seen) == len(WEIGHTS)
    with pytest.raises(HubError):
        model.download_file("tokenizer.json", nothing, nothing)


def test_a_hub_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_hub() as hub:
        hub.use_in(monkeypatch, tmp_path / "cache")
    model = HubModel("anna/tiny", "ab" * 20)
    with pytest.raises(HubError):
        model.reach(nothing)
    assert model.cached_file("config.json") is None


def test_a_full_disk_is_one_line(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.push("anna/tiny", ALL)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with raises_code("disk-full", RunTimeError, "anna/tiny", "HF_HOME") as raised:
        HubModel("anna/tiny").download(weights=True, advance=nothing)
    assert raised.value.exit_code == 1


def test_a_disk_without_room_is_one_line_before_anything_large_comes(
    hub: SmallHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.push("anna/tiny", ALL)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=len(WEIGHTS)))
    with raises_code("disk-full", RunTimeError, "HF_HOME"):
        HubModel("anna/tiny").download(weights=True, advance=nothing)
    assert hub.downloads() == []
    HubModel("anna/tiny", commit).download_file("model.safetensors", nothing, nothing)


def _ends_after(num_bytes: int, error: Exception, http_get: Callable[..., None]) -> Callable[..., None]:
    """Return the library's `http_get`, which fails each time once so many bytes have come."""

    def get(url: str, file: Any, **more: Any) -> None:
        data = io.BytesIO()
        http_get(url, data, **more)
        file.write(data.getvalue()[:num_bytes])
        if len(data.getvalue()) > num_bytes:
            raise error

    return get


def _breaking(monkeypatch: pytest.MonkeyPatch, num_bytes: int, error: Exception) -> None:
    module = importlib.import_module("huggingface_hub.file_download")
    monkeypatch.setattr(module, "http_get", _ends_after(num_bytes, error, module.http_get))


def test_what_has_arrived_of_a_large_file_is_kept_whatever_ended_it(
    hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("anna/tiny", ALL)
    with monkeypatch.context() as patch:
        _breaking(patch, 1_000_000, OSError(errno.ENOSPC, "No space left on device"))
        with raises_code("disk-full", RunTimeError, "what has arrived is kept"):
            HubModel("anna/tiny").download(weights=True, advance=nothing)
    sent_bytes, seen = hub.sent_bytes, list[tuple[int, int]]()
    found = HubModel("anna/tiny").download(weights=True, advance=lambda *done: seen.append(done))
    assert (found.folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.sent_bytes - sent_bytes < len(WEIGHTS) - 1_000_000 + 4096, "with the descriptions"
    total = sum(map(len, CONTENTS.values()))
    assert seen[-1] == (total, total) and max(done for done, _ in seen) == total
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_an_address_that_is_no_longer_valid_is_asked_for_anew_while_something_comes(
    hub: SmallHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("anna/tiny", ALL)
    with monkeypatch.context() as patch:
        _breaking(patch, len(WEIGHTS) // 3, ValueError("403: it has expired"))
        found = HubModel("anna/tiny").download(weights=True, advance=nothing)
    assert (found.folder / "model.safetensors").read_bytes() == WEIGHTS
    hub.push("anna/other", {**ALL, "model.safetensors": WEIGHTS[::-1]})
    _breaking(monkeypatch, 0, ValueError("403: it has expired"))
    with raises_code("hub-failed", RunFileError, "it has expired"):
        HubModel("anna/other").download(weights=True, advance=nothing)


def test_a_large_file_that_arrives_damaged_is_not_kept(hub: SmallHub, tmp_path: Path) -> None:
    hub.push("anna/tiny", ALL)
    hub.altered = lambda name, data: data[::-1] if name == "model.safetensors" else data
    for _ in range(2):
        with raises_code("hub-failed", RunFileError, "its model.safetensors has arrived damaged"):
            HubModel("anna/tiny").download(weights=True, advance=nothing)
    hub.altered = lambda name, data: data
    found = HubModel("anna/tiny").download(weights=True, advance=nothing)
    assert (found.folder / "model.safetensors").read_bytes() == WEIGHTS


def test_two_processes_fetch_a_large_file_once(hub: SmallHub) -> None:
    commit, begun, goes_on = hub.push("anna/tiny", ALL), threading.Event(), threading.Event()

    def holds(name: str, data: bytes) -> bytes:
        begun.set()
        goes_on.wait(10)
        return data

    hub.altered = holds
    model, paths = HubModel("anna/tiny", commit), list[Path]()

    def fetch() -> None:
        paths.append(model.download_file("model.safetensors", nothing, nothing))

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    goes_on.set()
    for thread in threads:
        thread.join(30)
    assert len(paths) == 2 and all(path.read_bytes() == WEIGHTS for path in paths)
    assert sum(each.startswith("GET") for each in hub.asked if "/resolve/" in each) == 1


def test_whoever_waits_for_the_hub_can_give_up(hub: SmallHub) -> None:
    commit, waits, asked = hub.push("anna/tiny", ALL), threading.Event(), threading.Event()

    def holds(name: str, data: bytes) -> bytes:
        asked.set()
        waits.wait(10)
        return data

    def give_up() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    hub.altered = holds
    try:
        with pytest.raises(KeyboardInterrupt):
            HubModel("anna/tiny", commit).download_file("model.safetensors", nothing, give_up)
    finally:
        waits.set()


def test_no_login_but_the_one_given(hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "token").write_text("hf_stored")
    hub.push("anna/tiny", ALL)
    HubModel("anna/tiny").download(weights=True, advance=nothing)
    assert not [each for each in hub.asked if "Bearer" in each]
    monkeypatch.setenv("HF_TOKEN", "hf_given")
    hub.push("anna/third", ALL)
    HubModel("anna/third").download(weights=True, advance=nothing)
    assert not [each for each in hub.asked if "Bearer" in each], "its owner has not said that it may be used"
    monkeypatch.setenv("SWARMTRAIN_USE_HF_TOKEN", "1")
    hub.push("anna/other", ALL)
    HubModel("anna/other").download(weights=True, advance=nothing)
    assert [each for each in hub.asked if "anna/other" in each] == [
        each for each in hub.asked if "Bearer hf_given" in each and "agent" not in each
    ]
