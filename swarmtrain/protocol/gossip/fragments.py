"""Fragments of the model, each merged once a round, one after the other (Streaming DiLoCo, arXiv 2501.18512).

A *fragment* is a group of the model's tensors. Of N fragments the first is merged after 1/N of a round's inner steps,
the last at its end. So only 1/N of the bytes is pulled before each merge, and what partners train while it is pulled,
which the merge misses, is 1/N as much. A *fragment's round* goes from one of its merges to the next; its number is that
of the round in which it ends.

Everything here is pure: the caller reports what was trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from swarmtrain.protocol.gossip.partners import PublicationVersion

_FEWEST_PUBLICATIONS = 8
"""Number of publications a round, at least, however rarely a peer publishes."""
_LEAST_BETWEEN_S = 1.0
"""Seconds between two publications, at least, if a round then has enough of them."""
_PUBLISHING_SHARE = 0.005
"""Share of the trainer's time that publishing may take, if a round then has enough publications."""
COPY_S = 3.0e-9
"""Seconds to copy one parameter, measured with 10 and 50 million on one thread. A publication takes twice as long: it
copies the weights, and robust rules learn from it what is usual."""


@dataclass(frozen=True)
class FragmentRound:
    """Position of a fragment's round at a publication: its number, the part (from 1), and what was trained since the
    fragment's last merge."""

    round: int
    part: int
    tokens: int
    inner_steps: int


@dataclass
class FragmentRounds:
    """Progress of each fragment's round.

    The trainer calls `begin` at each round's start and `merged` at each fragment's merge; the last of these ends the
    round. Tokens and inner steps of a round in which a fragment is not trained do not count for it.
    """

    number: int
    _round: int = 0
    _num_parts: int = 1
    _before: list[tuple[int, int]] = field(init=False)
    """Tokens and inner steps between each fragment's last merge and this round's start."""
    _merged: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """Part, tokens and inner steps of this round at each fragment's merge, if it was merged in this round."""
    _trained: frozenset[int] | None = None
    """Fragments that are trained in this round; None: all."""

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start anew, because the weights now come from other peers or a checkpoint: nothing was trained since."""
        self._before, self._merged = [(0, 0)] * self.number, {}

    def begin(self, round: int, num_parts: int, trained: frozenset[int] | None = None) -> None:
        """Begin a round of `num_parts` parts, in which the fragments `trained` are trained; None: all."""
        self._round, self._num_parts, self._merged, self._trained = round, num_parts, {}, trained

    def _counted(self, fragment: int, tokens: int, inner_steps: int) -> tuple[int, int]:
        """Return what counts for a fragment of the tokens and inner steps of this round."""
        return (tokens, inner_steps) if self._trained is None or fragment in self._trained else (0, 0)

    def at(self, part: int, tokens: int, inner_steps: int) -> tuple[FragmentRound, ...]:
        """Return the position of each fragment's round at publication `part` of this round."""
        return tuple(self.of(fragment, part, tokens, inner_steps) for fragment in range(self.number))

    def of(self, fragment: int, part: int, tokens: int, inner_steps: int) -> FragmentRound:
        """Return the position of one fragment's round at publication `part` of this round."""
        tokens, inner_steps = self._counted(fragment, tokens, inner_steps)
        if fragment in self._merged:
            then, its_tokens, its_steps = self._merged[fragment]
            return FragmentRound(self._round + 1, part - then, tokens - its_tokens, inner_steps - its_steps)
        before_tokens, before_steps = self._before[fragment]
        # negative in rounds that are short or end early
        left = merged_with(fragment, self.number, self._num_parts) - part
        of_round = self._num_parts - max(0, left)
        return FragmentRound(self._round, of_round, before_tokens + tokens, before_steps + inner_steps)

    def merged(self, fragment: int, part: int, tokens: int, inner_steps: int) -> None:
        """Record a fragment's merge at publication `part` of this round. Fragments are merged in order."""
        self._merged[fragment] = part, *self._counted(fragment, tokens, inner_steps)
        if fragment == self.number - 1:
            for each, (_, its_tokens, its_steps) in self._merged.items():
                all_tokens, all_steps = self._counted(each, tokens, inner_steps)
                self._before[each] = all_tokens - its_tokens, all_steps - its_steps

    def of_round(self, fragment: int, round: int, tokens: int) -> int:
        """Return how many of a publication's tokens were trained in the present round.

        The publication is of a fragment, in the fragment's round of that number, and has `tokens` in all.
        """
        if round > self._round:
            return self._merged[fragment][1] + tokens if fragment in self._merged else 0
        return max(0, tokens - self._before[fragment][0]) if round == self._round else 0


