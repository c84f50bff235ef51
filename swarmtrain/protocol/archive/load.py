"""How much the bootstrap asks of whom for its archive, and how often: less where models are large.

A state weighs 8 bytes a parameter, and its author sends it over the link that its rounds are merged over. A small model
is archived as often as the run file says, of as many volunteers as are averaged at most.
"""

from __future__ import annotations

__all__ = ["archive_bytes", "archive_every_s", "archived_sources"]

_MOST_SOURCES = 16
_LEAST_SOURCES = 3
"""Of three, weights that are far from the others are left out."""
_MOST_BYTES = 512_000_000
"""Of weights that are held at once to be averaged, where three have no more."""
_SMALL_PARAMETERS = 4_000_000
_MOST_SHARE = 0.1
"""Of the time, archives take so much at most: links are there for merging."""
_MOST_EVERY_S = 1800.0


def archived_sources(num_parameters: int) -> int:
    """The weights of so many volunteers are averaged for the archive of a model, with gossip."""
    return max(_LEAST_SOURCES, min(_MOST_SOURCES, _MOST_BYTES // (4 * max(1, num_parameters))))


def archive_bytes(num_parameters: int, num_volunteers: int) -> int:
    """What one archive with gossip brings: the weights of each source, and the momentum of one."""
    return 4 * num_parameters * (min(archived_sources(num_parameters), num_volunteers) + 1)


def archive_every_s(every_s: float, took_s: float, num_parameters: int) -> float:
    """After an archive that took so long, when the next one is due: `every_s` as the run file says, or of a large model
    later, half an hour at most unless the run file says more. Who leaves is archived before, whatever is due."""
    if num_parameters <= _SMALL_PARAMETERS:  # if that took long, somebody did not answer
        return every_s
    return max(every_s, min(took_s / _MOST_SHARE, _MOST_EVERY_S))
