"""Choice between two chains of rosters: every rule, and the attacks that it defends against."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from swarmtrain.protocol.rounds.chains import (
    MAX_LINKS,
    Chain,
    ChainLink,
    ChainView,
    Stands,
    chain_holds,
    chain_view,
    flaw,
)
from swarmtrain.protocol.rounds.rosters import AdvertisedRound, Roster, RoundPublication


def link(
    before: Chain, peers: str, *, signer: str = "", tokens: int = 100, tag: str = "", base_tokens: int | None = None
) -> ChainLink:
    """Return a roster of these peers on that chain, with all their manifests."""
    base, head = before.digest, before.head
    entries = tuple(
        RoundPublication(peer=p, snapshot=f"{p} {base[:6]} {tag}", tokens=tokens, inner_steps=1, base=base)
        for p in peers
    )
    counted = head.total_tokens if head is not None else 0
    roster = Roster(
        round=0 if head is None else head.round + 1,
        signer=signer or peers[0],
        entries=entries,
        base=base,
        base_tokens=counted if base_tokens is None else base_tokens,
    )
    return ChainLink(roster=roster, shown={entry.peer: entry.tokens for entry in entries})


def grown(before: Chain, rounds: Sequence[str], tokens: int = 100, tag: str = "") -> Chain:
    for peers in rounds:
        before = before.extended(link(before, peers, tokens=tokens, tag=tag))
    return before


def at(chain: Chain, peers: Iterable[str]) -> dict[str, str]:
    return dict.fromkeys(peers, chain.digest)


COMMON = grown(Chain(), ["abcde", "abcde"])


def holds(theirs: Chain, ours: Chain, advertised: dict[str, str], me: str, **more: Any) -> bool:
    return chain_holds(theirs, ours, Stands(advertised=advertised, me=me, **more))


def moves(theirs: Chain, ours: Chain, stands: dict[str, str], me: str) -> bool:
    return holds(theirs, ours, stands, me)


def test_when_halves_meet_that_with_more_of_the_common_rosters_peers_holds() -> None:
    """Whatever tokens they have, and though newcomers make the other half as large."""
    three, two = grown(COMMON, ["abc"] * 3, tag="x"), grown(COMMON, ["defg"] * 9, tokens=10**6, tag="y")
    stands = at(three, "abc") | at(two, "defg")
    assert moves(three, two, stands, "d")
    assert not moves(two, three, stands, "a")
    assert not moves(two, three, at(two, "defg"), "a"), "signed manifests stand for those who were not asked"


def test_of_halves_with_equally_many_peers_that_with_more_tokens_holds() -> None:
    common = grown(Chain(), ["abcd", "abcd"])
    rich, poor = grown(common, ["ab"] * 3, tokens=300, tag="x"), grown(common, ["cd"] * 4, tokens=200, tag="y")
    stands = at(rich, "ab") | at(poor, "cd")
    assert moves(rich, poor, stands, "c") and not moves(poor, rich, stands, "a")
    lying = [link(rich, "ab", base_tokens=10**12), link(poor, "cd", base_tokens=10**15)]
    more = [chain.extended(one) for chain, one in zip((rich, poor), lying, strict=True)]
    stands = at(more[0], "ab") | at(more[1], "cd")
    assert moves(more[0], more[1], stands, "c") and not moves(more[1], more[0], stands, "a"), "whatever they claim"


def test_two_signers_of_one_round_are_told_apart_by_who_went_on() -> None:
    low, high = grown(COMMON, ["ab"], tag="x"), grown(COMMON, ["cde"], tag="y")
    assert moves(low, high, {"a": low.digest}, "c"), "one stands on each: the lower signer's"
    assert not moves(high, low, {"c": high.digest}, "a")
    assert not moves(low, high, {"a": low.digest, "d": high.digest}, "c")
    assert moves(high, low, {"c": high.digest, "d": high.digest}, "a")


def test_one_who_puts_everybodys_work_on_a_roster_of_its_own_moves_nobody() -> None:
    """The entries of the first roster after the fork name the common one: anybody may use them."""
    honest = COMMON.extended(link(COMMON, "bcde", tag="x"))
    everybody = COMMON.extended(link(COMMON, "abcde", signer="a", tag="x"))
    lie = grown(everybody, ["a"] * 20, tokens=10**6)
    stands = at(honest, "bcde") | at(lie, "a")
    for me in "bcde":
        assert not moves(lie, honest, stands, me)
        assert not moves(everybody, honest, at(honest, "bcde") | at(everybody, "a"), me)


def test_one_who_goes_on_alone_from_everybodys_weights_moves_nobody() -> None:
    lie = grown(COMMON, ["a"] * 5, tokens=10**6)
    stands = at(COMMON, "bcde") | at(lie, "a")
    for me in "bcde":
        assert not moves(lie, COMMON, stands, me)
        few = {"a": lie.digest}
        assert not holds(lie, COMMON, few, me, unheard=frozenset("bcde") - {me}), "the others have yet to answer"
    assert not moves(grown(COMMON, ["a"]), COMMON, at(COMMON, "bcde") | at(grown(COMMON, ["a"]), "a"), "b")


def test_who_missed_rounds_goes_up() -> None:
    ahead = grown(COMMON, ["abcd"] * 3)
    assert holds(ahead, COMMON, at(ahead, "abcd"), "e")
    assert holds(ahead, COMMON, at(ahead, "a"), "e", unheard=frozenset("bcd")), "their manifests say so"
    alone = grown(COMMON, ["a"] * 3)
    assert not moves(alone, COMMON, at(alone, "a") | at(COMMON, "b"), "e")
    assert holds(alone, COMMON, at(alone, "a"), "e", is_away=True), "it slept, and does not count for itself"
    next_one = grown(COMMON, ["ab"])
    assert moves(next_one, COMMON, at(next_one, "b") | at(COMMON, "d"), "c"), "whom a round counts speak for its end"
    assert not moves(COMMON, ahead, at(COMMON, "abcd"), "e"), "nobody goes back"


def test_a_lone_survivor_holds_against_those_who_come_back_from_before() -> None:
    alone = grown(COMMON, ["a"] * 7)
    for back in (COMMON, grown(Chain(), ["abcde"])):
        assert holds(alone, back, at(alone, "a"), "b", is_away=True)
        assert not moves(back, alone, at(back, "b"), "a")


def test_who_was_alone_once_calls_nobody_back_to_there() -> None:
    for start in ([], ["l"]):
        first = grown(Chain(), start)
        honest, lie = grown(first, ["abl", "ab", "ab"], tag="x"), grown(first, ["l"] * 200, tokens=10**6, tag="y")
        stands = at(honest, "ab") | at(lie, "l")
        assert not moves(lie, honest, stands, "a") and not moves(lie, honest, stands, "b")
    one, other = grown(Chain(), ["a"] * 3, tag="x"), grown(Chain(), ["b"] * 4, tag="y")
    stands = at(one, "a") | at(other, "b")
    assert moves(other, one, stands, "a") and not moves(one, other, stands, "b"), "two that began apart come together"


def test_without_a_common_roster_the_peers_of_our_own_last_one_decide() -> None:
    ours, theirs = Chain(grown(COMMON, ["abc"] * 5).links[-2:]), Chain(grown(Chain(), ["abcx"] * 9, tag="y").links[-3:])
    assert moves(theirs, ours, at(theirs, "bcx"), "a"), "two of three are over there"
    assert not moves(theirs, ours, at(ours, "bc") | at(theirs, "x"), "a"), "they were there, and stand here now"
    strangers = Chain(grown(Chain(), ["xyz"] * 9, tokens=10**6).links[-3:])
    assert not moves(strangers, ours, at(strangers, "xyz"), "a")


def test_everybody_moves_the_same_way() -> None:
    """Whatever tree of chains there is: of two on different ones, one moves and the other stays."""
    for seed in range(200):
        rng = random.Random(seed)
        chains = [grown(Chain(), ["abcdef"])]
        for number in range(rng.randrange(2, 7)):
            peers = "".join(sorted(rng.sample("abcdefgh", rng.randrange(1, 6))))
            chains.append(grown(rng.choice(chains), [peers] * rng.randrange(1, 4), rng.randrange(1, 9), str(number)))
        stands = {peer: rng.choice(chains).digest for peer in "abcdefgh"}
        known = {chain.digest: chain for chain in chains}
        for me in "abcdefgh":
            for other in "abcdefgh":
                mine, yours = known[stands[me]], known[stands[other]]
                if mine.digest in yours or yours.digest in mine:
                    continue
                goes = holds(yours, mine, stands, me, known=known)
                comes = holds(mine, yours, stands, other, known=known)
                assert goes != comes, seed


def test_of_many_chains_the_same_one_holds_for_who_comes_and_who_is_there() -> None:
    honest, ahead = grown(COMMON, ["abcd"] * 3), grown(COMMON, ["abcd"] * 4)
    lie = grown(COMMON, ["e"] * 30, tokens=10**6)
    advertised = {p: (1.0, AdvertisedRound(round=9, last=honest.head)) for p in "bcd"}
    advertised |= {
        "a": (1.0, AdvertisedRound(round=9, last=ahead.head)),
        "e": (1.0, AdvertisedRound(round=9, last=lie.head)),
    }
    shown = {chain.digest: chain for chain in (honest, ahead, lie)}

    def best(ours: Chain, me: str, is_away: bool) -> Chain | None:
        view = chain_view(ours, shown, advertised, since_s=0.0, me=me, is_away=is_away)
        assert view.holds(lie.head) is False and not view.lacks(lie.head)
        return view.best

    assert best(Chain(), "n", True) in (honest, ahead), "a newcomer, or an archive"
    assert best(COMMON, "", True) in (honest, ahead)
    assert best(honest, "b", False) in (None, ahead)


def test_of_any_number_of_heads_those_are_judged_on_which_most_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is held against all that was told: a thousand invented ones would hold the loop up for seconds."""
    judged: list[str] = []
    real = chain_holds

    def noted(theirs: Chain, ours: Chain, stands: Stands) -> bool:
        judged.append(theirs.digest)
        return real(theirs, ours, stands)

    monkeypatch.setattr("swarmtrain.protocol.rounds.chains.chain_holds", noted)
    ours, theirs = grown(COMMON, ["ab"], tag="x"), grown(COMMON, ["cde"], tag="y")
    invented = [ours.extended(link(ours, "z", tag=str(number))) for number in range(300)]
    advertised = {f"z{number}": AdvertisedRound(round=4, last=chain.head) for number, chain in enumerate(invented)}
    advertised |= {peer: AdvertisedRound(round=3, last=theirs.head) for peer in "de"}
    shown = {theirs.digest: theirs}
    since = {peer: (1.0, one) for peer, one in advertised.items()}
    view = chain_view(ours, shown, since, since_s=0.0, me="a", is_away=False)
    assert view.best == theirs and judged[0] == theirs.digest and len(judged) == 64


