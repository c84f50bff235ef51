"""What takes the place of the token-weighted mean of pseudo-gradients, by its name in `merge.robust`.

Ours are in `algorithm.robust`. "PACKAGE:RULE" is a function of another package, an entry point of the group
`swarmtrain.merge_rules`: whoever installs the package here, with pip, chooses to run it. A run file only names it;
nothing that is run ever comes from another peer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from swarmtrain.algorithm.robust import flag_mean, trimmed_mean
from swarmtrain.errors import RunFileError
from swarmtrain.packages import brought, entry_of, file_sha256

__all__ = ["GROUP", "Mean", "is_ours", "mean_of", "source_sha256"]

GROUP = "swarmtrain.merge_rules"

Mean: TypeAlias = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
"""Of fp32 gradients (P,), the own one first, each times its factor: one of the same size. None is written into."""

_OURS: dict[str, Mean] = {"trimmed": trimmed_mean, "flag": flag_mean}


def is_ours(rule: str) -> bool:
    """Whether that mean is one of `algorithm.robust`."""
    return rule in _OURS


@functools.cache
def mean_of(rule: str) -> Mean | None:
    """The mean of that rule; None where it keeps the token-weighted one. Raises `RunFileError`, which names the
    package, if that is not here or has no such function."""
    if ":" not in rule:
        return _OURS.get(rule)
    mean, place = brought("robust", rule, "rule", GROUP)
    if not callable(mean):
        raise RunFileError(
            f'merge.robust = "{rule}": {place} is no function; ask those who made it', code="merge-package-broken"
        )
    return mean  # type: ignore[no-any-return]


def source_sha256(rule: str) -> str | None:
    """Of the file that has another package's rule; None for ours. Errors are those of `mean_of`."""
    if mean_of(rule) is None or is_ours(rule):
        return None
    return file_sha256("robust", rule, entry_of("robust", rule, "rule", GROUP).module)
