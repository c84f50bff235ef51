"""Protocol number: peers train together if they speak the same one, and are told which version to use if not.

The wire is the messages between peers (protos snapshot and pipeline) and the keys of a published run. Whoever changes
it raises `PROTOCOL` once per release, and sets `WIRE_SHA256` to what `tests/test_compatibility.py` says.
"""

from __future__ import annotations

import re

from swarmtrain import __version__
from swarmtrain.errors import Problem

PROTOCOL = 3
"""Protocol that this version speaks: in a published run, in an invite and in every answer to a greeting."""

WIRE_SHA256 = "921493e76a7a61ac2fbd6de1bc74986ef43c3eee5bae27ba921ea8d7f468ed55"

_VERSION = re.compile(r"[0-9A-Za-z.+-]{1,32}")
UPDATE = "update it where you installed it from, in a clone of its repository by `git pull` and `pip install .`"
"""Advice to update. A clone of the repository is the only source: no package index has swarmtrain."""


def protocol_mismatch(who: str, protocol: object, version: object) -> Problem | None:
    """Return why `who`, a run or a peer that states `protocol` and `version`, does not fit; None if it does."""
    if protocol == PROTOCOL:
        return None
    is_version = isinstance(version, str) and _VERSION.fullmatch(version)
    theirs = f"swarmtrain {version}" if is_version else "another version of swarmtrain"
    here = f"{who} is of {theirs}, and you have {__version__}"
    if isinstance(protocol, int) and protocol > PROTOCOL:
        return Problem(f"{here}: {UPDATE}", "run-needs-newer")
    return Problem(f"{here}: ask its owner to update, or install {theirs} for this run", "peer-needs-newer")
