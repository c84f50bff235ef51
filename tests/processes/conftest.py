"""Fixtures of the tests with real processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from preloaded import Preloaded
from swarm import Swarm


@pytest.fixture(scope="session", autouse=True)
def interrupts_are_heard() -> None:
    """Restore SIGINT: a shell starts background jobs with it ignored, and children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def preloaded() -> Iterator[Preloaded]:
    """Provide peers that start without importing anything."""
    preloaded = Preloaded()
    yield preloaded
    preloaded.close()


@pytest.fixture(scope="session")
def preloaded_with_transformers() -> Iterator[Preloaded]:
    """Provide peers of runs with a Llama, which start without importing anything."""
    preloaded = Preloaded(
        "transformers.models.llama.modeling_llama", "swarmtrain.model.huggingface_model", "peft.tuners.lora"
    )
    yield preloaded
    preloaded.close()


@pytest.fixture
def swarm(tmp_path: Path, preloaded: Preloaded) -> Iterator[Swarm]:
    """Provide processes below the test's folder; all have ended when the test has."""
    with Swarm(tmp_path, preloaded=preloaded) as swarm:
        yield swarm
