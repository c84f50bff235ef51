"""Small hub of the tests (`small_hub.py`) with data sets, as the library `datasets` uses it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from small_hub import SmallHub, small_hub


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch, cache: Any) -> Iterator[SmallHub]:
    """Point the libraries to a small hub of data sets, with their cache in `cache`."""
    import datasets

    with small_hub() as hub:
        hub.kind = "datasets"
        hub.use_in(monkeypatch, cache)
        url = f"{hub.endpoint}/datasets/{{repo_id}}/resolve/{{revision}}/{{path}}"
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
        monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", url)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
        monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "datasets" / "downloads")
        monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
        yield hub
