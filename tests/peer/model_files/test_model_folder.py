"""Model files on the disk: hashed once, linked, checked again at each start, and served only as they were."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from pathlib import Path

import pytest
from model_files import CONTENTS, NUM_CHUNKS, WEIGHTS, model_folder, pinned, write_model

from swarmtrain.errors import BadBytesError
from swarmtrain.network.model_files import served_file
from swarmtrain.network.model_files.served_file import ServedFile
from swarmtrain.peer.model_files.file_hashes import FileHashes
from swarmtrain.peer.model_files.model_folder import ModelFolder
from swarmtrain.peer.model_files.part_file import ArrivingRun, PartFile
from swarmtrain.protocol.pinned_files.file_list import PinnedFile, PinnedFiles
from swarmtrain.run import CHUNK_BYTES


def chunk_list(data: bytes) -> bytes:
    return b"".join(hashlib.sha256(data[at : at + CHUNK_BYTES]).digest() for at in range(0, len(data), CHUNK_BYTES))


# ---------------------------------------------------------------- hashes


@pytest.mark.parametrize("size", [1, CHUNK_BYTES, CHUNK_BYTES + 1, 8 * CHUNK_BYTES, 8 * CHUNK_BYTES + 1, len(WEIGHTS)])
def test_a_file_is_hashed_as_a_whole_and_by_chunks(tmp_path: Path, size: int) -> None:
    (tmp_path / "a").write_bytes(WEIGHTS[:size])
    hashed, seen = FileHashes(tmp_path / "hashes").of(tmp_path / "a"), list[int]()
    assert hashed.sha256 == hashlib.sha256(WEIGHTS[:size]).hexdigest()
    assert hashed.chunk_list == (chunk_list(WEIGHTS[:size]) if size > CHUNK_BYTES else b"")
    FileHashes(tmp_path / "other").of(tmp_path / "a", seen.append)
    assert sum(seen) == size


def test_a_file_is_read_again_only_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "a", list[Path]()
    whole = FileHashes.of.__globals__["hash_file"]
    monkeypatch.setitem(
        FileHashes.of.__globals__, "hash_file", lambda file, advance: (read.append(file.path), whole(file, advance))[1]
    )
    path.write_bytes(WEIGHTS)
    first = FileHashes(tmp_path / "hashes").of(path)
    assert FileHashes(tmp_path / "hashes").of(path) == first and len(read) == 1
    link = tmp_path / "link"
    link.symlink_to(path)
    assert FileHashes(tmp_path / "hashes").of(link).sha256 == first.sha256 and len(read) == 1, "the same file"
    path.write_bytes(b"x" + WEIGHTS[1:])
    os.utime(path, ns=(1, 1))
    assert FileHashes(tmp_path / "hashes").of(path).sha256 != first.sha256 and len(read) == 2
    for record in (tmp_path / "hashes").iterdir():
        record.write_bytes(record.read_bytes()[:-1] + b"?")
    FileHashes(tmp_path / "hashes").of(path)
    assert len(read) == 3, "a damaged record counts for nothing"


def test_hashes_that_cannot_be_kept_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(WEIGHTS)
    (tmp_path / "hashes").write_bytes(b"a file where the folder should be")
    assert FileHashes(tmp_path / "hashes").of(tmp_path / "a").sha256 == hashlib.sha256(WEIGHTS).hexdigest()


# ---------------------------------------------------------------- the folder


def test_files_elsewhere_are_linked_and_what_the_folder_has_is_what_is_pinned(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    folder = model_folder(tmp_path / "cache", source, pinned(source))
    names = {path.name for path in folder.path.iterdir() if not path.name.startswith(".")}
    assert names == set(CONTENTS) and all((folder.path / name).is_symlink() for name in names)
    assert folder.path.parent == tmp_path / "cache" / "models"
    (folder.path / "pytorch_model.bin").write_bytes(b"what transformers might prefer")
    again = ModelFolder(tmp_path / "cache", folder.files)
    with again.locked(lambda: None):
        assert all(again.has(file) for file in again.files.files)
    assert not (folder.path / "pytorch_model.bin").exists()
    assert again.served_files().keys() == folder.served_files().keys()


def test_a_file_that_is_another_is_not_used_and_one_that_has_changed_is_dropped(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    files = pinned(source)
    other = write_model(tmp_path / "other", {**CONTENTS, "model.safetensors": WEIGHTS[::-1], "config.json": b"{}"})
    folder = ModelFolder(tmp_path / "cache", files)
    with folder.locked(lambda: None):
        assert not any(folder.link(file, other / file.name) for file in files.files)
        assert not any(folder.has(file) for file in files.files)
    folder = model_folder(tmp_path / "cache", source, files)
    (source / "model.safetensors").write_bytes(WEIGHTS[::-1])
    os.utime(source / "model.safetensors", ns=(1, 1))
    (source / "config.json").unlink()
    with folder.locked(lambda: None):
        assert not any(folder.has(file) for file in files.files)
    assert (source / "model.safetensors").exists(), "only the link is removed"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    one, other = (ModelFolder(tmp_path / "cache", pinned(source)) for _ in range(2))

    def give_up() -> None:
        raise TimeoutError

    with one.locked(give_up), pytest.raises(TimeoutError), other.locked(give_up):
        pass
    with other.locked(give_up):
        pass


# ---------------------------------------------------------------- serving


def test_a_file_is_served_by_chunks_and_only_as_it_was_checked(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(WEIGHTS)
    file = ServedFile.of(path)

    async def pieces(chunks: range) -> list[tuple[int, bytes]]:
        return [piece async for piece in file.pieces(chunks)]

    async def run() -> None:
        found = await pieces(range(NUM_CHUNKS - 2, NUM_CHUNKS))
        assert [chunk for chunk, _ in found] == [NUM_CHUNKS - 2, NUM_CHUNKS - 1]
        assert b"".join(data for _, data in found) == WEIGHTS[(NUM_CHUNKS - 2) * CHUNK_BYTES :]
        assert await file.whole(len(WEIGHTS)) == WEIGHTS and await file.whole(len(WEIGHTS) - 1) is None
        assert await file.is_unchanged()
        os.utime(path, ns=(1, 1))
        assert not await file.is_unchanged() and await pieces(range(2)) == [] and await file.whole(2**30) is None
        path.unlink()
        assert not await file.is_unchanged() and await pieces(range(2)) == []

    asyncio.run(run())


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(WEIGHTS)
    file = ServedFile.of(tmp_path / "a")

    async def run() -> None:
        pieces = file.pieces(range(NUM_CHUNKS))
        await anext(pieces)
        open_before = num_open(tmp_path / "a")
        reading = asyncio.ensure_future(anext(pieces))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        await pieces.aclose()
        assert open_before == 1

    asyncio.run(run())
    threads = served_file._threads
    all_of_them = threading.Barrier(threads._max_workers)
    for waiting in [threads.submit(all_of_them.wait, 10) for _ in range(threads._max_workers)]:
        waiting.result()  # behind the close
    assert num_open(tmp_path / "a") == 0


def num_open(path: Path) -> int:
    return sum(link.exists() and link.resolve() == path for link in Path("/proc/self/fd").iterdir())


# ---------------------------------------------------------------- a part


def part_of(tmp_path: Path, data: bytes = WEIGHTS) -> PartFile:
    digests = chunk_list(data) if len(data) > CHUNK_BYTES else b""
    chunks_sha256 = hashlib.sha256(digests).hexdigest() if digests else ""
    file = PinnedFile("model.safetensors", len(data), hashlib.sha256(data).hexdigest(), chunks_sha256)
    return PartFile(tmp_path / file.name, file, digests)


def arrive(part: PartFile, chunks: range, data: bytes = WEIGHTS) -> list[bool]:
    run, accepted = ArrivingRun(part), []
    for chunk in chunks:
        run.room(chunk)[:] = data[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]
        accepted.append(run.accept(chunk))
    assert run.num_accepted == sum(accepted)
    return accepted


def test_chunks_arrive_in_any_order_and_the_whole_gets_its_name(tmp_path: Path) -> None:
    part, hashes = part_of(tmp_path), FileHashes(tmp_path / "hashes")
    assert all(arrive(part, range(11, NUM_CHUNKS))) and all(arrive(part, range(11)))
    assert not part.path.exists()
    part.finish(hashes)
    assert part.path.read_bytes() == WEIGHTS and not part.part_path.exists()
    seen = list[int]()
    assert hashes.of(part.path, seen.append).sha256 == part.file.sha256 and seen == [len(WEIGHTS)], "known by now"


def test_what_the_disk_has_after_a_kill_is_what_matches(tmp_path: Path) -> None:
    part = part_of(tmp_path)
    assert part.kept_chunks() == []
    arrive(part, range(3, 6))
    arrive(part, range(NUM_CHUNKS - 1, NUM_CHUNKS))
    with part.part_path.open("r+b") as stream:
        stream.seek(4 * CHUNK_BYTES + 17)
        stream.write(b"lost")
    seen = list[int]()
    assert part_of(tmp_path).kept_chunks(seen.append) == [3, 5, NUM_CHUNKS - 1] and sum(seen) == len(WEIGHTS)
    with part.part_path.open("r+b") as stream:
        stream.truncate(5 * CHUNK_BYTES - 1)
    assert part_of(tmp_path).kept_chunks() == [3]


def test_a_wrong_chunk_is_never_written(tmp_path: Path) -> None:
    part = part_of(tmp_path)
    assert arrive(part, range(2), WEIGHTS[::-1]) == [False, False] and not part.part_path.exists()


def test_a_small_file_has_one_chunk_and_needs_no_list(tmp_path: Path) -> None:
    part = part_of(tmp_path, WEIGHTS[:700])
    assert arrive(part, range(1), WEIGHTS[:700]) == [True]
    part.finish(FileHashes(tmp_path / "hashes"))
    assert part.path.read_bytes() == WEIGHTS[:700]


def test_a_part_that_was_longer_is_cut(tmp_path: Path) -> None:
    part = part_of(tmp_path)
    part.part_path.write_bytes(WEIGHTS + b"what was here before")
    assert len(part.kept_chunks()) == NUM_CHUNKS
    part.finish(FileHashes(tmp_path / "hashes"))
    assert part.path.read_bytes() == WEIGHTS


def test_hashes_that_do_not_fit_each_other_are_the_publishers_fault(tmp_path: Path) -> None:
    right = part_of(tmp_path)
    file = PinnedFile("model.safetensors", len(WEIGHTS), "ab" * 32, right.file.chunks_sha256)
    wrong = PartFile(right.path, file, chunk_list(WEIGHTS))
    arrive(wrong, range(NUM_CHUNKS))
    with pytest.raises(BadBytesError):
        wrong.finish(FileHashes(tmp_path / "hashes"))
    assert not wrong.path.exists()


def test_the_list_of_a_folder_is_as_it_is_read(tmp_path: Path) -> None:
    files = pinned(write_model(tmp_path / "source"))
    assert PinnedFiles.from_bytes_untrusted(files.to_bytes()) == files
    assert [file.name for file in files.files] == sorted(CONTENTS)