def publishes_every(num_parts: int, num_fragments: int, round_s: float, num_parameters: int) -> int:
    """Return how often a peer publishes: after every n-th part of a round that lasts `round_s` seconds (0: unknown).

    n is 1, 2, 4, ...: as large as is needed to publish at most once a second and to spend at most 0.5 % of the time on
    it, but small enough for eight publications a round, and two for each fragment.
    """
    between_s, every = max(_LEAST_BETWEEN_S, num_parameters * 2 * COPY_S / _PUBLISHING_SHARE), 1
    most = min(num_parts // _FEWEST_PUBLICATIONS, num_parts // num_fragments // 2)
    while round_s * every < num_parts * between_s and 2 * every <= most:
        every *= 2
    return every


def published(inner_steps: int, num_parts: int, num_fragments: int, every: int) -> dict[int, int]:
    """Map the inner steps of a round after which a peer publishes to the part, from 1 to `num_parts`, that ends there.

    There is a publication with each fragment's merge. Between two merges a peer publishes after every `every`-th part,
    counted back from the second merge; there are as many parts as the fragment has, or fewer if it has fewer inner
    steps. With several fragments, publications begin in the middle between the merges: a partner that merges the
    earlier fragment a little later then still finds its whole round, not the first steps of the next one (decision 47).
    """
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
    """Return after how many inner steps of a round the fragment, one of `number`, is merged."""
    return -(-inner_steps * merged_with(fragment, number, num_parts) // num_parts)


def merged_with(fragment: int, number: int, num_parts: int) -> int:
    """Return the part of a round, from 1 to `num_parts`, with whose end the fragment, one of `number`, is merged.

    It does not depend on the round's inner steps or on how often a peer publishes, so that others can infer it
    (decision 47).
    """
    return -(-num_parts * (fragment + 1) // number)


def advertised_version(
    fragment: int, number: int, advertised: PublicationVersion, num_parts: int
) -> PublicationVersion:
    """Infer a fragment's newest publication from what its author advertises of its round.

    The author is in round `advertised.round` and has published it up to part `advertised.part`; `advertised.tokens`
    are that part's, or
    with part 0 those of the round before. The tokens that are returned are an estimate.
    """
    round, part, tokens = advertised.round, advertised.part, advertised.tokens
    if not part and not round:
        return advertised
    merged = merged_with(fragment, number, num_parts)
    if part > merged:
        return PublicationVersion(round + 1, part - merged, max(1, tokens * (part - merged) // part))
    if not part and merged == num_parts:  # of this round nothing, but all of the one before
        return PublicationVersion(round - 1, num_parts, tokens)
    before = tokens * (num_parts - merged) // (part or num_parts)
    return PublicationVersion(round, num_parts - merged + part, (tokens if part else 0) + before)


def advertised_round(fragment: int, number: int, advertised: PublicationVersion, num_parts: int) -> int:
    """Return the fragment's round, whose initial weights its author publishes, from what the author advertises."""
    merged = merged_with(fragment, number, num_parts)
    return advertised.round + (advertised.part >= merged and merged < num_parts)


def steps_of_fragment(
    fragment: int, number: int, inner_steps_done: int, inner_steps: int, num_parts: int
) -> tuple[int, int] | None:
    """Return how many rounds the fragment is ahead of its peer's round (0 or 1), and its inner steps since its last
    merge.

    The peer has done `inner_steps_done` of its round's `inner_steps`. None if the latter is unknown (0).
    """
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
