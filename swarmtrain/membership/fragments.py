"""Fragments of the model, each merged once a round, one after the other (Streaming DiLoCo, arXiv 2501.18512).

A *fragment* is some of the model's tensors. Of N fragments the first is merged after an Nth of a round's inner steps,
the last at its end: what is pulled before each merge is an Nth of all, and what partners train meanwhile, and is lost,
is an Nth too. A *fragment's round* goes from one of its merges to the next; it has the number of the round in which it
ends.

Pure: what was trained is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from swarmtrain.membership.partners import Mark

__all__ = [
    "COPY_S",
    "FragmentRound",
    "FragmentRounds",
    "merged_with",
    "parts_of_round",
    "published_parts",
    "steps_of_fragment",
    "told_mark",
    "told_round",
]

_FEWEST_PUBLICATIONS = 8
_LEAST_BETWEEN_S = 1.0
_COPYING_SHARE = 0.005
"""Of the trainer's time, at most, where that leaves eight publications."""
COPY_S = 3.0e-9
"""Of a parameter, to copy it: a publication copies the weights. Measured with 10 and 50 million of them, one thread."""


@dataclass(frozen=True)
class FragmentRound:
    """A fragment's round as of a publication: its number, the part, from 1 to as many as a round has, and what was
    trained since the fragment's last merge."""

    round: int
    part: int
    tokens: int
    inner_steps: int


@dataclass
class FragmentRounds:
    """How far each fragment's round is. Told of the trainer's rounds: `begin`, and `merged` of each fragment, with the
    last of which the round ends."""

    number: int
    _round: int = 0
    _num_parts: int = 1
    _parts: Sequence[int] = ()
    _before: list[tuple[int, int]] = field(init=False)
    """Tokens and inner steps since the last merge of each, at this round's start."""
    _merged: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """Of those merged in this round: the part, tokens and inner steps of it at that moment."""

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """The weights are others', or those of a checkpoint: nothing was trained since."""
        self._before, self._merged = [(0, 0)] * self.number, {}

    def begin(self, round: int, num_parts: int, parts: Sequence[int]) -> None:
        """A round of so many publications; `parts`: with which of them each fragment is merged."""
        self._round, self._num_parts, self._parts, self._merged = round, num_parts, parts, {}

    def at(self, part: int, tokens: int, inner_steps: int) -> tuple[FragmentRound, ...]:
        """Each fragment's, at publication `part` of this round."""
        return tuple(self._at(fragment, part, tokens, inner_steps) for fragment in range(self.number))

    def _at(self, fragment: int, part: int, tokens: int, inner_steps: int) -> FragmentRound:
        if fragment in self._merged:
            then, its_tokens, its_steps = self._merged[fragment]
            return FragmentRound(self._round + 1, part - then, tokens - its_tokens, inner_steps - its_steps)
        before_tokens, before_steps = self._before[fragment]
        left = self._parts[fragment] - part  # negative where a round ends early
        of_round = self._num_parts - max(0, left)
        return FragmentRound(self._round, of_round, before_tokens + tokens, before_steps + inner_steps)

    def merged(self, fragment: int, part: int, tokens: int, inner_steps: int) -> None:
        """It was, at that publication of this round. They are merged in their order."""
        self._merged[fragment] = part, tokens, inner_steps
        if fragment == self.number - 1:
            for each, (_, its_tokens, its_steps) in self._merged.items():
                self._before[each] = tokens - its_tokens, inner_steps - its_steps

    def of_round(self, fragment: int, round: int, tokens: int) -> int:
        """How many of the tokens, that a fragment's publication in its round of that number has, are of this round."""
        if round > self._round:
            return self._merged[fragment][1] + tokens if fragment in self._merged else 0
        return max(0, tokens - self._before[fragment][0]) if round == self._round else 0


def parts_of_round(most: int, num_fragments: int, round_s: float, num_parameters: int) -> int:
    """Into how many parts a round is divided that lasts so long (0: it is not known), with the ends of which a peer may
    publish: `most`, or half, a quarter ... of that, so that it does so once a second at most and copying costs next to
    nothing; but eight, and two for each fragment."""
    between_s, number = max(_LEAST_BETWEEN_S, num_parameters * COPY_S / _COPYING_SHARE), most
    fewest = max(_FEWEST_PUBLICATIONS, 2 * num_fragments)
    while round_s < number * between_s and number % (2 * num_fragments) == 0 and number // 2 >= fewest:
        number //= 2
    return number


def published_parts(number: int, num_fragments: int) -> list[int]:
    """With the ends of which of a round's so many parts, from 1, a peer publishes: on the way from one fragment's merge
    to the next's only from the middle on. Until then whoever merges the first of them a little later finds all of its
    round, and not the first steps of another. With all of them, where a model is in one piece or they do not fit."""
    on_the_way, rest = divmod(number, num_fragments)
    numbers = range(1, number + 1)
    if num_fragments == 1 or rest:
        return list(numbers)
    return [each for each in numbers if 2 * ((each - 1) % on_the_way + 1) >= on_the_way]


def merged_with(fragment: int, number: int, num_parts: int) -> int:
    """With which of a round's so many publications a fragment, of so many, is merged."""
    return -(-num_parts * (fragment + 1) // number)


def told_mark(fragment: int, number: int, told: Mark, num_parts: int) -> Mark:
    """The newest publication of a fragment, of so many, of a peer that has told that it is in round `told.round`, of
    which it has published `told.part`; `told.tokens`: of that, or with part 0 of the round before. The tokens are a
    guess, and short rounds have fewer publications."""
    round, part, tokens = told.round, told.part, told.tokens
    if not part and not round:
        return told
    merged = merged_with(fragment, number, num_parts)
    if part > merged:
        return Mark(round + 1, part - merged, max(1, tokens * (part - merged) // part))
    if not part and merged == num_parts:  # of this round nothing, but all of the one before
        return Mark(round - 1, num_parts, tokens)
    before = tokens * (num_parts - merged) // (part or num_parts)
    return Mark(round, num_parts - merged + part, (tokens if part else 0) + before)


def told_round(fragment: int, number: int, told: Mark, num_parts: int) -> int:
    """The number of the round in which that fragment is: that of the weights that it publishes."""
    merged = merged_with(fragment, number, num_parts)
    return told.round + (told.part >= merged and merged < num_parts)


def steps_of_fragment(
    fragment: int, number: int, inner_steps_done: int, inner_steps: int, num_parts: int
) -> tuple[int, int] | None:
    """How many rounds after a peer's its fragment's is, and the inner steps since that began, when the peer has done so
    many of its round's; None if it has not told how many those are (0)."""
    if fragment == number - 1:
        return 0, inner_steps_done
    if not inner_steps:
        return None
    parts = min(num_parts, inner_steps)
    before = -(-inner_steps * merged_with(fragment, number, parts) // parts)
    if before == inner_steps:
        return 0, inner_steps_done
    if inner_steps_done >= before:
        return 1, inner_steps_done - before
    return 0, inner_steps_done + inner_steps - before
