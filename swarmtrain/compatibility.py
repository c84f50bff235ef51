"""Protocol numbers: which versions of swarmtrain can train together, and what to say when two cannot.

The run file, the invite and every answer to a greeting carry the protocol number that a run needs and the first version
that spoke it, so that a peer that is too old can name the version it needs. Data without a number is of protocol 1.
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
"""Protocol that this version speaks."""

OLDEST_PROTOCOL = 1
"""Oldest protocol that can train together with this version."""

FIRST_VERSIONS: Mapping[int, str] = {1: "0.1", 2: "0.2"}
"""First version that spoke each protocol."""

KEYS_SINCE: Mapping[str, int] = {
    "adapter.method": 2,
    "adapter.rank": 2,
    "adapter.alpha": 2,
    "adapter.dropout": 2,
    "adapter.targets": 2,
    "adapter.group_rank": 2,
    "adapter.modules": 2,
    "adapter.num_parameters": 2,
    "data.format": 2,
    "data.packing": 2,
    "data.source=parquet": 2,
    "data.sources": 2,
    "inner.precision": 2,
    "merge.delay_steps": 2,
    "merge.max_wait_s": 2,
    "merge.method=batch": 2,
    "merge.optimizer": 2,
    "merge.target_tokens": 2,
    "merge.target_tokens=auto": 2,
    "model.base": 2,
    "model.constants_sha256": 2,
    "model.from_scratch": 2,
    "model.num_parameters": 2,
    "model.source": 2,
    "model.tied_embeddings": 2,
    "model.tokenizer=OWNER/NAME": 2,
    "model.tokenizer=PATH/tokenizer.json": 2,
    "model.tokenizer=model": 2,
    "published.dataset_revision": 2,
    "published.dataset_revisions": 2,
    "published.held_out_source_bytes": 2,
    "published.model_files_bytes": 2,
    "published.model_files_sha256": 2,
    "run.show_invite": 2,
}
"""Protocols of run-file keys ("section.key") and values ("section.key=value") that came after protocol 1."""

WIRE_SHA256 = "2ecb2cc4d014ad10716fa65d7e75d91690dde9ded52fecd9f33aa4ea60b45e4c"

_VERSION = re.compile(r"[0-9A-Za-z.+-]{1,32}")
UPDATE = "update it where you installed it from, in a clone of its repository by `git pull` and `pip install .`"
"""Advice to update. A clone of the repository is the only source: no package index has swarmtrain."""


@dataclass(frozen=True)
class Needs:
    """Lowest protocol that a run needs, and the first version that spoke it."""

    protocol: int = 1
    version: str = FIRST_VERSIONS[1]


def needs_with(keys_written: Mapping[str, object]) -> Needs:
    """Return the needs of a run that this version publishes with these keys ("section.key", "section.key=value")."""
    protocol = max([OLDEST_PROTOCOL, *(since for key, since in KEYS_SINCE.items() if key in keys_written)])
    return Needs(protocol, FIRST_VERSIONS[protocol])


def needs_untrusted(protocol: int, version: str) -> Needs:
    """Return the needs that another peer states. Protocol 0 means that it is older than protocol numbers."""
    if protocol <= 1:
        return Needs()
    return Needs(protocol, version if _VERSION.fullmatch(version) else "")


def too_old_for(needs: Needs) -> Problem | None:
    """Say that this swarmtrain is too old for a run; None if it is not."""
    if needs.protocol <= PROTOCOL:
        return None
    wanted = f"{needs.version} or newer" if needs.version else "a newer one"
    return Problem(f"you have swarmtrain {__version__}, this run needs {wanted}: {UPDATE}", "run-needs-newer")


def too_old_to_train_with(who: str, protocol: int, version: str) -> Problem | None:
    """Say that this swarmtrain is too new for the peer `who`; None if it is not.

    `protocol` (0: none stated) and `version` are what that peer says of itself.
    """
    if max(protocol, 1) >= OLDEST_PROTOCOL:
        return None
    theirs = version if _VERSION.fullmatch(version) else "an older version"
    return Problem(
        f"{who} runs swarmtrain {theirs}, and your {__version__} trains only with "
        f"{FIRST_VERSIONS[OLDEST_PROTOCOL]} or newer: ask its owner to update, or install {theirs} for this run",
        "peer-needs-newer",
    )
