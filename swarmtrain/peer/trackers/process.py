"""Process of one tracker: draws the points that a peer writes to its standard input.

The peer (`tracker.py`) writes a line of JSON about itself, then one for each point; each is answered by a line once the
library has taken it, or by the reason why it did not, with which the process ends. When its standard input ends, also
because the peer was killed, the process lets the library finish, and ends within three minutes even if that hangs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import IO, Any

from swarmtrain.peer.trackers.sinks import SINKS, Sink, TrackedPeer

__all__ = ["FINISH_LIMIT_S", "main", "serve"]

_log = logging.getLogger(__name__)
FINISH_LIMIT_S = 180
"""Seconds in which a library must have finished, as it may still send points to its server."""
_NICENESS = 10


def main() -> None:
    """Serve the tracker that the command line names, until standard input ends."""
    # Libraries print, and some ask: the peer's lines are theirs neither to read nor to mix with.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    code = 1
    try:
        serve(SINKS[sys.argv[1]](), _lines(requests), replies)
        code = 0
    except Exception:  # a task boundary: whatever the library raises was told to the peer
        _log.exception("the tracker failed")
    sys.stderr.flush()
    os._exit(code)  # a library may have threads, and work of its own at the exit, that never end


def _lines(requests: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines as they come. When they end, also while the library hangs, it has three minutes to finish."""
    lines: SimpleQueue[bytes] = SimpleQueue()

    def read() -> None:
        for line in requests:
            lines.put(line)
        signal.alarm(FINISH_LIMIT_S)  # nobody handles the signal: it ends the process
        lines.put(b"")

    threading.Thread(target=read, name="requests", daemon=True).start()
    return iter(lines.get, b"")


def serve(sink: Sink, requests: Iterator[bytes], replies: IO[bytes]) -> None:
    """Drive `sink` by the lines of `requests`, and answer each. Raises whatever the sink raises.

    The peer is told of an error before the library is asked to end, which may hang.
    """
    try:
        place = sink.begin(TrackedPeer(**json.loads(next(requests, b"{}"))))
        _reply(replies, where=place.where, shown_by=place.shown_by, offline=place.offline)
        for line in requests:
            point = json.loads(line)
            sink.log(point["step"], point["time"], point["values"])
            _reply(replies, step=point["step"])
    except BaseException as error:
        with contextlib.suppress(OSError):  # the peer is gone
            _reply(replies, error=f"{type(error).__name__}: {error}")
        signal.alarm(FINISH_LIMIT_S)
        with contextlib.suppress(Exception):  # what failed first is told
            sink.end()
        raise
    sink.end()


def _reply(replies: IO[bytes], **fields: Any) -> None:
    replies.write(json.dumps(fields).encode() + b"\n")


if __name__ == "__main__":
    main()
