"""Load of archiving: how much the bootstrap asks of which volunteers, and how often; less for large models.

A state weighs 8 bytes a parameter, and its author sends it over the link that it needs for merging. A small model is
archived as often as the run file says, from as many volunteers as are averaged at most.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from swarmtrain.protocol.membership.membership import PeerInfo

_MOST_SOURCES = 16
"""Volunteers whose weights are averaged, at most."""
_LEAST_SOURCES = 3
"""Volunteers whose weights are averaged, at least: of three, weights that are far from the others are left out."""
_MOST_BYTES = 512_000_000
"""Limit of the weights held at once for averaging, if more than `_LEAST_SOURCES`."""
_SMALL_PARAMETERS = 4_000_000
"""Up to this size a model is archived as often as the run file says."""
_MOST_SHARE = 0.1
"""Share of the time that archiving may take, because links are there for merging."""
_MOST_EVERY_S = 1800.0
"""Longest interval between two archives unless the run file says more."""
_CURVE_ARCHIVES = 24
"""Archives of a small model's run, at least: each is a point of the held-out curve."""
_EARLIEST = 1 / 12
"""Shortest interval between two of those, as a share of that of the run file: 5 s of 60."""
_EARLY_SHARE = 0.05
"""Share of the time that those may take."""


def archived_sources(num_parameters: int) -> int:
    """Return how many volunteers' weights are averaged for an archive, with gossip."""
    return max(_LEAST_SOURCES, min(_MOST_SOURCES, _MOST_BYTES // (4 * max(1, num_parameters))))


def archive_bytes(num_parameters: int, num_volunteers: int) -> int:
    """Return the bytes that one archive with gossip downloads: the weights of each source, and the momentum of one."""
    return 4 * num_parameters * (min(archived_sources(num_parameters), num_volunteers) + 1)


def archive_every_s(every_s: float, took_s: float, num_parameters: int) -> float:
    """Return when the next archive is due, in seconds after one that took `took_s`.

    That is `every_s`, or later for a large model, but at most half an hour unless the run file says more. Peers that
    leave are archived at once, whatever is due.
    """
    if num_parameters <= _SMALL_PARAMETERS:  # if it took long, some peer did not answer
        return every_s
    return max(every_s, min(took_s / _MOST_SHARE, _MOST_EVERY_S))


def not_the_slowest(volunteers: Iterable[PeerInfo]) -> list[PeerInfo]:
    """Return those of peers that all hold the same state from which to pull it: without those whose uplinks, as they
    tell, are slower than the middle one. Their links are what a round waits for."""
    infos = list(volunteers)
    up = {info.peer: info.link.up_bytes_per_s for info in infos if info.link is not None and info.link.up_bytes_per_s}
    middle = statistics.median_low(up.values()) if up else 0.0
    return [info for info in infos if up.get(info.peer, middle) >= middle]


def is_early_archive_due(gained: float, since_s: float, took_s: float, every_s: float, num_parameters: int) -> bool:
    """Return whether an archive is due before `archive_every_s` says so, since the run is short.

    `gained` is what was trained since the last archive, as a share of all tokens of the run; that archive was `since_s`
    ago and took `took_s`. Only a small model's archive comes early.
    """
    if num_parameters > _SMALL_PARAMETERS or gained * _CURVE_ARCHIVES < 1:
        return False
    return since_s >= max(_EARLIEST * every_s, took_s / _EARLY_SHARE)


def is_measurement_due(gained: float, since_s: float, took_s: float, every_s: float, num_parameters: int) -> bool:
    """Return whether a volunteer that stands in for a bootstrap measures the held-out loss now: as often as a bootstrap
    archives, in a tenth of its time at most, since it does not train meanwhile. Arguments as above."""
    early = is_early_archive_due(gained, since_s, took_s, every_s, num_parameters)
    return early or since_s >= max(every_s, took_s / _MOST_SHARE)
