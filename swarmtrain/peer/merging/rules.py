"""Robust means that replace the token-weighted mean of pseudo-gradients, by their name in `merge.robust`.

The built-in ones are in `algorithm.robust`. "PACKAGE:RULE" names a function of another package, an entry point of the
group `swarmtrain.merge_rules`. Only packages that the user has installed with pip are run: a run file names a rule, and
no code ever comes from another peer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from swarmtrain.algorithm.robust import flag_mean, trimmed_mean
from swarmtrain.errors import RunFileError
from swarmtrain.packages import entry_of, file_sha256, find_external

GROUP = "swarmtrain.merge_rules"

Mean: TypeAlias = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
"""Function of fp32 gradients (P,), the own one first, and a factor for each; returns their mean (P,). It must not write
into them.
"""

_OURS: dict[str, Mean] = {"trimmed": trimmed_mean, "flag": flag_mean}


def is_ours(rule: str) -> bool:
    """Return whether the rule is one of `algorithm.robust`."""
    return rule in _OURS


@functools.cache
def mean_of(rule: str) -> Mean | None:
    """Return the mean of that rule, or None if it keeps the token-weighted mean.

    Raises `RunFileError`, naming the package, if the package or its function is missing.
    """
    if ":" not in rule:
        return _OURS.get(rule)
    mean, place = find_external("robust", rule, "rule", GROUP)
    if not callable(mean):
        raise RunFileError(
            f'merge.robust = "{rule}": {place} is not a function; ask its authors', code="merge-package-broken"
        )
    return mean  # type: ignore[no-any-return]


def source_sha256(rule: str) -> str | None:
    """Return the SHA-256 of the file that defines another package's rule; None for a built-in one. Raises as `mean_of`
    does.
    """
    if mean_of(rule) is None or is_ours(rule):
        return None
    return file_sha256("robust", rule, entry_of("robust", rule, "rule", GROUP).module)
