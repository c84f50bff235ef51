"""A third of the volunteers of a large batch is killed at one moment, with the signer, and the others' links halve.

The step that they were in is taken at most one `merge.max_wait_s` later than those who are left need for a whole one,
no gradient counts twice, and what a roster counted stays counted.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import statistics
import time
from collections.abc import Iterator, Sequence

import pytest
from swarm import Child, Swarm, assert_same_states, wait_until, write_run

from swarmtrain.events import CaughtUpEvent, RoundEvent
from swarmtrain.peer.local.swarm import LocalLinks
from swarmtrain.rehearsal import LinksSection, RehearsalFile

pytestmark = [pytest.mark.processes, pytest.mark.evidence]

SLOWDOWNS = (5, 6, 8, 10, 12, 16)
"""Times that each volunteer is slower than this machine: together they need 0.7 of a core."""
INNER_STEPS = 60
"""Batches of 512 tokens in a step of all."""
MAX_WAIT_S = 5.0
LINKS = LinksSection(rtt_ms=20, up_mbit=40, down_mbit=40)
WHOLE_STEPS = 3
"""Steps of those who are left that are held against the one in which the others died."""


@pytest.fixture
def links() -> Iterator[LocalLinks]:
    with contextlib.closing(LocalLinks(RehearsalFile(links=LINKS))) as links:
        yield links


def behind(swarm: Swarm, links: LocalLinks, name: str, limited: bool = True) -> list[str]:
    """Return the options of a peer behind a link of its own. The swarm listens there for this peer."""
    _, swarm.listen, *announces = links.options(name, limited)
    return announces


def lasts_s(children: Sequence[Child], first: int, last: int) -> dict[int, float]:
    """Seconds from the moment at which the last of these had merged a round to the same of the next one."""
    ends_s = {number: max(child.rounds()[number].time for child in children) for number in range(first - 1, last + 1)}
    return {after: ends_s[after] - ends_s[before] for before, after in itertools.pairwise(sorted(ends_s))}


def assert_counted_once(children: Sequence[Child]) -> dict[int, dict[str, int]]:
    """Check that all tell the same rosters, that a roster counts of each what it says that it computed, and that the
    run has as many tokens as all rosters. Return the rosters: tokens by peer, by round."""
    rosters = dict[int, dict[str, int]]()
    for child in children:
        for number, event in child.rounds().items():
            roster = dict(zip(event.partners, event.weights, strict=True))
            assert len(roster) == len(event.partners)
            assert rosters.setdefault(number, roster) == roster, f"round {number} of {child.name}"
            assert roster.get(child.id, event.tokens) == event.tokens, f"round {number} counts {child.name} as it says"
    assert sorted(rosters) == list(range(len(rosters)))
    run_tokens = list(itertools.accumulate(sum(rosters[number].values()) for number in sorted(rosters)))
    for child in children:
        assert all(event.run_tokens == run_tokens[number] for number, event in child.rounds().items()), child.name
    return rosters


@pytest.mark.parametrize("moment", ["before the roster", "amid the batch"])
def test_a_third_is_killed_with_the_signer_and_links_halve(swarm: Swarm, links: LocalLinks, moment: str) -> None:
    run_file = write_run(
        swarm.folder,
        merge={
            "method": "batch",
            "inner_steps": INNER_STEPS,
            "max_wait_s": MAX_WAIT_S,
            "outer_momentum": 0.8,
        },
        network={"presence_ttl_s": 10.0},
    )
    boot = behind(swarm, links, "bootstrap", limited=False)
    bootstrap = swarm.bootstrap(run_file, "--wait-for", str(len(SLOWDOWNS)), *boot)
    invite, children = bootstrap.invite.invite, list[Child]()
    for number, slowdown in enumerate(SLOWDOWNS, 1):
        name = f"volunteer-{number}"
        words = ["--slowdown", str(slowdown), "--log-level", "info", *behind(swarm, links, name)]
        children.append(swarm.join(name, invite, *words))
    full = children[0].wait_event(RoundEvent, lambda event: event.round >= 2 and len(event.partners) == len(children))
    signer = next(child for child in children if child.id == full.signer)
    victims = [signer, next(child for child in children if child is not signer)]
    left = [child for child in children if child not in victims]
    begun = signer.wait_more_rounds(1)
    hit = begun.round + 1
    if moment == "amid the batch":  # no event marks it
        wait_until(lambda: time.time() - begun.time > begun.seconds / 2, "half a step")
    else:
        ended = re.compile(rf"round {hit}: \d+ tokens here")
        wait_until(lambda: ended.search(signer.log.read_text()), "the signer ends the batch")
    for child in victims:
        child.process.kill()
    links.narrow([child.name for child in left], 0.5)
    for child in victims:
        child.process.wait()
    for child in left:
        child.wait_round(hit + WHOLE_STEPS)
    took_s = lasts_s(left, 2, hit + WHOLE_STEPS)
    swarm.interrupt_all([bootstrap, *left])

    assert assert_same_states(children) >= hit
    rosters = assert_counted_once(children)
    assert max(signer.rounds()) in (hit - 1, hit)
    assert all(victim.rounds().keys() <= left[0].rounds().keys() for victim in victims), "what they merged stays"
    assert not any(child.all(CaughtUpEvent) for child in left)
    after = [took_s[number] for number in range(hit + 1, hit + 1 + WHOLE_STEPS)]
    shown = {
        number: (sum(rosters[number].values()), len(rosters[number]), round(took_s[number], 1)) for number in took_s
    }
    print(f"killed {moment} of step {hit}; (tokens, volunteers, seconds) of each: {shown}")
    print(f"took {took_s[hit]:.1f} s; later steps {statistics.median(after):.1f} s; at most {MAX_WAIT_S:g} s later")
    assert took_s[hit] <= statistics.median(after) + MAX_WAIT_S
    assert {child.id for child in left} <= set(rosters[hit]), "whoever is left is in the step that the others died in"
    assert all({child.id for child in left} == set(rosters[number]) for number in range(hit + 1, hit + WHOLE_STEPS))
