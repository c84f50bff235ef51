"""Run as the peers of one stage see it: as a separate swarm."""

from __future__ import annotations

import hashlib

import pytest

from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.run import PublishedSection, RunFile, published_bytes, run_sha256

HELD_OUT, TOKENIZER = b"held-out text", b"a tokenizer"


def published(seed: int = 0, min_peers: int = 5, tokenizer: bytes = b"") -> PublishedRun:
    section = PublishedSection(
        created="2030-01-02T03:04:05Z",
        swarmtrain="1",
        held_out_sha256=hashlib.sha256(HELD_OUT).hexdigest(),
        held_out_bytes=len(HELD_OUT),
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest() if tokenizer else None,
        tokenizer_bytes=len(tokenizer),
        boundaries=(1, 3),
        stage_costs=(0.25, 0.5, 0.25),
    )
    kind = {"tokenizer": "bpe", "vocabulary_size": 4096} if tokenizer else {}
    run = RunFile.model_validate(
        {
            "run": {"total_tokens": 10**6, "seed": seed},
            "model": kind,
            "merge": {"min_peers": min_peers},
            "pipeline": {"stages": 3},
            "published": section.model_dump(),
        }
    )
    data = published_bytes(run)
    return PublishedRun(data, run_sha256(data), run, HELD_OUT, tokenizer)


def test_stages_of_one_run_and_of_several_are_swarms_of_their_own() -> None:
    runs = [published(seed) for seed in range(20)]
    hashes = [run.sha256 for run in runs] + [run.of_stage(stage).sha256 for run in runs for stage in range(30)]
    assert len(set(hashes)) == len(hashes) == 20 * 31
    assert all(len(bytes.fromhex(each)) == 32 and each == each.lower() for each in hashes)


def test_everyone_gives_a_stage_the_same_hash() -> None:
    run = published()
    expected = hashlib.sha256(bytes.fromhex(run.sha256) + b"\0\0\1\2").hexdigest()
    assert run.of_stage(258).sha256 == published(min_peers=5).of_stage(258).sha256 == expected


@pytest.mark.parametrize("stage", [-1, 2**32])
def test_a_stage_that_is_no_number_of_one_is_an_error(stage: int) -> None:
    with pytest.raises(OverflowError):
        published().of_stage(stage)


def test_nobody_waits_for_company_within_a_stage_and_all_else_is_the_same() -> None:
    run = published(min_peers=5)
    of_stage = run.of_stage(1)
    assert of_stage.run.merge.min_peers == 1 and run.run.merge.min_peers == 5
    merge = of_stage.run.merge.model_copy(update={"min_peers": 5})
    assert of_stage.run.model_copy(update={"merge": merge}) == run.run
    assert (of_stage.data, of_stage.held_out) == (run.data, run.held_out)


@pytest.mark.parametrize("tokenizer", [b"", TOKENIZER])
def test_the_files_are_still_those_of_the_run(tokenizer: bytes) -> None:
    run = published(tokenizer=tokenizer)
    blobs = run.of_stage(2).blobs()
    assert blobs == run.blobs() and blobs[run.sha256] == run.data
    assert set(blobs.values()) == {run.data, HELD_OUT} | ({tokenizer} if tokenizer else set())
    assert all(hashlib.sha256(data).hexdigest() == sha256 for sha256, data in blobs.items())
    assert run.of_stage(2).sha256 not in blobs
