"""Draw batches of each form of data, end, and draw on in another process; and count the sources of a mixture.

    python benchmarks/data_forms.py

The text is that of Python's standard library, cut into 4,000 pieces, in each form that a run can name. A first process
publishes each run and draws 200 batches; a second one, which has nothing of the first, begins after 101 of them, as a
volunteer does that was killed there; a third one does so with the first one's cache. Prints how many batches are equal,
in all tokens, targets and positions, and the seconds until the first is drawn. The data set of the hub comes from the
small hub of the tests, on loopback. Then it prints which share of the sequences comes from each of two sources of
weights 3 and 1. Needs the extras `bpe`, `datasets`, `parquet` and `zstd`.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import hashlib
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent / "tests"
BATCHES, POSITION, PIECES = 200, 101, 4000
WHEN = datetime.datetime(2030, 1, 2, tzinfo=datetime.UTC)
CHAT_MODEL = {"tokenizer": "tokenizer.json", "vocabulary_size": 300}
FORMS: dict[str, dict[str, Any]] = {
    "text": {"source": "text", "paths": ["texts/*.txt"]},
    "text, .gz": {"source": "text", "paths": ["texts/*.gz"]},
    "text, .zst": {"source": "text", "paths": ["texts/*.zst"]},
    "JSON lines": {"source": "jsonl", "paths": ["rows.jsonl"]},
    "JSON lines, .gz": {"source": "jsonl", "paths": ["rows.jsonl.gz"]},
    "JSON lines, .zst": {"source": "jsonl", "paths": ["rows.jsonl.zst"]},
    "Parquet": {"source": "parquet", "paths": ["rows.parquet"]},
    "data set of the hub": {"source": "datasets", "dataset": "anna/pieces"},
    "data set of the hub, streamed": {"source": "datasets", "dataset": "anna/pieces", "streaming": True},
    "chat": {"source": "jsonl", "paths": ["chat.jsonl"], "format": "chat"},
    "chat, by documents": {"source": "jsonl", "paths": ["chat.jsonl"], "format": "chat", "packing": "documents"},
    "prompt and completion": {"source": "jsonl", "paths": ["pairs.jsonl"], "format": "prompt-completion"},
    "two sources, one streamed": {
        "sources": [
            {"name": "files", "weight": 3, "source": "text", "paths": ["texts/*.gz"]},
            {"name": "hub", "weight": 1, "source": "datasets", "dataset": "anna/pieces", "streaming": True},
        ]
    },
}
MIXTURE = {
    "sources": [
        {"name": "many", "weight": 3, "source": "text", "paths": ["texts/*.txt"]},
        {"name": "few", "weight": 1, "source": "text", "paths": ["few.txt"]},
    ]
}


def run_of(data: dict[str, Any]) -> Any:
    """Return the run file with these keys of `[data]`."""
    from swarmtrain.run import RunFile

    return RunFile.model_validate(
        {
            "run": {"total_tokens": 1_000_000},
            "model": {"context_tokens": 64, **(CHAT_MODEL if data.get("format") == "chat" else {})},
            "inner": {"batch_sequences": 16},
            "data": {"held_out_bytes": 32_768, **data},
        }
    )


def batches_from(published: Path, base: Path, position: int, cache: Path | None) -> Any:
    """Return a volunteer's batches from a position on, by what the first process has published."""
    from swarmtrain.data.prepare import PeerPlace, training_batches, training_data
    from swarmtrain.run import parse_published_untrusted, run_sha256

    data, held_out, tokenizer = ((published / name).read_bytes() for name in ("run", "held-out", "tokenizer"))
    run = parse_published_untrusted(data, run_sha256(data))
    prepared = training_data(run, base, held_out, tokenizer, cache)
    return training_batches(run, prepared, PeerPlace(run_sha256="ab" * 32, peer_id="me", position=position))


def draw(base: Path, position: int, cache: Path | None) -> None:
    """Publish each run if that is not done, draw its batches from `position` on, and print their hashes."""
    import datasets  # noqa: F401, not to be timed with the first form that needs it

    from swarmtrain.peer.bootstrap import publish_run

    for number, data in enumerate(FORMS.values()):
        published = base / "published" / str(number)
        if not published.exists():
            found = publish_run(run_of(data), base, WHEN)
            published.mkdir(parents=True)
            for name, content in (("run", found.data), ("held-out", found.held_out), ("tokenizer", found.tokenizer)):
                (published / name).write_bytes(content)
        began_s, hashes = time.perf_counter(), []
        batches = batches_from(published, base, position, cache)
        for _ in range(position, BATCHES):
            hashes.append(hashlib.sha256(batches.next_batch().numpy().tobytes()).hexdigest())
            if len(hashes) == 1:
                first_s = time.perf_counter() - began_s
        print(json.dumps([hashes, first_s]), flush=True)


