"""Numbers and names in words for a person. Imports no other module, since the quickest commands need it too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from unicodedata import category


def size_in_words(num_bytes: float) -> str:
    """Format a size in bytes for a person, such as `3.4 MB`; powers of ten."""
    return _scaled(num_bytes, ("B", "kB", "MB", "GB", "TB", "PB"))


def count_in_words(number: float) -> str:
    """Format a count for a person, such as `1.2 M`; powers of ten."""
    return _scaled(number, ("", "k", "M", "G", "T", "P")).rstrip()


def counted(number: float, noun: str, plural: str = "") -> str:
    """Format a number of things, such as `1 peer` or `3 peers`; `plural` if it is not the noun and an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def device_in_words(device: str, title: str) -> str:
    """Name a device for a person, such as `cuda:0 (NVIDIA H100)` or `the processor`; `device` is torch's name of it.

    Of several, as `--device` takes them, it is `cuda:0 and cuda:1 (NVIDIA H100), data parallel`.
    """
    first, *others = device.split(",")
    if others:
        kind = first.partition(":")[0]
        named = " and ".join([first, *(f"{kind}:{other}" for other in others)])
        where = f"{1 + len(others)} ranks on the processor" if kind == "cpu" else named
        return f"{where}{f' ({title})' if title else ''}, data parallel"
    if device == "cpu":
        return "the processor"
    return f"{device} ({title})" if title else device


def speed_in_words(tokens_per_s: float) -> str:
    """Format a speed for a person, such as `4.1 k tokens/s`."""
    return f"{count_in_words(tokens_per_s)} tokens/s"


def below_in_words(times: float) -> str:
    """Compare traffic with an all-reduce at every step, such as `25.1 times below an all-reduce`."""
    return f"{count_in_words(times)} times below an all-reduce"


def loss_in_words(nats_per_byte: float) -> str:
    """Format a held-out loss for a person, such as `1.386 nats/byte`."""
    return f"{nats_per_byte:.3f} nats/byte"


def source_losses_in_words(names: Sequence[str], losses: Sequence[float]) -> str:
    """Format the held-out loss of each source of text for a person, such as `code 0.912, prose 1.386 nats/byte`; empty
    without sources."""
    parts = [f"{name} {loss:.3f}" for name, loss in zip(names, losses, strict=False)]
    return f"{', '.join(parts)} nats/byte" if parts else ""


def percent_in_words(part: float, whole: float) -> str:
    """Format a part of a whole, such as `40%`. Rounds down, so that only the whole is 100 %."""
    if whole <= 0:
        return "0%"
    if 0 < part / whole < 0.001:
        return "<0.1%"
    tenths = math.floor(min(1.0, part / whole) * 1000 + 1e-9)
    return f"{tenths / 10:g}%" if tenths < 100 else f"{tenths // 10}%"


def shares_in_words(counts: Sequence[int]) -> list[str]:
    """Format each count's share of the sum of `counts`, such as `33%`; together they are 100 %.

    Shares are rounded to whole percents by the largest remainder, and to tenths where one of them is below a percent.
    """
    total = sum(counts)
    if total <= 0:
        return ["0%"] * len(counts)
    units = 1000 if any(0 < 100 * count < total for count in counts) else 100
    whole = [count * units // total for count in counts]
    order = sorted(range(len(counts)), key=lambda n: (-(counts[n] * units % total), n))
    for n in order[: units - sum(whole)]:
        whole[n] += 1
    least = f"<{100 / units:g}%"
    return [
        f"{100 * share / units:g}%" if share or not count else least for share, count in zip(whole, counts, strict=True)
    ]


def _scaled(number: float, units: tuple[str, ...]) -> str:
    for unit in units:
        if abs(number) < 999.5 or unit == units[-1]:
            break
        number /= 1000
    return f"{number:.3g} {unit}" if abs(number) < 999.5 else f"{number:.0f} {unit}"


def time_in_words(seconds: float) -> str:
    """Format a duration for a person, such as `8.2 s`, `3 min 20 s` or `2 h 5 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def ago_in_words(seconds: float) -> str:
    """Say coarsely how long ago something was, such as `12 s ago`, `5 min ago` or `3 d ago`."""
    if seconds < 1:
        return "just now"
    for unit, length_s, below_s in (("s", 1, 60), ("min", 60, 3600), ("h", 3600, 48 * 3600)):
        if seconds < below_s:
            return f"{int(seconds / length_s)} {unit} ago"
    return f"{count_in_words(int(seconds / 86400))} d ago"


def short_peer(peer: str) -> str:
    """Return the end of a PeerID, enough to tell peers apart."""
    return peer[-6:] if peer else "nobody"


def stages_in_words(stages: Sequence[int]) -> str:
    """Name stages of a pipeline by number, such as `stage 2` or `stages 0 and 1`."""
    if len(stages) < 2:
        return f"stage {stages[0]}" if stages else "no stage"
    return f"stages {', '.join(map(str, stages[:-1]))} and {stages[-1]}"


def one_line(text: str) -> str:
    """Escape line ends and other control characters, so that a terminal can show `text`."""
    if text.isprintable():  # nearly always; a page asks this of some thousands of names a second
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def printable(text: str) -> str:
    """Replace what could control a terminal or reorder what is read, in a text of several lines. Line ends, tabs, all
    spaces, and the joiners of some scripts stay."""
    if text.isprintable():
        return text
    text = text.replace("\r\n", "\n")
    return "".join(c if c.isprintable() or c in "\n\t\u200c\u200d" or category(c) == "Zs" else "\ufffd" for c in text)
