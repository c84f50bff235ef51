"""Run files come from strangers: none can make a volunteer read what is not below `--data`.

Each attack is prepared as a volunteer prepares its run, with a diary where the volunteer stands. The kernel tells
whether anybody has opened it: the libraries open files in C++, too.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib.util
import json
import os
import pickle
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from codes import raises_code
from fake_hub import SmallHub, fake_hub

from swarmtrain.data.documents import source_files
from swarmtrain.data.huggingface import files_bytes
from swarmtrain.data.mixture import PeerPlace
from swarmtrain.data.prepare import first_look, publishable_data, training_batches, training_data
from swarmtrain.errors import BadBytesError, RunFileError, UserError
from swarmtrain.peer.bootstrap import publish_run
from swarmtrain.peer.lifecycle.preparation import data_base
from swarmtrain.run import PublishedSection, RunFile, parse_published_untrusted, published_bytes, run_sha256

if importlib.util.find_spec("datasets") is None:
    pytest.skip("datasets is not installed", allow_module_level=True)
if not sys.platform.startswith("linux"):
    pytest.skip("only Linux tells who opens a file", allow_module_level=True)

IN_OPEN, IN_ACCESS, IN_NONBLOCK = 0x20, 0x1, 0o4000
SECRET = "dear diary"
ROWS = "".join(json.dumps({"text": f"{SECRET} {i} " + "x" * 400}) + "\n" for i in range(60))


class Watched:
    """Files that the kernel reports each opening of."""

    def __init__(self, *paths: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(IN_NONBLOCK)
        self._names = {}
        for path in paths:
            number = self._libc.inotify_add_watch(self._descriptor, os.fsencode(path), IN_OPEN | IN_ACCESS)
            assert number >= 0, os.strerror(ctypes.get_errno())
            self._names[number] = path.name

    def opened(self) -> list[str]:
        """Names of those that were opened since it was asked last."""
        try:
            data = os.read(self._descriptor, 65536)
        except BlockingIOError:
            return []
        names, at = [], 0
        while at < len(data):
            number, _, _, length = struct.unpack_from("iIII", data, at)
            names.append(self._names[number])
            at += 16 + length
        return names

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass
class Home:
    """Working directory of the volunteer, and the folder that it gives."""

    here: Path
    data: Path
    watched: Watched

    def prepare(self, run: RunFile, data_folder: Path | None) -> bytes:
        """Prepare what a volunteer of this run would train on."""
        base = data_base(run, data_folder)
        data = training_data(run, base, b"", b"", None)
        if not run.data.is_streamed:
            return data.sources[0].corpus.text.tobytes()
        batches = training_batches(run, data, PeerPlace(run_sha256="aa", peer_id="p"))
        return bytes(batches.next_batch().flatten().tolist())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    import pyarrow
    import pyarrow.parquet

    here, data = tmp_path / "home", tmp_path / "data"
    (here / "owner" / "name").mkdir(parents=True)
    (data / "texts").mkdir(parents=True)
    for folder in (here, here / "owner" / "name"):
        for name in ("train.txt", "train.jsonl", "train.json", "train.csv", "train.xml", "train.md"):
            (folder / name).write_text(ROWS)
        pyarrow.parquet.write_table(pyarrow.table({"text": ROWS.splitlines()}), folder / "train.parquet")
    (data / "texts" / "good.txt").write_text("an honest text\n" * 400)
    (data / "link.txt").symlink_to(here / "train.txt")
    (data / "link.jsonl").symlink_to("../home/train.jsonl")
    (data / "link.parquet").symlink_to(here / "train.parquet")
    (data / "links").symlink_to(here)
    (data / "twice").symlink_to("links")
    os.mkfifo(data / "pipe.txt")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    watched = Watched(*(path for path in here.rglob("*") if path.is_file()))
    yield Home(here, data, watched)
    assert Path.cwd() == here
    watched.close()


@pytest.fixture
def hub(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    with fake_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def a_run(**data: object) -> RunFile:
    values = {"source": "datasets", "held_out_bytes": 1024} | data
    return RunFile.model_validate(
        {"run": {"total_tokens": 100_000}, "model": {"context_tokens": 32}, "data": values}, strict=False
    )


def loaders() -> list[str]:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return list(_PACKAGED_DATASETS_MODULES)


def test_the_kernel_tells(home: Home) -> None:
    (home.here / "train.csv").read_bytes()
    assert "train.csv" in home.watched.opened() and not home.watched.opened()


@pytest.mark.parametrize("streaming", [False, True])
def test_no_loader_of_the_library_is_a_data_set(home: Home, streaming: bool) -> None:
    assert len(loaders()) > 5
    for name in (*loaders(), "generator", "pandas"):
        for folder in (None, home.data):
            with pytest.raises(UserError):
                home.prepare(a_run(dataset=name, streaming=streaming), folder)
    with raises_code("data-folder-needed", UserError, "--data FOLDER"):
        home.prepare(a_run(dataset="text"), None)
    (home.data / "text").mkdir()
    with raises_code("dataset-name", RunFileError, "./text"):
        home.prepare(a_run(dataset="text"), home.data)
    assert not home.watched.opened()


NAMES = [
    "..", "../home", "x/../../home", "{home}", "{home}/train.txt", "~", "~/owner/name", "links", "twice",
    "twice/owner/name", "./links", "train.txt", "file://{home}", "file:{home}", "http://127.0.0.1:9/a",
    "https://127.0.0.1:9/a", "s3://b/k", "hf://datasets/owner/name", "hf://buckets/owner/name", "local://{home}",
    "zip://train.txt::file://{home}/a.zip", "owner/name::{home}", "buckets/name", "buckets/owner/name",
    "owner/../../home", "owner\\name", "a/b/c", "json/", "/proc/self", "/dev/stdin", "imdb", ".. /home",
]  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
def test_no_name_leads_out(home: Home, hub: SmallHub, streaming: bool) -> None:
    for name in NAMES:
        run = a_run(dataset=name.format(home=home.here), streaming=streaming)
        for folder in (None, home.data):
            with pytest.raises(UserError) as caught:
                home.prepare(run, folder)
            assert "\n" not in str(caught.value)
    assert not home.watched.opened()


def test_a_hubs_name_is_never_a_folder_where_one_stands(home: Home, hub: SmallHub) -> None:
    """There is a folder `owner/name` here, and the hub has no such data set."""
    for folder in (None, home.data):
        with raises_code("dataset-not-loaded", RunFileError, "owner/name"):
            home.prepare(a_run(dataset="owner/name"), folder)
    hub.push("owner/name", {"train.jsonl": b'{"text": "from the hub"}\n' * 20})
    for folder in (None, home.data):
        assert home.prepare(a_run(dataset="owner/name"), folder).startswith(b"from the hub")
    assert not home.watched.opened()


@pytest.mark.parametrize("key", ["subset", "split"])
@pytest.mark.parametrize("value", ["..", "../../home", "/etc", "a/../..", "a\\b", "~", "*", "http://x", ":"])
def test_neither_subset_nor_split_is_a_path(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.{key}"):
        a_run(dataset="owner/name", **{key: value})


PATHS = [
    "{home}/train.{end}", "../home/train.{end}", "texts/../../home/train.{end}", "../**/*.{end}", "{home}/*.{end}",
    "link.{end}", "links/train.{end}", "links/*.{end}", "twice/**/*.{end}", "**/*.{end}", "*.{end}", "l*/train.{end}",
    "links", "~/train.{end}", "file://{home}/train.{end}", "pipe.txt", "/dev/zero", "/proc/self/environ", "/dev/stdin",
    "{home}/train.[{end}]*", "./../home/train.{end}", "links/owner/../train.{end}",
]  # fmt: skip


@pytest.mark.parametrize(("source", "end"), [("text", "txt"), ("jsonl", "jsonl"), ("parquet", "parquet")])
def test_no_path_leads_out(home: Home, source: str, end: str) -> None:
    for pattern in PATHS:
        run = a_run(source=source, paths=[pattern.format(home=home.here, end=end)])
        for folder in (None, home.data):
            with pytest.raises(UserError) as caught:
                home.prepare(run, folder)
            assert "\n" not in str(caught.value)
        with pytest.raises(RunFileError):  # nor does a bootstrap publish it
            publishable_data(run, home.data)
    assert not home.watched.opened()
    assert b"honest" in home.prepare(a_run(source="text", paths=["texts/*.txt"]), home.data)
    assert b"honest" in home.prepare(a_run(source="text", paths=["./texts/**/*.txt"]), home.data)


def test_a_folder_given_by_a_link_and_links_within_it_are_read(home: Home, tmp_path: Path) -> None:
    (tmp_path / "by-link").symlink_to(home.data)
    (home.data / "texts" / "again.txt").symlink_to("good.txt")
    assert b"honest" in home.prepare(a_run(source="text", paths=["texts/*.txt"]), tmp_path / "by-link")
    assert b"honest" in home.prepare(a_run(source="text", paths=["texts/again.txt"]), home.data)


CARDS = [
    "data_files: {home}/train.jsonl",
    "data_files: {home}/*.jsonl",
    "data_files: [{{split: train, path: '{home}/train.jsonl'}}]",
    "data_files: [{{split: train, path: ['train.jsonl', '{home}/train.jsonl']}}]",
    "data_files: ../../../../../../../../{home}/train.jsonl",
    "data_files: file://{home}/train.jsonl",
    "data_files: local://{home}/train.jsonl",
    "data_files: zip://train.jsonl::file://{home}/train.zip",
    "data_files: http://127.0.0.1:9/train.jsonl",
    "data_files: s3://bucket/train.jsonl",
    "data_dir: {home}",
    "data_dir: file://{home}",
    "data_files: train.jsonl\n  data_dir: {home}",
]


def card(text: str, home: Path) -> bytes:
    return f"configs:\n- config_name: default\n  {text.format(home=home)}\n".encode()


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_no_description_of_a_data_set_names_other_files(home: Home, hub: SmallHub, name: str) -> None:
    for number, text in enumerate(CARDS if name == "README.md" else CARDS[:2]):
        described = card(text, home.here)
        described = b"---\n" + described + b"---\n# A card\n" if name == "README.md" else described
        hub.push(f"eve/set{number}", {name: described, "train.jsonl": b'{"text": "bait"}\n' * 20})
        folder = home.data / f"set{number}"
        folder.mkdir()
        (folder / name).write_bytes(described)
        (folder / "train.jsonl").write_bytes(b'{"text": "bait"}\n' * 20)
        for dataset, given in ((f"eve/set{number}", None), (f"set{number}", home.data)):
            with raises_code("dataset-foreign-file", RunFileError):
                home.prepare(a_run(dataset=dataset), given)
    assert not home.watched.opened()


@pytest.mark.parametrize("hidden", ["---x: 1\n", "---\n"])
def test_a_description_ends_where_the_library_says(home: Home, hidden: str) -> None:
    """What looks like its end must not hide the rest of it from us and leave it to the library."""
    from swarmtrain.data import huggingface

    section, path = a_run(dataset="eve/set").data, home.data / "README.md"
    named = card("data_files: http://127.0.0.1:9/train.jsonl", home.here)
    path.write_bytes(b"---\n" + hidden.encode() + named + b"---\n# A card\n")
    with raises_code("dataset-foreign-file", RunFileError):
        huggingface._check_card(section, path)


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("part", ["[{0}, {0}]", "{{<<: [{0}, {0}]}}"])
def test_a_description_has_no_aliases_that_stand_for_billions(home: Home, name: str, part: str) -> None:
    from swarmtrain.data import huggingface

    section, path = a_run(dataset="eve/set").data, home.data / name
    lines = [f"a{n}: &a{n} {part.format(f'*a{n - 1}')}" for n in range(1, 23)]
    text = "a0: &a0 {x: 1}\n" + "\n".join(lines) + "\nconfigs: *a22\n"
    path.write_text(f"---\n{text}---\n# A *card*\n" if name == "README.md" else text)
    with raises_code("dataset-format", RunFileError, "aliases"):
        huggingface._check_card(section, path)


def test_what_was_found_is_looked_at_again_whatever_its_description_says(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which files the library has found is what counts. (Of the hub's data sets the newest library looks, too.)"""
    from swarmtrain.data import huggingface

    monkeypatch.setattr(huggingface, "_check_card", lambda section, path: None)
    (home.data / "set").mkdir()
    (home.data / "set" / "train.jsonl").write_bytes(b'{"text": "bait"}\n')
    for text in CARDS[:4]:
        (home.data / "set" / ".huggingface.yaml").write_bytes(card(text, home.here))
        with raises_code("dataset-foreign-file", RunFileError):
            home.prepare(a_run(dataset="set"), home.data)
    assert not home.watched.opened()


