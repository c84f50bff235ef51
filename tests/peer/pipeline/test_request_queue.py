"""The desk of a stage: what it keeps of questions and answers, and for how long."""

from __future__ import annotations

import asyncio

import pytest

from swarmtrain.errors import GoneError
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue, Task
from swarmtrain.protocol.pipeline.ledger import Key, LedgerLimits, StageLedger

KEY = Key("d", 0, 0)


async def _ask(desk: StageRequestQueue, payload: str) -> asyncio.Task[str]:
    asking = asyncio.create_task(desk.ask(KEY, "forward", 2, payload))
    await asyncio.sleep(0)
    return asking


def test_of_a_question_asked_again_and_again_one_payload_is_kept() -> None:
    async def live() -> None:
        desk = StageRequestQueue(StageLedger(LedgerLimits(batch_tokens=4)), lambda: 0.0)
        asking = [await _ask(desk, f"input {number}") for number in range(3)]
        assert list(desk._payloads.values()) == ["input 0"]
        task = desk.next()
        assert isinstance(task, Task) and task.payload == "input 0"
        desk.done(task, "answer")
        assert await asyncio.gather(*asking) == ["answer"] * 3

    asyncio.run(live())


def test_a_closed_desk_keeps_nothing_and_computes_nothing_of_it_when_it_opens_again() -> None:
    async def live() -> None:
        desk = StageRequestQueue(StageLedger(LedgerLimits(batch_tokens=4)), lambda: 0.0)
        asking = await _ask(desk, "input")
        task = desk.next()
        assert isinstance(task, Task)
        desk.done(task, "answer")
        assert await asking == "answer"
        waits = asyncio.create_task(desk.ask(Key("d", 1, 0), "forward", 2, "input"))
        await asyncio.sleep(0)
        desk.close()
        with pytest.raises(GoneError):
            await waits
        assert not desk._answers and not desk._payloads and desk.num_waiting == 0
        desk.open()
        while (what := desk.next()) is not None:
            assert not isinstance(what, Task)
        with pytest.raises(GoneError):
            await (await _ask(desk, "input"))

    asyncio.run(live())
