"""What of a planned run hurts first, and which keys of the run file to change.

Each thing that can hurt has a *strain*: 1 where it does, as a rule of the product or of the results says; what is below
`FELT` is only told when there is nothing worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from swarmtrain.run import RunFile
from swarmtrain.simulate.living import Machines, stage_parameters
from swarmtrain.simulate.planning import Plan
from swarmtrain.words import size_in_words as size
from swarmtrain.words import time_in_words

__all__ = ["FELT", "Hurt", "hurts"]

FELT = 0.5
_PULLING_SHARE = 0.65
"""So much of a round may go on pulling (`membership.pulls`): with less time fewer partners are merged."""
_LAPTOP_BYTES = 8e9
_FEWEST_ROUNDS = 20
_MOST_FEWER_STEPS = 4
"""Rounds are not advised to be shorter by more: then it is the run that is short."""
_MOST_STALL, _MOST_WAITING = 0.01, 0.2
_LEAST_FRESH = 0.95
_ASIDE_SHARE = 0.1
"""So much of a link may go on what is not merging."""
_BITS = 8 / 1e6


@dataclass(frozen=True, kw_only=True)
class Hurt:
    """One thing."""

    what: str
    """In a word or two."""
    strain: float
    why: str
    change: str
    """Keys of the run file with values; empty where nothing need be changed."""


def hurts(run: RunFile, found: Plan, machines: Machines) -> tuple[Hurt, ...]:
    """All that can hurt here, the worst first."""
    looks: list[Callable[[RunFile, Plan, Machines], Hurt | None]] = [
        _uplink, _downlink, _readers, _rounds, _stall, _freshness, _stragglers, _archive, _joining, _records, _server,
        _memory,
    ]  # fmt: skip
    told = (look(run, found, machines) for look in looks)
    found_here = [one if one.strain >= FELT else replace(one, change="") for one in told if one is not None]
    return tuple(sorted(found_here, key=lambda one: -one.strain))


def _time(seconds: float) -> str:
    """For a person; short ones too."""
    return f"{1000 * seconds:.3g} ms" if seconds < 0.95 else time_in_words(seconds)


def _round_up(number: float) -> int:
    """To two digits."""
    unit = int(10 ** max(0, math.floor(math.log10(max(number, 1))) - 1))
    return math.ceil(number / unit - 1e-9) * unit


def _more_steps(run: RunFile, times: float) -> str:
    steps = run.merge.inner_steps
    return f"merge.inner_steps = {_round_up(max(steps + 1, steps * times))} (now {steps})"


def _mbit(bytes_per_s: float) -> str:
    return f"{bytes_per_s * _BITS:.3g} Mbit/s"


# ---------------------------------------------------------------- links


def _uplink(run: RunFile, found: Plan, machines: Machines) -> Hurt | None:
    return _of_link("uplink", "of each", found.link_up_bytes_per_s, run, found)


def _downlink(run: RunFile, found: Plan, machines: Machines) -> Hurt | None:
    return _of_link("downlink", "for each", found.link_down_bytes_per_s, run, found)


def _of_link(name: str, whose: str, rate: float, run: RunFile, found: Plan) -> Hurt | None:
    merge, others = run.merge, found.num_peers - 1
    if not rate or others < 1 or merge.method == "server":
        return None
    if merge.method == "diloco":
        wanted, count = found.payload_up_bytes, "all volunteers"
    else:
        wanted = min(merge.num_partners, others) * found.publication_bytes
        count = f"{min(merge.num_partners, others)} partners"
    takes_s = wanted / rate
    share, one_s = takes_s / found.round_s, found.publication_bytes / rate
    why = (
        f"a publication of {size(found.publication_bytes)} takes {_time(one_s)} at {_mbit(rate)}, and what {count} "
        f"take {whose} in a round {_time(takes_s)}; a round lasts {_time(found.round_s)}"
    )
    change = _more_steps(run, 2 * share)
    if merge.method == "gossip" and merge.num_partners > 1 and share > _PULLING_SHARE:
        why += ", of which they may take two thirds: they merge fewer"
        fewer = int(min(merge.num_partners, others) * _PULLING_SHARE / share)
        change += f" or merge.num_partners = {max(1, fewer)} (now {merge.num_partners})" if fewer >= 1 else ""
    if merge.method == "gossip" and merge.theta_format != "int4" and share > _PULLING_SHARE:
        change += f' or merge.theta_format = "int4" (now "{merge.theta_format}")'
    if merge.method == "diloco":
        change = f'merge.method = "gossip" or {change}'
    return Hurt(what=name, strain=share / _PULLING_SHARE, why=why, change=change)


def _readers(run: RunFile, found: Plan, machines: Machines) -> Hurt | None:
    rate, network = found.link_up_bytes_per_s, run.network
    if not rate or found.num_peers < 2:
        return None
    least = network.least_bytes_per_s
    strain = network.max_readers * least / rate
    change = f"network.max_readers = {max(1, int(rate / least))} (now {network.max_readers})"
    if rate < least:
        limit_s = _round_up(2 * 262_144 / rate)  # for a chunk
        change = f"network.min_pull_bytes_per_s = {int(rate / 2)} and network.stall_limit_s = {limit_s}"
    return Hurt(
        what="uplink shared by readers",
        strain=strain,
        why=f"network.max_readers = {network.max_readers} at once get {size(rate / network.max_readers)} a second "
        f"each, and a transfer slower than {size(least)} a second is given up",
        change=change,
    )


def _archive(run: RunFile, found: Plan, machines: Machines) -> Hurt | None:
    rate, every_s = found.link_up_bytes_per_s, run.network.archive_every_s
    if not rate or run.merge.method == "server" or found.run_s < every_s:
        return None
    takes_s = found.state_bytes / rate
    strain = max(takes_s / every_s, found.traffic.states_up / rate / _ASIDE_SHARE)
    return Hurt(
        what="archive",
        strain=strain,
        why=f"every {_time(every_s)} the bootstrap takes a state of {size(found.state_bytes)}, {_time(takes_s)} at "
        f"{_mbit(rate)}, and of others the weights: {found.traffic.states_up / rate:.0%} of each uplink, and "
        f"{_mbit(found.traffic.bootstrap_down)} at the bootstrap",
        change=f"network.archive_every_s = {_round_up(max(every_s * strain / FELT, every_s + 1))} (now {every_s:g})",
    )


def _joining(run: RunFile, found: Plan, machines: Machines) -> Hurt | None:
    rate = min((one for one in (found.link_up_bytes_per_s, found.link_down_bytes_per_s) if one), default=0.0)
    if not rate or found.num_peers < 2 or run.merge.method == "server":
        return None
    takes_s = found.state_bytes / rate
    behind = takes_s / found.round_s
    limit = run.merge.max_staleness_rounds
    return Hurt(
        what="late joiners",
        strain=behind / limit,
        why=f"who comes late takes a state of {size(found.state_bytes)}, {_time(takes_s)} at {_mbit(rate)}: "
        f"{behind:.1f} rounds, and {limit} behind is too old",
        change=_more_steps(run, behind / limit / FELT),
    )


def _records(run: RunFile, found: Plan, machines: Machines) -> Hurt | None:
    rate, ttl_s = found.link_up_bytes_per_s, run.network.presence_ttl_s
    if not rate or found.num_peers < 2:
        return None
    return Hurt(
        what="records of the DHT",
        strain=found.traffic.records / rate / _ASIDE_SHARE,
        why=f"reading who of {found.num_peers} is there costs each {size(found.traffic.records)} a second, "
        f"{found.traffic.records / rate:.0%} of its uplink",
        change=f"network.presence_ttl_s = {_round_up(ttl_s * max(2.0, found.traffic.records / rate / _ASIDE_SHARE))} "
        f"(now {ttl_s:g})",
    )


def _server(run: RunFile, found: Plan, machines: Machines) -> Hurt | None:
    rate = found.link_up_bytes_per_s
    if run.merge.method != "server" or not rate:
        return None
    share = found.traffic.bootstrap_up / rate
    return Hurt(
        what="the server's uplink",
        strain=share / _PULLING_SHARE,
        why=f"all {found.num_peers} take weights of the bootstrap in each round: {_mbit(found.traffic.bootstrap_up)}, "
        f"and a link such as theirs carries {_mbit(rate)}",
        change=f'merge.method = "gossip", {_more_steps(run, 2 * share)}, or a bootstrap with a better link',
    )


# ---------------------------------------------------------------- rounds and machines


def _rounds(run: RunFile, found: Plan, machines: Machines) -> Hurt | None:
    if found.num_peers < 2:
        return None
    times, steps = _FEWEST_ROUNDS / found.num_rounds, run.merge.inner_steps
    change = f"run.total_tokens = {_round_up(run.run.total_tokens * times)} (now {run.run.total_tokens})"
    if 1 < times <= _MOST_FEWER_STEPS <= steps:
        change = f"merge.inner_steps = {int(steps / times)} (now {steps}) or {change}"
    return Hurt(
        what="number of rounds",
        strain=times,
        why=f"{found.num_rounds:.0f} in the whole run with {found.num_peers} volunteers: they average each other's "
        f"work few times, and late joiners come too late",
        change=change,
    )


def _stall(run: RunFile, found: Plan, machines: Machines) -> Hurt | None:
    waits = run.merge.method == "diloco"
    strain = found.stall_share / (_MOST_WAITING if waits else _MOST_STALL)
    stall_s = found.stall_share * found.round_s
    unequal = max(machines.step_s) > 1.2 * min(machines.step_s)
    if waits and unequal and not run.merge.pacing:
        change = 'merge.pacing = true or merge.method = "gossip"'
    elif waits:
        change = f'merge.method = "gossip" or {_more_steps(run, max(1.1, strain / FELT))}'
    else:
        change = _more_steps(run, max(1.1, strain / FELT))
    doing = "wait for the slowest and for the wire" if waits else "publish and merge"
    return Hurt(
        what="stall",
        strain=strain,
        why=f"volunteers {doing} for {_time(stall_s)} of a round of {_time(found.round_s)}: {found.stall_share:.2%}",
        change=change,
    )


def _freshness(run: RunFile, found: Plan, machines: Machines) -> Hurt | None:
    if run.merge.method == "diloco" and found.num_peers > 1:
        return Hurt(
            what="short rosters",
            strain=max(0.0, 1 - found.fresh_share) / (1 - _LEAST_FRESH),
            why=f"{1 - found.fresh_share:.0%} of the volunteers are on no roster, and their round is lost: what they "
            f"publish does not arrive in time",
            change=f'merge.method = "gossip" or merge.silence_s = {_round_up(4 * run.merge.silence_s)} '
            f"(now {run.merge.silence_s:g})",
        )
    if run.merge.method != "gossip" or found.num_peers < 2:
        return None
    return Hurt(
        what="freshness",
        strain=max(0.0, 1 - found.fresh_share) / (1 - _LEAST_FRESH),
        why=f"{1 - found.fresh_share:.0%} of the rounds merge nobody's new work: rounds of {_time(found.round_s)} are "
        f"short for what is to be pulled in them",
        change=_more_steps(run, 2.0),
    )


def _stragglers(run: RunFile, found: Plan, machines: Machines) -> Hurt | None:
    times = found.round_most_s / found.round_s
    if run.merge.method != "gossip" or times < 1.05:
        return None
    change = "merge.pacing = true" if not run.merge.pacing else _more_steps(run, max(1.1, 16 / run.merge.inner_steps))
    every = run.merge.max_staleness_rounds / (times - 1)
    return Hurt(
        what="stragglers",
        strain=times / 2,
        why=f"a round of the slowest lasts {_time(found.round_most_s)}, {times:.1f} times the median's: after "
        f"{every:.0f} of its rounds it is {run.merge.max_staleness_rounds} behind, and takes the others' weights",
        change=change,
    )


def _memory(run: RunFile, found: Plan, machines: Machines) -> Hurt | None:
    parameters = stage_parameters(run)
    size_now = run.microbatch_sequences
    change = f"inner.microbatch_sequences = {max(1, size_now // 4)} (now {size_now})"
    if 40 * parameters > found.memory_bytes / 2 or size_now == 1:
        change = f"pipeline.stages = {max(2, run.pipeline.stages * 2)} (now {run.pipeline.stages}), or a smaller model"
    return Hurt(
        what="memory",
        strain=found.memory_bytes / _LAPTOP_BYTES,
        why=f"a volunteer needs {size(found.memory_bytes)}; laptops have {size(_LAPTOP_BYTES)} and other things to do",
        change=change,
    )
