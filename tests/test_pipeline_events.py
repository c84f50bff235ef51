"""Events of a pipeline, in words and as JSON."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from swarmtrain.events import (
    AssignedEvent,
    Event,
    MicrobatchRetryEvent,
    MovedEvent,
    StageThroughputEvent,
    in_words,
    parse_event,
    stamped,
    to_json_line,
    to_plain_line,
)

REASON = "stage 1 is the slowest (100 tokens/s of 400): p00 moves to it"
FLOW = StageThroughputEvent(stages=(1,), tokens_per_s=1200.0, most_tokens_per_s=3400.0, waiting=5, in_flight=0)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (AssignedEvent(stages=(2,), reason=REASON), f"takes stage 2: {REASON}"),
        (AssignedEvent(stages=(0, 1, 3), reason="nobody is there"), "takes stages 0, 1 and 3: nobody is there"),
        (AssignedEvent(stages=(), reason="nothing is free"), "takes no stage: nothing is free"),
        (
            MovedEvent(before=(0,), after=(1,), reason=REASON, seconds=75.0),
            f"holds stage 1 now, stage 0 before, after 1 min 15 s: {REASON}",
        ),
        (
            MovedEvent(before=(0, 1), after=(0, 1, 2), reason="stage 2 is empty", seconds=4.0),
            "holds stages 0, 1 and 2 now, stages 0 and 1 before, after 4.0 s: stage 2 is empty",
        ),
        (
            MicrobatchRetryEvent(stage=3, asked="12D3KooWabcdef", reason="no answer within 10.0 s"),
            "asks stage 3 again, abcdef failed: no answer within 10.0 s",
        ),
        (
            MicrobatchRetryEvent(stage=3, asked="12D3KooWabcdef", reason="nobody", count=31),
            "asks stage 3 again, abcdef failed (31 times): nobody",
        ),
        (FLOW, "stage 1: 1.2 k of 3.4 k tokens/s, 5 requests waiting"),
        (
            FLOW.model_copy(update={"stages": (0, 1), "in_flight": 8, "loss": 2.5}),
            "stages 0 and 1: 1.2 k of 3.4 k tokens/s, 5 requests waiting, 8 microbatches under way",
        ),
        (
            FLOW.model_copy(update={"tokens_per_s": 0.0, "most_tokens_per_s": 0.0, "waiting": 0}),
            "stage 1: 0 of 0 tokens/s, 0 requests waiting",
        ),
    ],
)
def test_in_words_and_back_from_json(event: Event, words: str) -> None:
    assert in_words(event) == words
    whole = stamped(event, 1e9, "12D3KooWme", "anna")
    assert to_plain_line(whole)[8:] == f" anna {words}"
    assert parse_event(to_json_line(whole)) == whole


@pytest.mark.parametrize(
    ("event", "names"),
    [
        (AssignedEvent(stages=(2,), reason=""), ["stages", "reason"]),
        (MovedEvent(before=(), after=(), reason="", seconds=0.0), ["before", "after", "reason", "seconds"]),
        (MicrobatchRetryEvent(stage=0, asked="", reason=""), ["stage", "asked", "asked_name", "reason", "count"]),
        (FLOW, ["stages", "tokens_per_s", "most_tokens_per_s", "waiting", "in_flight", "loss"]),
    ],
)
def test_what_programs_rely_on(event: Event, names: list[str]) -> None:
    fields = json.loads(to_json_line(event))
    assert [name for name in fields if name not in ("event", "time", "peer", "name")] == names
    assert fields["event"] == event.event and fields["event"] in (
        "assigned",
        "moved",
        "microbatch_retry",
        "stage_throughput",
    )


def test_what_others_say_is_one_line_of_plain_text() -> None:
    hostile = "\x1b[2J\nall is well\r\u202e"
    for event in (
        AssignedEvent(stages=(1,), reason=hostile),
        MovedEvent(before=(0,), after=(1,), reason=hostile, seconds=1.0),
        MicrobatchRetryEvent(stage=1, asked=hostile, reason=hostile),
    ):
        line = to_plain_line(event)
        assert line.isprintable() and r"\x1b[2J\nall is well" in line
        assert len(to_json_line(event).splitlines()) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": ("one",)},
        {"tokens_per_s": float("nan")},
        {"most_tokens_per_s": float("inf")},
        {"waiting": 0.5},
        {"loss": float("nan")},
        {"unknown": 1},
    ],
)
def test_what_is_no_such_event_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        StageThroughputEvent.model_validate(FLOW.model_dump() | changes)
