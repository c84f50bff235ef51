"""What the command that waits for a peer in the background makes of its words."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from swarmtrain.cli.background import _Started
from swarmtrain.events import ErrorEvent, Event, to_json_line


def test_torn_lines_are_passed_over(tmp_path: Path) -> None:
    whole = to_json_line(ErrorEvent(message="no room", exit_code=1))
    folder = f'{{"folder": "{tmp_path}"}}'
    process: Any = None
    peer, shown = _Started(process, by_folder=True), list[Event]()
    pipe = io.BytesIO("\n".join([folder[:-9], folder, whole[:40], whole, whole[:-3]]).encode())
    peer.listen(pipe, shown.append)
    assert peer.folder == tmp_path
    assert peer.error == "no room"
    assert len(shown) == 1 and peer.up is None