def test_what_was_told_before_the_round_says_nothing_of_who_was_with_us() -> None:
    ahead = grown(COMMON, ["abcd"] * 2)
    advertised = {
        "a": (1.0, AdvertisedRound(round=2, last=COMMON.head)),
        "b": (1.0, AdvertisedRound(round=4, last=ahead.head)),
    }
    view = chain_view(COMMON, {}, {**advertised, "c": None}, since_s=2.0, me="e", is_away=False)
    assert view.unheard == {"a", "c"} and view.stands == {"b": ahead.digest}
    assert view.lacks(ahead.head) and not view.holds(ahead.head), "first its chain must be shown"
    assert not view.lacks(COMMON.head) and not view.lacks(None)


def test_the_next_roster_is_followed_before_its_chain_is_shown() -> None:
    ours = grown(COMMON, ["abcde"])
    next_one = link(ours, "abcde").roster
    stands = {"a": next_one.digest, "b": ours.digest}
    view = ChainView(ours=ours, heads={next_one.digest: next_one}, stands=stands, me="c")
    assert view.holds(next_one)
    own_only = link(ours, "a").roster
    stands = {"a": own_only.digest, "b": ours.digest}
    assert not ChainView(ours=ours, heads={own_only.digest: own_only}, stands=stands, me="c").holds(own_only)


