"""Request queue of a stage: what it keeps of requests and answers, and for how long."""

from __future__ import annotations

import asyncio

import pytest

from swarmtrain.errors import GoneError
from swarmtrain.peer.pipeline.request_queue import StageRequestQueue, Task
from swarmtrain.protocol.pipeline.ledger import Key, LedgerLimits, StageLedger

KEY = Key("d", 0, 0)


async def _ask(queue: StageRequestQueue, payload: str) -> asyncio.Task[str]:
    asking = asyncio.create_task(queue.ask(KEY, "forward", 2, payload))
    await asyncio.sleep(0)
    return asking


def test_of_a_question_asked_again_and_again_one_payload_is_kept() -> None:
    async def live() -> None:
        queue = StageRequestQueue(StageLedger(LedgerLimits(batch_tokens=4)), lambda: 0.0)
        asking = [await _ask(queue, f"input {number}") for number in range(3)]
        assert list(queue._payloads.values()) == ["input 0"]
        task = queue.next()
        assert isinstance(task, Task) and task.payload == "input 0"
        queue.done(task, "answer")
        assert await asyncio.gather(*asking) == ["answer"] * 3

    asyncio.run(live())


def test_a_closed_desk_keeps_nothing_and_computes_nothing_of_it_when_it_opens_again() -> None:
    async def live() -> None:
        queue = StageRequestQueue(StageLedger(LedgerLimits(batch_tokens=4)), lambda: 0.0)
        asking = await _ask(queue, "input")
        task = queue.next()
        assert isinstance(task, Task)
        queue.done(task, "answer")
        assert await asking == "answer"
        waits = asyncio.create_task(queue.ask(Key("d", 1, 0), "forward", 2, "input"))
        await asyncio.sleep(0)
        queue.close()
        with pytest.raises(GoneError):
            await waits
        assert not queue._answers and not queue._payloads and queue.num_waiting == 0
        queue.open()
        while (what := queue.next()) is not None:
            assert not isinstance(what, Task)
        with pytest.raises(GoneError):
            await (await _ask(queue, "input"))

    asyncio.run(live())
