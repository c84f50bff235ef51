"""Which rule a peer broke, in a word, for the event that names it."""

from __future__ import annotations

__all__ = ["rule_of"]


def rule_of(detail: str) -> str:
    """The rule behind an error's sentence: the first whose word is in it."""
    words = {
        "sent nothing": "stall",
        "it delivers": "stall",
        "calls a second": "flood",
        "against the own": "direction",
        "beyond what is usual": "huge",
        "hash": "hash",
        "finite": "finite",
        "shape": "shape",
        "tensors": "shape",
        "signature": "signature",
        "forged": "signature",
        "bytes, more": "size",
        "tokens": "tokens",
        "order": "stream",
        "end": "stream",
        "round": "round",
        "presence": "presence",
        "steps": "tokens",
        "publication": "publication",
    }
    return next((rule for word, rule in words.items() if word in detail), "format")
