"""Checks of `swarmtrain doctor` on the devices to train on: which there are, and whether the best card does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from swarmtrain.peer.devices.expected_device import found_in_words
from swarmtrain.peer.doctor.machine import Finding
from swarmtrain.protocol.devices import FoundDevice, ProbeResult, cards_in_words, fastest_precision
from swarmtrain.words import size_in_words


def check_devices(found: Sequence[FoundDevice], missing: str) -> Finding:
    """List the devices; `missing` says why torch shows no card that is there."""
    listed = "; ".join(found_in_words(device) for device in found)
    if missing:
        advice = "training is on the processor like this; pytorch.org says which torch, and which driver, a card needs"
        return Finding("device", "warning", f"{listed}; {missing}", advice)
    none = "" if any(device.is_card for device in found) else "; no graphics card was found"
    several = cards_in_words(found, 0)
    return Finding("device", "ok", f"{listed}{none}" + (f"; {several}" if several else ""))


def check_card(card: FoundDevice, needed_bytes: int, probe: Callable[[FoundDevice], ProbeResult]) -> Finding:
    """Judge whether a run that takes `needed_bytes` fits a card, and by `probe` whether the card computes rightly."""
    if card.free_bytes is not None and card.free_bytes < needed_bytes:
        found = f"{found_in_words(card)}, and this run needs at least {size_in_words(needed_bytes)} there"
        advice = (
            "training would be on the processor: end other programs that use the card, or ask for a run with a "
            "smaller model or a smaller model.context_tokens"
        )
        return Finding("device", "warning", found, advice)
    result = probe(card)
    if result.problem:
        advice = "training would be on the processor; update the card's driver, or install another torch (pytorch.org)"
        return Finding("device", "warning", f"{card} does not work: {result.problem}", advice)
    precision, how_fast = fastest_precision(result.tokens_per_s)
    found = f"{card} works, and this run fits (at least {size_in_words(needed_bytes)}); it would compute in {precision}"
    return Finding("device", "ok", found + (f": {how_fast}" if how_fast else ""))


def check_card_watch(name: str, problem: str) -> Finding:
    """Judge whether a card can be watched; `problem` is what keeps it from being measured."""
    if not problem:
        return Finding("device", "ok", f"{name} can be watched: training pauses while other programs use it")
    found = f"{name}: training would not pause while other programs use it: {problem}"
    return Finding(
        "device", "warning", found, "pause it yourself when you need the card, or see --gpu-share and --hours"
    )