@pytest.mark.parametrize(
    ("broken", "said", "code"),
    [
        (
            COMMON.extended(link(COMMON, "a", base_tokens=10**12)),
            "counts 1000000000000 tokens behind it where",
            "bad-tokens",
        ),
        (Chain((*COMMON.links, COMMON.links[-1])), "do not follow each other", "bad-chain"),
        (
            Chain((ChainLink(roster=COMMON.links[0].roster, shown={"z": 100}),)),
            "manifests of other entries",
            "bad-chain",
        ),
        (Chain((link(COMMON, "a", base_tokens=7),)), "counts 7 tokens behind it where", "bad-tokens"),
    ],
)
def test_a_chain_that_cannot_be_is_refused(broken: Chain, said: str, code: str) -> None:
    found = flaw(broken, COMMON)
    assert found and said in found.detail and found.code == code
    assert not flaw(COMMON, Chain()) and not flaw(grown(COMMON, ["a"]), COMMON)


def test_a_chain_keeps_its_end() -> None:
    long = grown(Chain(), ["a"] * (MAX_LINKS + 5))
    assert len(long.links) == MAX_LINKS and long.tokens_at(long.digest) == 100 * (MAX_LINKS + 5)
    assert long.tokens_at("") == 0 and long.tokens_at("elsewhere") is None
    tail = Chain(long.links[-3:])
    assert tail.tokens_at(tail.links[0].roster.base) == 100 * (MAX_LINKS + 2)
    assert tail.joined_to(long) == long and long.joined_to(tail) == long
