"""Last line that a peer's command prints: where the model is, or how to continue."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from swarmtrain.peer.lifecycle.start_options import Started, StartedFile
from swarmtrain.words import one_line

if TYPE_CHECKING:
    from swarmtrain.events import DoneEvent
    from swarmtrain.v1.control_pb2 import PeerStatus


def closing_line(done: DoneEvent, folder: Path, *, is_usual: bool) -> str:
    """Return the last line for the peer in `folder`, which has ended for `done`.

    `is_usual`: the command finds that folder without `--dir` too.
    """
    from swarmtrain.peer.control.server import read_status
    from swarmtrain.v1.control_pb2 import PeerStatus

    return last_line(done.reason, read_status(folder) or PeerStatus(), folder, is_usual=is_usual)


def last_line(reason: str, status: PeerStatus, folder: Path, *, is_usual: bool = False) -> str:
    """Return the last line for a peer that ended for `reason` and left `status`.

    A peer that was asked to leave may have finished its run too: the model's tokens decide.
    """
    from swarmtrain.model.provenance import tokens_of_export

    if reason == "total_tokens":
        return model_line(folder / "model")
    is_over = 0 < status.total_tokens <= tokens_of_export(folder / "model")
    return model_line(folder / "model") if is_over else go_on_line(folder, is_usual=is_usual)


def model_line(model: Path) -> str:
    """Say where the run's model is and how to use it; empty without one, as for peers that held stages of it."""
    from swarmtrain.model.provenance import description_of

    if description_of(model) is None:
        return ""
    where = shlex.quote(one_line(str(model)))
    return f"the model is in {where}; try: swarmtrain generate {where}"


def go_on_line(folder: Path, *, is_usual: bool = False) -> str:
    """Say which command continues the peer, and from which round; empty without a run, or if the command is not
    known."""
    from swarmtrain.peer.checkpoints.files import newest_written
    from swarmtrain.peer.lifecycle.folder import PeerFolder

    started, run_sha256 = StartedFile(folder).read(), PeerFolder(folder).kept_sha256()
    if not started.command or run_sha256 is None:
        return ""
    # The folder remembers the options; without --dir the name leads to the folder.
    name = {flag: words for flag, words in started.options.items() if is_usual and flag == "--name"}
    line = one_line(Started(started.command, name).line(None if is_usual else folder))
    kept = newest_written(folder / "checkpoints", run_sha256)
    return f"`{line}` continues" + (f" from round {kept.round}" if kept is not None else "")
