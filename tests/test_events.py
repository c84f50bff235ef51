"""Events: the schema, and the three ways of saying one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from swarmtrain.events import (
    EVENT_CLASSES,
    ArrivingEvent,
    DeviceEvent,
    DoneEvent,
    ErrorEvent,
    EvalEvent,
    Event,
    FinishingEvent,
    InviteEvent,
    PausedEvent,
    PeerLeftEvent,
    PeerLostEvent,
    ResumedEvent,
    RoundEvent,
    StartedEvent,
    WarningEvent,
    data_in_words,
    in_words,
    merge_in_words,
    parse_event,
    stamped,
    times_below_allreduce,
    to_json_line,
    to_plain_line,
)
from swarmtrain.words import count_in_words, size_in_words, time_in_words

ROUND = RoundEvent(
    round=3,
    inner_steps=25,
    tokens=51_200,
    run_tokens=600_000,
    loss=2.3,
    first_loss=2.5,
    learning_rate=3e-3,
    grad_norm=0.7,
    seconds=8,
    merge_s=0.4,
    stall_s=0.2,
    bytes_sent=6_800_000,
    bytes_received=6_900_000,
    times_below_allreduce=25.3,
    partners=("a", "b"),
    weights=(51_200, 40_960),
    signer="a",
    state_sha256="00" * 32,
)


def test_names_are_distinct_and_match_their_class() -> None:
    names = [kind.model_fields["event"].default for kind in EVENT_CLASSES]
    assert len(set(names)) == len(names) == len(EVENT_CLASSES)
    for kind, name in zip(EVENT_CLASSES, names, strict=True):
        assert kind.__name__ == "".join(word.title() for word in name.split("_")) + "Event"


def test_the_events_a_program_relies_on_have_these_fields() -> None:
    fields = {kind.model_fields["event"].default: set(kind.model_fields) for kind in EVENT_CLASSES}
    assert {"line", "invite"} <= fields["invite"]
    assert {
        "round", "inner_steps", "tokens", "loss", "grad_norm", "merge_s", "stall_s", "bytes_sent", "bytes_received",
        "partners",
    } <= fields["round"]  # fmt: skip
    assert {"held_out_loss", "tokens", "wall_s", "reason"} <= fields["done"]
    assert {"joined", "eval", "peer_lost"} <= set(fields)


def test_a_json_line_starts_with_what_is_common_and_leaves_nothing_out() -> None:
    line = to_json_line(stamped(ROUND, 1.5, "P", "anna"))
    assert line.startswith('{"event": "round", "time": 1.5, "peer": "P", "name": "anna", ')
    assert set(json.loads(line)) == set(RoundEvent.model_fields)
    assert "\n" not in line


_FINITE = st.floats(allow_nan=False, allow_infinity=False)


def _any_of(kind: type[Event]) -> st.SearchStrategy[Event]:
    numbers = {float: _FINITE, float | None: st.none() | _FINITE}
    found = {name: numbers.get(field.annotation) for name, field in kind.model_fields.items()}
    return st.builds(kind, **{name: strategy for name, strategy in found.items() if strategy is not None})


@given(st.sampled_from(EVENT_CLASSES).flatmap(_any_of))
@settings(max_examples=150)
def test_every_event_survives_json_and_has_one_plain_line(event: Event) -> None:
    assert parse_event(to_json_line(event)) == event
    line = to_plain_line(stamped(event, 0, "", "").model_copy(update={"time": 1e9}))
    assert line.isprintable()


def test_what_is_no_event_is_refused() -> None:
    for line in ("", "{}", "[]", '{"event": "telepathy"}', '{"event": "eval"}'):
        with pytest.raises(ValueError):
            parse_event(line)
    with pytest.raises(ValueError):
        parse_event(to_json_line(ROUND)[:-1] + ', "extra": 1}')


def test_numbers_are_finite() -> None:
    with pytest.raises(ValidationError):
        EvalEvent(round=0, held_out_loss=float("nan"))


CARD = DeviceEvent(
    device="cuda:0",
    title="NVIDIA H100",
    precision="bf16",
    microbatch_sequences=32,
    batch_sequences=32,
    why="it works; in a probe 3.1 times as fast as fp32",
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "cuda:0 (NVIDIA H100) in bf16, 32 sequences at once: it works; in a probe 3.1 times as fast as fp32"),
        ({"compiled": True, "why": ""}, "cuda:0 (NVIDIA H100) in bf16, compiled, 32 sequences at once"),
        (
            {"device": "cpu", "title": "", "precision": "fp32", "microbatch_sequences": 1, "why": "asked for"},
            "the processor in fp32, 1 of 32 sequences at once: asked for",
        ),
        (
            {"title": "", "batch_sequences": 1, "microbatch_sequences": 1},
            "cuda:0 in bf16, 1 sequence at once: it works",
        ),
        (
            {"device": "cuda:0,1", "microbatch_sequences": 16, "why": "asked for"},
            "cuda:0 and cuda:1 (NVIDIA H100), data parallel in bf16, 16 of 32 sequences at once on each: asked for",
        ),
        (
            {"device": "cpu,cpu", "title": "", "precision": "fp32", "why": ""},
            "2 ranks on the processor, data parallel in fp32, 32 sequences at once on each",
        ),
    ],
)
def test_what_a_peer_trains_on_is_one_sentence(changes: dict[str, object], words: str) -> None:
    assert in_words(CARD.model_copy(update=changes)).startswith(f"training on {words}")


def test_a_stamp_fills_in_only_what_is_missing() -> None:
    event = stamped(WarningEvent(message="m", name="own"), 5.0, "P", "other")
    assert (event.time, event.peer, event.name) == (5.0, "P", "own")
    assert stamped(event, 9.0, "Q", "x") == event


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (ROUND, "round 3: loss 2.300, 25 steps in 8.0 s, 2 on the roster, merged in 0.4 s, sent 6.8 MB, 25.3 times below"),
        (
            ArrivingEvent(received_bytes=300, total_bytes=1200, seconds=30.0),
            "fetching the current weights: 300 B of 1.2 kB (25%), 1 min 30 s left",
        ),
        (EvalEvent(round=3, held_out_loss=2.0456), "held-out loss 2.046 nats/byte after round 3"),
        (
            EvalEvent(round=3, held_out_loss=2.0, sources=("code", "prose"), source_losses=(2.5, 1.5)),
            "held-out loss 2.000 nats/byte after round 3: code 2.500, prose 1.500 nats/byte",
        ),
        (PeerLostEvent(lost="12D3KooWabcdef", reason="silent"), "peer abcdef is lost: silent"),
        (PeerLostEvent(lost="12D3KooWabcdef", lost_name="ben", reason="silent"), "peer ben is lost: silent"),
        (PeerLostEvent(lost="12D3KooWben", lost_name="ben", reason="failed to dial: all dials failed"), "ben is lost: it cannot be reached"),
        (PeerLeftEvent(left="12D3KooWabcdef", left_name="ben"), "peer ben left"),
        (WarningEvent(message="a\x1b[2Jb\nc"), r"warning: a\x1b[2Jb\nc"),
        (ErrorEvent(message="no", hint="try", exit_code=1), "error: no; try"),
        (InviteEvent(line="swarmtrain join X", invite="X", run_sha256="", addresses=()), "others join with: swarmtrain"),
        (PausedEvent(reason="you asked for it"), "paused: you asked for it"),
        (FinishingEvent(doing="measuring"), "the run is complete: measuring"),
        (ResumedEvent(round=7, paused_s=90), "resumed at round 7 after a pause of 1 min 30 s"),
        (DoneEvent(held_out_loss=None, tokens=1, run_tokens=2, wall_s=3, reason="asked"), "held-out loss not measured"),
        (
            DoneEvent(held_out_loss=2.0, sources=("a",), source_losses=(2.0,), tokens=1, run_tokens=2, wall_s=3, reason="asked"),
            "held-out loss 2.000 nats/byte [a 2.000 nats/byte], 1 of 2 tokens trained here",
        ),
    ],
)  # fmt: skip
def test_plain_lines(event: Event, expected: str) -> None:
    line = to_plain_line(stamped(event, 1e9, "", "anna"))
    assert line[8:14] == " anna "
    assert expected in line


def test_sizes_counts_and_times_in_words() -> None:
    assert [size_in_words(n) for n in (0, 999, 999.9, 3_421_000, 1e18)] == [
        "0 B",
        "999 B",
        "1 kB",
        "3.42 MB",
        "1000 PB",
    ]
    assert [count_in_words(n) for n in (5, 51_200, 2e9)] == ["5", "51.2 k", "2 G"]
    words = [time_in_words(s) for s in (0, 59.97, 200, 3599.9, 7500, 270_000)]
    assert words == ["0.0 s", "1 min 0 s", "3 min 20 s", "1 h 0 min", "2 h 5 min", "3 d 3 h"]


def test_times_below_allreduce() -> None:
    assert times_below_allreduce(100, 25, 4 * 100 * 3) == pytest.approx(25 * 8 / 12)
    assert times_below_allreduce(100, 25, 0) is None


def test_who_trained_nothing_counts_the_run_and_one_is_no_plural() -> None:
    done = DoneEvent(held_out_loss=None, tokens=0, run_tokens=311_000, wall_s=2.0, reason="asked")
    assert in_words(done).endswith("held-out loss not measured, 311 k tokens in all")
    assert in_words(done.model_copy(update={"tokens": 1000})).endswith("1 k of 311 k tokens trained here")
    started = StartedEvent(inner_steps_per_round=1, num_parameters=1000, total_tokens=1, startup_s=1.0)
    assert "1 inner step in the first round" in in_words(started)
    assert ", 1 step in" in in_words(ROUND.model_copy(update={"inner_steps": 1}))


def test_a_merge_at_ones_own_pace_in_words() -> None:
    asynchronous = ROUND.model_copy(
        update={
            "signer": "",
            "partners": ("P1", "P2"),
            "staleness_rounds": (0, 2),
            "pull_s": 0.25,
            "consensus_spread": 0.031,
        }
    )
    assert merge_in_words(asynchronous) == "P1, P2 in 0.2 s, at most 2 rounds old, weights 3.1% apart"
    assert "merged with 2 partners, stalled for" in in_words(asynchronous)
    alone = asynchronous.model_copy(update={"partners": (), "staleness_rounds": (), "pull_s": None})
    assert merge_in_words(alone) == ("nobody this round: no partner had anything new yet (this costs nothing)")
    assert "merged with nobody" in in_words(alone)


@pytest.mark.parametrize(
    ("unseen", "words"),
    [(None, ""), (0, "; none is unseen"), (1, "; 1 is still unseen by all"), (7, "; 7 are still unseen by all")],
)
def test_which_data_a_round_was_drawn_from_in_words(unseen: int | None, words: str) -> None:
    assert data_in_words(ROUND) == ""
    event = ROUND.model_copy(update={"shard": 5, "unseen_shards": unseen})
    assert data_in_words(event) == "the last round from shard 5" + words
