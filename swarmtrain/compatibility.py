"""Which versions of swarmtrain can train together: one number for the wire, and the sentences when it does not fit.

The run file, the invite and every answer to a greeting carry the number that a run needs, and the version that spoke it
first, so that a peer that is too old can say which version it needs. What carries no number was made by protocol 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from swarmtrain import __version__
from swarmtrain.errors import Problem

__all__ = [
    "FIRST_VERSIONS",
    "KEYS_SINCE",
    "OLDEST_PROTOCOL",
    "PROTOCOL",
    "UPDATE",
    "WIRE_SHA256",
    "Needs",
    "needs_untrusted",
    "needs_with",
    "too_old_for",
    "too_old_to_train_with",
]

# When to raise what. The wire is the messages between peers (protos snapshot and pipeline) and the keys of a published
# run. `tests/test_compatibility.py` fails when it changes and points here.
# - A field or message is added, and peers that do not know it train on as before: PROTOCOL + 1 with the first such
#   change of a version, and its line in FIRST_VERSIONS. OLDEST_PROTOCOL stays.
# - A key of the run file is added: the same, and the key goes into KEYS_SINCE. A published run leaves it out where it
#   has its default, so that older peers, which refuse unknown keys, can read it; with another value the run needs the
#   key's protocol. Its default must never change, and must mean what runs of before did.
# - A field, key or meaning changes so that older peers cannot take part: besides, OLDEST_PROTOCOL = PROTOCOL.
# Then set WIRE_SHA256 to what the test says.

PROTOCOL = 2
"""What this version speaks."""

OLDEST_PROTOCOL = 1
"""The oldest that can train together with this version."""

FIRST_VERSIONS: Mapping[int, str] = {1: "0.1", 2: "0.2"}
"""Which version spoke each protocol first."""

KEYS_SINCE: Mapping[str, int] = {"data.source=parquet": 2, "published.dataset_revision": 2}
"""Keys of the run file, as "section.key", and values, as "section.key=value", that came after protocol 1, and with
which."""

WIRE_SHA256 = "241e702fe1ecac3728c5a4aa3656459dd0e841a48dcfa1d19bed94b0d0388cd2"

_VERSION = re.compile(r"[0-9A-Za-z.+-]{1,32}")
UPDATE = "update it where you installed it from, in a clone of its repository by `git pull` and `pip install .`"
"""Its only source: no package index has it."""


@dataclass(frozen=True)
class Needs:
    """What a peer must speak at least to take part in a run, and the version that spoke it first."""

    protocol: int = 1
    version: str = FIRST_VERSIONS[1]


def needs_with(keys_written: Mapping[str, object]) -> Needs:
    """What a run needs that is published by this version with `keys_written` ("section.key", "section.key=value")."""
    protocol = max([OLDEST_PROTOCOL, *(since for key, since in KEYS_SINCE.items() if key in keys_written)])
    return Needs(protocol, FIRST_VERSIONS[protocol])


def needs_untrusted(protocol: int, version: str) -> Needs:
    """The same as another peer says it; 0 is that of before there were numbers."""
    if protocol <= 1:
        return Needs()
    return Needs(protocol, version if _VERSION.fullmatch(version) else "")


def too_old_for(needs: Needs) -> Problem | None:
    """What a person is told whose swarmtrain is too old for a run; None if it is not."""
    if needs.protocol <= PROTOCOL:
        return None
    wanted = f"{needs.version} or newer" if needs.version else "a newer one"
    return Problem(f"you have swarmtrain {__version__}, this run needs {wanted}: {UPDATE}", "run-needs-newer")


def too_old_to_train_with(who: str, protocol: int, version: str) -> Problem | None:
    """What a person is told whose swarmtrain is too new for the peer `who`, which speaks `protocol` (0: none told) and
    says that it is `version`; None if it is not."""
    if max(protocol, 1) >= OLDEST_PROTOCOL:
        return None
    theirs = version if _VERSION.fullmatch(version) else "an older version"
    return Problem(
        f"{who} runs swarmtrain {theirs}, and your {__version__} trains only with "
        f"{FIRST_VERSIONS[OLDEST_PROTOCOL]} or newer: ask its owner to update, or install {theirs} for this run",
        "peer-needs-newer",
    )
