"""Groups of an adapter's components, and which of them a volunteer trains in a round.

A LoRA adapter of rank R has R components, each a column of B times a row of A. They are cut into groups of equal rank.
With gossip each group is one fragment of what is merged; with synchronous rounds a pseudo-gradient contains some of the
groups. A weaker volunteer, or one with a slower link, trains only some groups in a round, and other ones in the next.
Tensors are grouped by their names, so that whoever has a tensor table has the groups.

Everything here is pure.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Iterable, Sequence

_NAME = re.compile(r"group(\d{1,2})/")


def tensor_name(group: int, name: str) -> str:
    """Return the name of a group's part of an adapter's tensor."""
    return f"group{group}/{name}"


def group_named(name: str) -> int | None:
    """Return the group of a tensor of that name; None if it is not an adapter's."""
    found = _NAME.match(name)
    return None if found is None else int(found[1])


def groups_of_names(names: Iterable[str]) -> Sequence[int] | None:
    """Return the group of each tensor; None if these are not an adapter's tensors."""
    groups = [group_named(name) for name in names]
    found = [group for group in groups if group is not None]
    assert len(found) in (0, len(groups)), "either all tensors that peers train are an adapter's, or none is"
    return found or None


@functools.lru_cache(maxsize=4096)
def trained_groups(peer: str, round: int, num_groups: int, num_trained: int) -> frozenset[int]:
    """Return the groups that `peer` trains in a round: `num_trained` of `num_groups`, those it has trained least first.

    Among groups that it has trained equally often, a hash of the PeerID and the round decides, so that peers which
    train few groups do not all train the same ones. The answer depends on nothing else: other peers can infer it, and a
    peer that comes back continues as if it had never left.
    """
    if num_trained >= num_groups:
        return frozenset(range(num_groups))
    times, trained = [0] * num_groups, list[int]()
    period = num_groups // math.gcd(num_groups, num_trained)  # after so many rounds all were trained equally often
    for each in range(round - round % period, round + 1):
        order = {group: _drawn(peer, each, group) for group in range(num_groups)}
        trained = sorted(order, key=lambda group: (times[group], order[group]))[:num_trained]
        for group in trained:
            times[group] += 1
    return frozenset(trained)


def _drawn(peer: str, round: int, group: int) -> bytes:
    return hashlib.sha256(f"{peer} {round} {group}".encode()).digest()
