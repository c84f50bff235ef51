"""Fragments of the model, each merged once a round, one after the other (Streaming DiLoCo, arXiv 2501.18512).

A *fragment* is some of the model's tensors. Of N fragments the first is merged after an Nth of a round's inner steps,
the last at its end: what is pulled before each merge is an Nth of all, and what partners train meanwhile, and is lost,
is an Nth too. A *fragment's round* goes from one of its merges to the next; it has the number of the round in which it
ends.

Pure: what was trained is told.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from swarmtrain.protocol.gossip.partners import PublicationVersion

__all__ = [
    "COPY_S",
    "FragmentRound",
    "FragmentRounds",
    "merged_step",
    "merged_with",
    "published",
    "publishes_every",
    "steps_of_fragment",
    "told_mark",
    "told_round",
]

_FEWEST_PUBLICATIONS = 8
_LEAST_BETWEEN_S = 1.0
_PUBLISHING_SHARE = 0.005
"""Of the trainer's time, at most, where that leaves as many."""
COPY_S = 3.0e-9
"""Of a parameter, to copy it: a publication copies the weights, and in as long what is usual is learnt from it.
Measured with 10 and 50 million, one thread."""


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
    _before: list[tuple[int, int]] = field(init=False)
    """Tokens and inner steps since the last merge of each, at this round's start."""
    _merged: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """Of those merged in this round: the part, tokens and inner steps of it at that moment."""

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """The weights are others', or those of a checkpoint: nothing was trained since."""
        self._before, self._merged = [(0, 0)] * self.number, {}

    def begin(self, round: int, num_parts: int) -> None:
        """A round of so many parts."""
        self._round, self._num_parts, self._merged = round, num_parts, {}

    def at(self, part: int, tokens: int, inner_steps: int) -> tuple[FragmentRound, ...]:
        """Each fragment's, at publication `part` of this round."""
        return tuple(self.of(fragment, part, tokens, inner_steps) for fragment in range(self.number))

    def of(self, fragment: int, part: int, tokens: int, inner_steps: int) -> FragmentRound:
        """One fragment's."""
        if fragment in self._merged:
            then, its_tokens, its_steps = self._merged[fragment]
            return FragmentRound(self._round + 1, part - then, tokens - its_tokens, inner_steps - its_steps)
        before_tokens, before_steps = self._before[fragment]
        left = merged_with(fragment, self.number, self._num_parts) - part  # below 0 in short rounds, or that end early
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


def publishes_every(num_parts: int, num_fragments: int, round_s: float, num_parameters: int) -> int:
    """With the end of each how-many-th of a round's parts a peer publishes, if that lasts so long (0: it is not known):
    each, each second, fourth ..., so that it does so once a second at most and that costs next to nothing; but eight
    of them are left, and two of each fragment's."""
    between_s, every = max(_LEAST_BETWEEN_S, num_parameters * 2 * COPY_S / _PUBLISHING_SHARE), 1
    most = min(num_parts // _FEWEST_PUBLICATIONS, num_parts // num_fragments // 2)
    while round_s * every < num_parts * between_s and 2 * every <= most:
        every *= 2
    return every


def published(inner_steps: int, num_parts: int, num_fragments: int, every: int) -> dict[int, int]:
    """After which inner steps of its round a peer publishes, with the part, from 1 to `num_parts`, that ends there.

    Each fragment is merged with a publication. On the way to that from the merge before, which has as many parts as its
    share or, if it is fewer, inner steps, it publishes with the end of each `every`-th, counted back from the merge;
    and not before the middle of the way, unless the model is in one piece: until then who merges the fragment before a
    little later finds its whole round, and not the first steps of another."""
    found = dict[int, int]()
    step_before = part_before = 0
    for fragment in range(num_fragments):
        part = merged_with(fragment, num_fragments, num_parts)
        step = merged_step(fragment, num_fragments, inner_steps, num_parts)
        on_the_way = max(1, min(part - part_before, step - step_before))
        distance = max(1, -(-every * on_the_way // max(1, part - part_before)))
        for back in range(0, on_the_way, distance):
            if num_fragments == 1 or 2 * (on_the_way - back) >= on_the_way:
                passed = -(-(step - step_before) * (on_the_way - back) // on_the_way)
                found[step_before + passed] = part - back
        step_before, part_before = step, part
    return dict(sorted(found.items()))


def merged_step(fragment: int, number: int, inner_steps: int, num_parts: int) -> int:
    """After how many inner steps of a round a fragment, of so many, is merged."""
    return -(-inner_steps * merged_with(fragment, number, num_parts) // num_parts)


def merged_with(fragment: int, number: int, num_parts: int) -> int:
    """With the end of which of a round's so many parts a fragment, of so many, is merged."""
    return -(-num_parts * (fragment + 1) // number)


def told_mark(fragment: int, number: int, told: PublicationVersion, num_parts: int) -> PublicationVersion:
    """The newest publication of a fragment, of so many, of a peer that has told that it is in round `told.round`, of
    which it has published up to part `told.part`; `told.tokens`: of that, or with part 0 of the round before. These
    are a guess."""
    round, part, tokens = told.round, told.part, told.tokens
    if not part and not round:
        return told
    merged = merged_with(fragment, number, num_parts)
    if part > merged:
        return PublicationVersion(round + 1, part - merged, max(1, tokens * (part - merged) // part))
    if not part and merged == num_parts:  # of this round nothing, but all of the one before
        return PublicationVersion(round - 1, num_parts, tokens)
    before = tokens * (num_parts - merged) // (part or num_parts)
    return PublicationVersion(round, num_parts - merged + part, (tokens if part else 0) + before)


def told_round(fragment: int, number: int, told: PublicationVersion, num_parts: int) -> int:
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
    before = merged_step(fragment, number, inner_steps, num_parts)
    if before == inner_steps:
        return 0, inner_steps_done
    if inner_steps_done >= before:
        return 1, inner_steps_done - before
    return 0, inner_steps_done + inner_steps - before
