"""Assertions on error codes: tests compare codes, so that sentences may change."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest

from swarmtrain.errors import SwarmtrainError


@contextlib.contextmanager
def raises_code(
    code: str, kind: type[SwarmtrainError] = SwarmtrainError, *says: str
) -> Iterator[pytest.ExceptionInfo[SwarmtrainError]]:
    """What is inside raises an error of `kind` with this code, as `pytest.raises`; `says` are keys, names and numbers
    that the message must have, or the command that it gives."""
    with pytest.raises(kind) as raised:
        yield raised
    assert code in codes_of(raised.value), f"{codes_of(raised.value)}: {raised.value}"
    missing = [each for each in says if each not in str(raised.value)]
    assert not missing, f"{missing} in: {raised.value}"


def codes_of(error: SwarmtrainError) -> list[str]:
    """Return the code of each problem of an error."""
    return [problem.code for problem in error.problems]


def codes_in(text: str) -> list[str]:
    """Return the codes in printed text: in brackets at the ends of lines."""
    return re.findall(r" \[([a-z0-9-]+)\]$", text, re.MULTILINE)