def test_each_layer_refuses_by_itself(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of what is refused would be refused again by a later layer: here there is none."""
    from swarmtrain.data import huggingface
    from swarmtrain.data.below import is_plain_name

    def read(*_: object, **__: object) -> None:
        raise AssertionError("the library is asked")

    library = SimpleNamespace(load_dataset_builder=read, load_from_disk=read, config=SimpleNamespace(HF_ENDPOINT="x"))
    monkeypatch.setattr(huggingface, "_hub", read)
    monkeypatch.setattr(huggingface, "_check_card", read)

    def refused(code: str, layer: Callable[..., object], *given: object) -> None:
        with raises_code(code, RunFileError):
            layer(*given)

    for name in ("../home", str(home.here), "hf://a/b", "a/../../home", "~/x", "a::b"):
        assert not is_plain_name(name)
        refused("dataset-name", huggingface._folder, a_run(dataset=name).data, home.data)
    for path in (str(home.data / "texts" / "good.txt"), "texts/../texts/good.txt", "texts/../texts/*.txt"):
        section = a_run(source="text", paths=[path]).data
        refused("path-outside", source_files, section, home.data)
    for name in ("links", "twice", "links/owner"):
        refused("path-outside", huggingface._folder, a_run(dataset=name).data, home.data)
    for name in ("no-such", "a/b/c", "buckets/x", "a b/c"):
        refused("no-such-data", huggingface._folder, a_run(dataset=name).data, home.data)
        section = a_run(dataset=name).data
        refused("dataset-name", huggingface._hub_builder, section, "ab" * 20, library)
    (home.data / "set" / "deep").mkdir(parents=True)
    (home.data / "set" / "deep" / "train.jsonl").symlink_to(home.here / "train.jsonl")
    section = a_run(dataset="set").data
    refused("path-outside", huggingface._local_builder, section, home.data / "set", home.data, library)
    assert not home.watched.opened()


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_no_code_of_a_data_set_runs(home: Home, hub: SmallHub) -> None:
    script = b"import os\nos.mkdir('exploded')\n"
    rows = b'{"text": "bait"}\n' * 20
    hub.push("eve/script", {"script.py": script, "train.jsonl": rows})
    hub.push("eve/pickles", {"train.pkl": pickle.dumps(_Bomb()), "README.md": b""})
    hub.push("eve/images", {"metadata.jsonl": b'{"file_name": "a.png", "text": "bait"}\n', "a.png": b"png"})
    (home.data / "local").mkdir()
    (home.data / "local" / "local.py").write_bytes(script)
    (home.data / "local" / "train.jsonl").write_bytes(rows)
    for dataset in ("eve/script", "eve/pickles", "eve/images", "local"):
        for streaming in (False, True):
            with pytest.raises(RunFileError, match=r"data\.dataset"):
                home.prepare(a_run(dataset=dataset, streaming=streaming), home.data)
    assert not list(home.here.parent.rglob("exploded"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_images_opens_no_file(home: Home, hub: SmallHub, tmp_path: Path, streaming: bool) -> None:
    import datasets

    rows = [{"bytes": None, "path": str(home.here / "train.txt")}] * 300
    kinds = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image(decode=False)})
    table = datasets.Dataset.from_dict({"text": ["honest " * 9] * 300, "image": rows}, features=kinds)
    table = table.cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "images.parquet")
    home.watched.opened()
    hub.push("eve/images", {"train.parquet": (tmp_path / "images.parquet").read_bytes()})
    assert home.prepare(a_run(dataset="eve/images", streaming=streaming), None).startswith(b"honest honest")
    with raises_code("field-not-text", RunFileError, "image", "eve/images"):
        home.prepare(a_run(dataset="eve/images", streaming=streaming, field="image"), None)
    assert not home.watched.opened()


def test_a_saved_data_set_has_its_files_in_its_folder(home: Home) -> None:
    import datasets

    outside = home.here / "saved"
    datasets.Dataset.from_dict({"text": [SECRET * 50] * 40}).save_to_disk(str(outside))
    inside = home.data / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["honest"] * 40})}).save_to_disk(str(inside))
    watched = Watched(*outside.iterdir())
    assert home.prepare(a_run(dataset="saved"), home.data).startswith(b"honest")
    state = json.loads((inside / "train" / "state.json").read_text())
    (arrow,) = outside.glob("*.arrow")
    for name in (str(arrow), f"../../../home/saved/{arrow.name}"):
        (inside / "train" / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
        with raises_code("path-outside", RunFileError):
            home.prepare(a_run(dataset="saved"), home.data)
    (inside / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "up"]}))
    (inside / "up").symlink_to(outside)
    with raises_code("path-outside", RunFileError):
        home.prepare(a_run(dataset="saved", split="up"), home.data)
    assert not watched.opened()
    watched.close()


def test_no_path_of_one_of_several_sources_leads_out(home: Home) -> None:
    for pattern in PATHS:
        named = [
            {"name": "honest", "source": "text", "paths": ["texts/good.txt"]},
            {"name": "own", "source": "text", "paths": [pattern.format(home=home.here, end="txt")]},
        ]
        run = a_run(sources=named, source="python-stdlib", held_out_bytes=8192)
        for folder in (None, home.data):
            with pytest.raises(UserError) as caught:
                home.prepare(run, folder)
            assert "\n" not in str(caught.value)
    assert not home.watched.opened()


# ---------------------------------------------------------------- the commit, the login


def published(run: RunFile, base: Path) -> RunFile:
    """Return the run as a volunteer gets it: parsed from the bytes that a bootstrap hands out."""
    data = publish_run(run, base, datetime.datetime.now(datetime.UTC)).data
    return parse_published_untrusted(data, run_sha256(data))


def rows(word: str) -> dict[str, bytes]:
    lines = (json.dumps({"text": f"{word} {i} " + "y" * 400}) + "\n" for i in range(60))
    return {"train.jsonl": "".join(lines).encode()}


@pytest.mark.parametrize("streaming", [False, True])
def test_the_bootstrap_fixes_the_commit(home: Home, hub: SmallHub, streaming: bool) -> None:
    sha = hub.push("anna/stories", rows("first"))
    run = published(a_run(dataset="anna/stories", streaming=streaming), home.data)
    assert run.published is not None and run.published.dataset_revision == sha
    hub.push("anna/stories", rows("second"))
    assert b"first" in home.prepare(run, None)
    (home.data / "anna" / "stories").mkdir(parents=True)  # the hub's it was, and is
    assert b"first" in home.prepare(run, home.data)
    (home.data / "anna" / "stories").rmdir()
    old = run.model_copy(update={"published": run.published.model_copy(update={"dataset_revision": None})})
    assert b"second" in home.prepare(old, None), "runs that were published before say no commit"


def test_the_size_of_its_files_is_known_before_they_are_fetched(home: Home, hub: SmallHub) -> None:
    sha = hub.push("anna/stories", rows("first"))
    source = a_run(dataset="anna/stories").data.mixture[0]
    assert files_bytes(source, sha) == len(rows("first")["train.jsonl"])
    assert not [line for line in hub.asked if line.startswith("GET") and "resolve" in line and "train.jsonl" in line]
    assert files_bytes(source, "0" * 40) is None


def test_a_folders_run_has_no_commit_and_other_sources_cannot_have_one(home: Home) -> None:
    (home.data / "anna" / "stories").mkdir(parents=True)
    (home.data / "anna" / "stories" / "train.jsonl").write_bytes(rows("mine")["train.jsonl"])
    run = published(a_run(dataset="anna/stories"), home.data)
    assert run.dataset_revisions == ("",) and "dataset_revision" not in published_bytes(run).decode()
    text = published_bytes(run).decode().replace("[published]", f'[published]\ndataset_revision = "{"a" * 40}"')
    text = text.replace('source = "datasets"', 'source = "python-stdlib"').replace('dataset = "anna/stories"', "")
    with raises_code("keys-disagree", BadBytesError, "data.source"):
        parse_published_untrusted(text.encode(), run_sha256(text.encode()))


def test_a_corpus_that_is_kept_needs_no_hub(home: Home, hub: SmallHub, tmp_path: Path) -> None:
    hub.push("anna/stories", rows("first"))
    run = published(a_run(dataset="anna/stories"), home.data)
    first = training_data(run, data_base(run, None), b"", b"", tmp_path / "kept")
    hub.asked.clear()
    again = training_data(run, data_base(run, None), b"", b"", tmp_path / "kept")
    assert again.digest == first.digest and not hub.asked


def test_no_login_but_the_one_that_was_given(home: Home, hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    (home.here / "token").write_text("hf_saved")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(home.here / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub.push("anna/stories", rows("first"))
    home.prepare(a_run(dataset="anna/stories"), None)
    assert hub.asked and not [line for line in hub.asked if "hf_saved" in line]
    monkeypatch.setenv("HF_TOKEN", "hf_given")
    home.prepare(a_run(dataset="anna/stories", streaming=True), None)
    assert not [line for line in hub.asked if "hf_" in line], "its owner has not said that it may be used"
    monkeypatch.setenv("SWARMTRAIN_USE_HF_TOKEN", "1")
    home.prepare(a_run(dataset="anna/stories", streaming=True), None)
    assert [line for line in hub.asked if "hf_given" in line] and not [line for line in hub.asked if "hf_saved" in line]


def test_older_libraries_are_told_to_run_no_code(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    told: dict[str, object] = {}

    def load(path: str, name: str | None = None, trust_remote_code: bool | None = None, **more: object) -> object:
        told.update(path=path, trust=trust_remote_code, here=list(Path().iterdir()), stands=Path.cwd(), **more)
        raise RuntimeError("that is enough")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", lambda *given, **more: os.devnull)
    run = a_run(dataset="owner/name")
    section = PublishedSection(
        created="2026-11-30T00:00:00Z",
        swarmtrain="0.1.0",
        held_out_sha256="0" * 64,
        held_out_bytes=1,
        dataset_revision="a" * 40,
    )
    with raises_code("dataset-not-loaded", RunFileError, "that is enough"):
        home.prepare(run.model_copy(update={"published": section}), None)
    assert told["path"] == "owner/name" and told["revision"] == "a" * 40
    assert told["trust"] is False and told["here"] == [] and told["stands"] != home.here


def test_a_first_look_fetches_some_documents_and_downloads_nothing(home: Home, hub: SmallHub) -> None:
    text = {"train.jsonl": rows("first")["train.jsonl"] * 3000}
    hub.push("anna/stories", text)
    look = first_look(a_run(dataset="anna/stories"), home.data)
    assert look.problems == () and "after its first 8 documents" in look.unseen[0]
    assert hub.sent_bytes < 0.5 * len(text["train.jsonl"])
    assert (
        'has no field "story" (it has: text)'
        in first_look(a_run(dataset="anna/stories", field="story"), home.data).problems[0]
    )
    assert 'cannot load "anna/storeys"' in first_look(a_run(dataset="anna/storeys"), home.data).problems[0]
    assert 'split "test"' in first_look(a_run(dataset="anna/stories", split="test"), home.data).problems[0]