def shares(base: Path) -> None:
    """Print the shares of two sources, of which one is known by a byte that the other does not have."""
    import torch

    from swarmtrain.data.prepare import PeerPlace, training_batches, training_data
    from swarmtrain.peer.bootstrap import publish_run

    found = publish_run(run_of(MIXTURE), base, WHEN)
    data = training_data(found.run, base, found.held_out, b"", None)
    batches = training_batches(found.run, data, PeerPlace(run_sha256="ab" * 32, peer_id="me"))
    is_few = torch.stack([(batches.next_batch() == 0xC3).any(-1) for _ in range(1500)]).float()
    print(f"weights 3 and 1, {is_few.numel()} sequences in batches of 16: {1 - is_few.mean():.4f}, {is_few.mean():.4f}")
    for most in (1, 2, 7):
        print(f"... of the first {most} of each batch: {1 - is_few[:, :most].mean():.4f}")
    in_batch = is_few.sum(1)
    print(f"in a batch {int(in_batch.min())} to {int(in_batch.max())} sequences of the second")


def write(base: Path) -> list[bytes]:
    """Write the text in each form; return the shards of the data set."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard
    from made_tokenizers import write_tokenizer

    library = Path(sysconfig.get_path("stdlib"))
    text = "".join(path.read_text("ascii", "ignore") for path in sorted(library.glob("*.py")))
    step = len(text) // PIECES
    pieces = [text[begin : begin + step] for begin in range(0, step * PIECES, step)]
    rows = [json.dumps({"text": piece}) + "\n" for piece in pieces]
    (base / "texts").mkdir()
    for number in range(10):
        part = "\n".join(pieces[number::10]).encode()
        (base / "texts" / f"{number}.txt").write_bytes(part)
        (base / "texts" / f"{number}.gz").write_bytes(gzip.compress(part))
        (base / "texts" / f"{number}.zst").write_bytes(zstandard.compress(part))
    lines = "".join(rows).encode()
    (base / "rows.jsonl").write_bytes(lines)
    (base / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    (base / "rows.jsonl.zst").write_bytes(zstandard.compress(lines))
    pq.write_table(pa.table({"text": pieces}), base / "rows.parquet", row_group_size=500)
    asked = [(piece[:60], piece[60:300]) for piece in pieces]
    said = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in asked]
    (base / "chat.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in said))
    pairs = "".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in asked)
    (base / "pairs.jsonl").write_text(pairs)
    (base / "few.txt").write_text("".join(f"é{number * number:x} " for number in range(90_000)))
    write_tokenizer(base)
    return ["".join(rows[part::4]).encode() for part in range(4)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--position", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.draw:
        draw(arguments.draw, arguments.position, arguments.cache)
        return
    sys.path.insert(0, str(TESTS))  # the hub and the tokenizer of the tests
    from small_hub import small_hub

    with tempfile.TemporaryDirectory(prefix="st-") as name, small_hub() as hub:
        base, found = Path(name), list[list[Any]]()
        shards = {f"data/train-{number}.jsonl": shard for number, shard in enumerate(write(base))}
        hub.push("anna/pieces", shards, "datasets")
        for position, cache in ((0, "first"), (POSITION, "none"), (POSITION, "first")):
            command = [sys.executable, __file__, "--draw", name, "--position", str(position)]
            command += ["--cache", f"{name}/{cache}"]
            environment = {"PYTHONPATH": ":".join(sys.path[1:]), **hub.environment(base / f"hub {position} {cache}")}
            said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
            found.append([json.loads(line) for line in said.splitlines()])
        print("| form | equal batches | with the cache | seconds to the first batch | to the 102nd | with the cache |")
        print("|---|---|---|---|---|---|")
        for form, (whole, first_s), (resumed, resumed_s), (kept, kept_s) in zip(FORMS, *found, strict=True):
            equal = [sum(a == b for a, b in zip(whole[POSITION:], each, strict=True)) for each in (resumed, kept)]
            of = len(whole) - POSITION
            times = f"{first_s:.2f} | {resumed_s:.2f} | {kept_s:.2f}"
            print(f"| {form} | {equal[0]} of {of} | {equal[1]} of {of} | {times} |")
        shares(base)


if __name__ == "__main__":
    main()
