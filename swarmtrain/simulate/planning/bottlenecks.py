"""Bottlenecks of a planned run, worst first, and what to change.

Each bottleneck has a *utilization*: 1 where it begins to slow the run or to lose work, by a rule of the product or of
the results. Below `FELT` a bottleneck is only named when there is nothing worse. A suggested change gives a valid run
file in which this utilization is less. Alternatives are separated by "or", the best first; changes that belong together
are joined by "and".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from swarmtrain.algorithm.pacing import fewest_inner_steps
from swarmtrain.methods import GOSSIP
from swarmtrain.model.parameter_count import num_trained_parameters
from swarmtrain.network.links.throttle import BYTES_PER_S_OF_MBIT, num_at_once
from swarmtrain.peer.estimate import estimate
from swarmtrain.peer.merging.costs import publication_sizes, pulled_bytes
from swarmtrain.protocol.gossip.pulls import LINK_SHARE
from swarmtrain.run import CHUNK_BYTES, METHODS_OF_KEYS, RunFile
from swarmtrain.simulate.pipeline.world import stage_parameters
from swarmtrain.simulate.planning.plan import Plan
from swarmtrain.simulate.planning.traffic import ACTIVATIONS, ARCHIVE, MERGING, RECORDS, dht_bytes_per_s
from swarmtrain.words import size_in_words as size
from swarmtrain.words import time_in_words

FELT = 0.5
_LAPTOP_BYTES = 8e9
_FEWEST_ROUNDS = 20
_MOST_FEWER_STEPS = 4
"""Factor by which shorter rounds are suggested at most. If that is not enough, the run itself is too short."""
_MOST_STALL, _MOST_WAITING = 0.01, 0.2
_LEAST_FRESH = 0.95
_ASIDE_SHARE = 0.1
"""Share of a link that may be used for things other than merging."""
_MARGIN = 1.5
"""Factor by which suggested rounds are longer than the shortest that would do."""
_MOST_STEPS, _MOST_TTL_S, _MOST_STALL_LIMIT_S, _MOST_TOKENS, _MOST_WAIT_S = 1_000_000, 3600, 600, 2**63 - 1, 3600
"""Limits of a run file (`run.py`)."""


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """One thing that limits a planned run."""

    what: str
    """Name of the bottleneck, in a few words."""
    utilization: float
    why: str
    change: str
    """Keys of the run file with values, or what else helps; empty if nothing needs to change."""


def bottlenecks(run: RunFile, found: Plan) -> tuple[Bottleneck, ...]:
    """Return all bottlenecks, the worst first."""
    looks: list[Callable[[RunFile, Plan], Bottleneck | None]] = [
        _uplink, _downlink, _whole_uplink, _whole_downlink, _readers, _archive, _returns, _joining, _records, _server,
        _rounds, _stall, _freshness, _stragglers, _late_gradients, _memory,
    ]  # fmt: skip
    told = (look(run, found) for look in looks)
    found_here = [one if one.utilization >= FELT else replace(one, change="") for one in told if one is not None]
    return tuple(sorted(found_here, key=lambda one: -one.utilization))


# ---------------------------------------------------------------- words, and changes that several make


def _time(seconds: float) -> str:
    """Format a time for a person, short times too."""
    return f"{1000 * seconds:.3g} ms" if seconds < 0.95 else time_in_words(seconds)


def _mbit(bytes_per_s: float) -> str:
    return f"{bytes_per_s / BYTES_PER_S_OF_MBIT:.3g} Mbit/s"


def _percent(share: float) -> str:
    return f"{share:.2%}" if share < 0.1 else f"{share:.0%}"


def _round_up(number: float) -> int:
    """Round up to two digits."""
    unit = int(10 ** max(0, math.floor(math.log10(max(number, 1))) - 1))
    return math.ceil(number / unit - 1e-9) * unit


def _to(run: RunFile, key: str, value: bool | float | str) -> str:
    """Format a key with its new value and its present one, as in a run file."""
    group, _, name = key.partition(".")
    return f"{key} = {_toml(value)} (now {_toml(getattr(getattr(run, group), name))})"


def _toml(value: bool | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:_d}" if isinstance(value, int) and value >= 10_000 else f"{value:g}"


def _by_gossip(run: RunFile) -> str:
    """Suggest gossip, without the keys that it does not have."""
    others = [key for key in METHODS_OF_KEYS if not GOSSIP.reads(key)]
    said = [key for key in others if getattr(run.merge, key) != type(run.merge).model_fields[key].default]
    return " and ".join([_to(run, "merge.method", GOSSIP.name), *(f"no merge.{key}" for key in said)])


def _longer_rounds(run: RunFile, found: Plan, utilization: float) -> str:
    """Suggest rounds so long that the bottleneck's utilization, which falls with their length, is below 1 and below the
    present one."""
    merge, times = run.merge, _MARGIN * max(1.0, utilization)
    stalled = min(found.stall_share, 0.99)  # merging takes as long as before
    steps, changes = min(_MOST_STEPS, _round_up(found.full_steps * (times - stalled) / (1 - stalled))), []
    if merge.kind.common_step:
        target, times_larger = run.batch_target, max(1.0, (times - stalled) / (1 - stalled))
        if target.grows:  # and the batches after the first with it
            changes.append(_to(run, "merge.inner_steps", min(_MOST_STEPS, _round_up(merge.inner_steps * times_larger))))
        else:
            tokens = _round_up(target.first_tokens * times_larger)
            changes.append(f"merge.target_tokens = {_toml(tokens)} (now {_toml(target.first_tokens)})")
    elif steps > merge.inner_steps:
        changes.append(_to(run, "merge.inner_steps", steps))
    is_bound = found.full_steps < 0.98 * merge.inner_steps and not merge.kind.common_step
    wanted_s = times * found.round_s
    if is_bound or wanted_s > merge.round_limit_s:
        limit_s = max(times * merge.round_limit_s if is_bound else 0.0, 1.2 * wanted_s)
        changes.append(_to(run, "merge.round_limit_s", _round_up(limit_s)))
    return " and ".join(changes) or "a smaller model"


# ---------------------------------------------------------------- links


def _uplink(run: RunFile, found: Plan) -> Bottleneck | None:
    return _of_link("uplink", found.link_up_bytes_per_s, found.payload_up_bytes, run, found)


def _downlink(run: RunFile, found: Plan) -> Bottleneck | None:
    return _of_link("downlink", found.link_down_bytes_per_s, found.payload_down_bytes, run, found)


def _of_link(name: str, rate: float, payload: float, run: RunFile, found: Plan) -> Bottleneck | None:
    """Return the bottleneck of one direction of a volunteer's link, by the share of it that merging takes; None if
    there is none."""
    merge, others = run.merge, found.num_peers // run.pipeline.stages - 1
    if not rate or others < 1 or merge.kind.has_server:
        return None
    gossips, parameters = merge.kind.own_weights, stage_parameters(run)
    sizes = found.sizes if gossips else publication_sizes(run, parameters, others)
    pulled = pulled_bytes(run, sizes, others)
    wanted = pulled if gossips else payload
    share = wanted / rate / found.round_s
    what = f"{size(wanted)} of pseudo-gradients" + (" and weights" if gossips else "")
    why = f"{what} a round take {_time(wanted / rate)} at {_mbit(rate)}, and a round lasts {_time(found.round_s)}"
    changes = [_longer_rounds(run, found, share / LINK_SHARE)]
    if gossips and share > LINK_SHARE:
        why += f"; at most {LINK_SHARE:.0%} of it is used for pulling, so fewer partners are merged"
        carried = LINK_SHARE * rate * found.round_s
        fewer = int((carried - min(merge.num_weights, others) * sizes.weights) / sizes.gradient)
        if 1 <= fewer < min(merge.num_partners, others):
            changes.append(_to(run, "merge.num_partners", fewer))
        if merge.theta_format != "int4":
            changes.append(_to(run, "merge.theta_format", "int4"))
    if not gossips and pulled < wanted * (1 - found.stall_share):  # its rounds do not wait
        changes.insert(0, _by_gossip(run))
    return Bottleneck(what=name, utilization=share / LINK_SHARE, why=why, change=" or ".join(changes))


def _whole_uplink(run: RunFile, found: Plan) -> Bottleneck | None:
    return _whole("whole uplink", "sends", found.up_share, found.traffic.parts_up, run, found)


def _whole_downlink(run: RunFile, found: Plan) -> Bottleneck | None:
    return _whole("whole downlink", "receives", found.down_share, found.traffic.parts_down, run, found)


def _whole(
    name: str, verb: str, share: float | None, parts: dict[str, float], run: RunFile, found: Plan
) -> Bottleneck | None:
    """Return the bottleneck of one direction of a link, by the share of it that all traffic takes, and name the
    greatest part.

    Merging of whole models in rounds is left to `_of_link`.
    """
    if share is None or found.num_peers < 2:
        return None
    most = max(parts, key=lambda part: parts[part])
    if most == MERGING and not run.merge.kind.has_server and run.pipeline.stages == 1:
        return None
    change = {
        MERGING: lambda: _longer_rounds(run, found, share),
        ACTIVATIONS: lambda: _fewer_activations(run),
        ARCHIVE: lambda: _archived_less_often(run, found, share),
        RECORDS: lambda: _read_less_often(run, found, parts[RECORDS] / _MARGIN / max(1.0, share)),
    }.get(most, lambda: _RETURNING)()
    return Bottleneck(
        what=name,
        utilization=share,
        why=f"a volunteer {verb} {_mbit(sum(parts.values()))}, {_percent(share)} of its link, "
        f"{parts[most] / sum(parts.values()):.0%} of that for {most}",
        change=change,
    )


def _fewer_activations(run: RunFile) -> str:
    if run.pipeline.activations != "int8":
        return _to(run, "pipeline.activations", "int8")
    if run.pipeline.stages > 2 and not run.pipeline.boundaries:
        return _to(run, "pipeline.stages", run.pipeline.stages // 2)
    return "volunteers with better links"


def _readers(run: RunFile, found: Plan) -> Bottleneck | None:
    """Return the bottleneck of readers that share an uplink: whether each is fast enough.

    A peer with a limit on its uplink admits fewer readers.
    """
    rate, network = found.link_up_bytes_per_s, run.network
    if not rate or found.num_peers < 2:
        return None
    least, told = network.least_bytes_per_s, network.up_mbit * BYTES_PER_S_OF_MBIT
    most = 1 if run.merge.kind.has_server else min(network.max_readers, found.num_peers)  # the bootstrap reads too
    at_once = num_at_once(most, told, least)
    each = min(rate, told or rate) / at_once
    changes, fewer = [], num_at_once(at_once, rate, least)
    if fewer < at_once:
        changes.append(_to(run, "network.max_readers", fewer))
    if rate < 2 * least:
        if network.min_pull_bytes_per_s > rate / 4:
            changes.append(_to(run, "network.min_pull_bytes_per_s", int(rate / 4)))
        if CHUNK_BYTES / network.stall_limit_s > rate / 4:
            limit_s = min(_MOST_STALL_LIMIT_S, _round_up(4 * CHUNK_BYTES / rate))
            changes.append(_to(run, "network.stall_limit_s", limit_s))
    reading = "a reader of a volunteer gets" if at_once == 1 else f"{at_once} simultaneous readers of a volunteer get"
    return Bottleneck(
        what="uplink shared by readers",
        utilization=least / each,
        why=f"{reading} {size(each)} a second{' each' * (at_once > 1)}; a transfer of less than {size(least)} a second "
        f"is given up",
        change=" and ".join(changes) or "volunteers with better links",
    )


def _archive(run: RunFile, found: Plan) -> Bottleneck | None:
    rate, every_s = found.link_up_bytes_per_s, found.archive_every_s
    if not rate or run.merge.kind.has_server or found.run_s < every_s:
        return None
    takes_s, share = found.state_bytes / rate, found.traffic.archive / rate
    utilization = max(takes_s / every_s, share / _ASIDE_SHARE)
    return Bottleneck(
        what="archive",
        utilization=utilization,
        why=f"every {_time(every_s)} the bootstrap takes one volunteer's weights and momentum, "
        f"{size(found.state_bytes)} for {_time(takes_s)} at {_mbit(rate)}, and others' weights: {_percent(share)} of "
        f"each uplink on average, {_mbit(found.num_peers * found.traffic.archive)} at the bootstrap",
        change=_archived_less_often(run, found, utilization),
    )


def _archived_less_often(run: RunFile, found: Plan, utilization: float) -> str:
    every_s = found.archive_every_s
    return _to(run, "network.archive_every_s", _round_up(max(every_s * utilization / FELT, every_s + 1)))


_RETURNING = (
    "a smaller model; a volunteer that is started again in its folder has a checkpoint there, and with "
    'merge.method = "gossip" fetches no weights unless it was away for long'
)


def _returns(run: RunFile, found: Plan) -> Bottleneck | None:
    traffic = found.traffic
    links = (found.link_up_bytes_per_s, traffic.returns_up), (found.link_down_bytes_per_s, traffic.returns_down)
    share = max((taken / rate for rate, taken in links if rate), default=0.0)
    if not share:
        return None
    return Bottleneck(
        what="returning volunteers",
        utilization=share / _ASIDE_SHARE,
        why=f"a volunteer that returns as new fetches the others' weights: {_percent(share)} of each link on average",
        change=_RETURNING,
    )


def _joining(run: RunFile, found: Plan) -> Bottleneck | None:
    """Return the bottleneck of late joiners: how many rounds behind they are, where nobody waits for them.

    In synchronous rounds a joiner is in the round that it comes to, and a server's weights are taken anew at each
    round's end.
    """
    rate = min((one for one in (found.link_up_bytes_per_s, found.link_down_bytes_per_s) if one), default=0.0)
    if not rate or found.num_peers < 2 or not run.merge.kind.own_weights:
        return None
    takes_s, limit = found.state_bytes / rate, run.merge.max_staleness_rounds
    behind = takes_s / found.round_s
    return Bottleneck(
        what="late joiners",
        utilization=behind / limit,
        why=f"a late joiner fetches {size(found.state_bytes)} of weights and momentum, for {_time(takes_s)} at "
        f"{_mbit(rate)}: the others are {behind:.1f} rounds further by then, and a peer more than {limit} behind "
        f"must fetch their weights again",
        change=_longer_rounds(run, found, behind / limit),
    )


def _records(run: RunFile, found: Plan) -> Bottleneck | None:
    rate = found.link_up_bytes_per_s
    if not rate or found.num_peers < 2:
        return None
    share = found.traffic.records / rate
    return Bottleneck(
        what="records of the DHT",
        utilization=share / _ASIDE_SHARE,
        why=f"each volunteer sends and receives {size(found.traffic.records)} a second of records, to know which of "
        f"{found.num_peers} are there: {_percent(share)} of its uplink",
        change=_read_less_often(run, found, _ASIDE_SHARE * rate),
    )


def _read_less_often(run: RunFile, found: Plan, enough: float) -> str:
    """Suggest the shortest lifetime of presences with which records take fewer bytes per second than `enough`.

    If none does, suggest the one beyond which a longer one does not help.
    """
    now_s, nodes = run.network.presence_ttl_s, found.num_peers + 1
    lifetimes_s = [
        ttl_s for ttl_s in (_round_up(now_s * 1.25**power) for power in range(1, 25)) if ttl_s <= _MOST_TTL_S
    ]
    costs = [dht_bytes_per_s(nodes, ttl_s) for ttl_s in lifetimes_s]
    if not costs or min(costs) > 0.95 * dht_bytes_per_s(nodes, now_s):
        return "fewer volunteers in one run or volunteers with better links; a longer network.presence_ttl_s is no help"
    at = next((index for index, cost in enumerate(costs) if cost < enough), costs.index(min(costs)))
    change = f"{_to(run, 'network.presence_ttl_s', lifetimes_s[at])}: vanished volunteers are noticed that much later"
    return change if costs[at] < enough else f"{change}; this is not enough, but a longer one does not help"


def _server(run: RunFile, found: Plan) -> Bottleneck | None:
    rate = found.link_up_bytes_per_s
    if not run.merge.kind.has_server or not rate:
        return None
    share = found.traffic.bootstrap_up / rate
    return Bottleneck(
        what="the server's uplink",
        utilization=share / LINK_SHARE,
        why=f"{found.num_peers} volunteers fetch the bootstrap's weights in each round: "
        f"{_mbit(found.traffic.bootstrap_up)}, and a link like theirs carries {_mbit(rate)}",
        change=" or ".join(
            (_by_gossip(run), _longer_rounds(run, found, share / LINK_SHARE), "a bootstrap with a better link")
        ),
    )


# ---------------------------------------------------------------- rounds and machines


def _rounds(run: RunFile, found: Plan) -> Bottleneck | None:
    if found.num_peers < 2:
        return None
    utilization = _FEWEST_ROUNDS / found.num_rounds
    times = utilization / FELT
    tokens = min(_MOST_TOKENS, _round_up(max(run.run.total_tokens * times, run.run.total_tokens + 1)))
    number = f"{found.num_rounds:.1f}" if found.num_rounds < 10 else f"{found.num_rounds:,.0f}"
    changes, steps = [_to(run, "run.total_tokens", tokens)], int(found.full_steps / max(times, 1))
    if times <= _MOST_FEWER_STEPS and 1 <= steps < run.merge.inner_steps and not run.merge.kind.common_step:
        changes.insert(0, _to(run, "merge.inner_steps", steps))
    return Bottleneck(
        what="number of rounds",
        utilization=utilization,
        why=f"a volunteer takes {number} rounds in the whole run of {found.num_peers} volunteers: they seldom "
        f"average each other's work, and a late joiner arrives near the end",
        change=" or ".join(changes),
    )


def _stall(run: RunFile, found: Plan) -> Bottleneck | None:
    waits = not run.merge.kind.asynchronous
    utilization = found.stall_share / (_MOST_WAITING if waits else _MOST_STALL)
    unequal = found.step_most_s > 1.2 * found.step_least_s
    changes = [_by_gossip(run)] if waits else []
    if waits and unequal and not run.merge.pacing and "pacing" not in run.merge.kind.unread:
        changes.insert(0, _to(run, "merge.pacing", True))
    if not (waits and unequal):
        changes.append(_longer_rounds(run, found, utilization))
    doing = "wait for the slowest and for the wire" if waits else "publish and merge, and do not train,"
    return Bottleneck(
        what="stall",
        utilization=utilization,
        why=f"volunteers {doing} for {_time(found.stall_share * found.round_s)} of a round of {_time(found.round_s)}: "
        f"{_percent(found.stall_share)}",
        change=" or ".join(changes),
    )


def _freshness(run: RunFile, found: Plan) -> Bottleneck | None:
    """Return the bottleneck of fresh work, by the share of rounds whose work reaches no other volunteer, or that merge
    none of theirs."""
    missed = max(0.0, 1 - found.fresh_share)
    if found.num_peers < 2 or run.merge.kind.has_server:
        return None
    if not run.merge.kind.asynchronous:
        what, why = "short rosters", "of the volunteers' rounds are lost: what they publish does not arrive in time"
        key, waited_s = "merge.silence_s", 4 * run.merge.silence_s
        rate = found.link_up_bytes_per_s or math.inf
        if run.merge.kind.common_step and found.payload_up_bytes / rate > run.merge.max_wait_s:
            key, waited_s = "merge.max_wait_s", _MARGIN * found.payload_up_bytes / rate
        change = f"{_by_gossip(run)} or {_to(run, key, min(_MOST_WAIT_S, _round_up(waited_s)))}"
    else:
        what, why = "freshness", "of the rounds merge nothing new: they are too short to pull what is published"
        rate = min((one for one in (found.link_up_bytes_per_s, found.link_down_bytes_per_s) if one), default=math.inf)
        change = _longer_rounds(run, found, max(2.0, found.publication_bytes / rate / found.round_s / LINK_SHARE))
    why = f"{missed:.0%} {why}; a round lasts {_time(found.round_s)}"
    return Bottleneck(what=what, utilization=missed / (1 - _LEAST_FRESH), why=why, change=change)


def _stragglers(run: RunFile, found: Plan) -> Bottleneck | None:
    """Return the bottleneck of stragglers, by how much longer the slowest volunteer's rounds are than the median's.

    Paced rounds are as long as the median's unless the fewest steps, one or a sixteenth of all, take longer.
    """
    merge, times = run.merge, found.round_most_s / found.round_s
    if not merge.kind.own_weights or times < 1.05:
        return None
    step_s, wanted_s = found.round_s / found.full_steps, max(found.round_s, found.step_most_s)
    steps = merge.inner_steps
    if found.step_most_s > found.round_s:  # not even one step fits
        steps = min(_MOST_STEPS, max(steps, _round_up(wanted_s / step_s)))
    changes = [] if steps == merge.inner_steps else [_to(run, "merge.inner_steps", steps)]
    if not merge.pacing:
        changes.append(_to(run, "merge.pacing", True))
    too_long = fewest_inner_steps(steps) * found.step_most_s > 1.25 * wanted_s
    if merge.round_limit_s < wanted_s or (too_long and merge.round_limit_s > 1.25 * wanted_s):
        changes.append(_to(run, "merge.round_limit_s", _round_up(1.1 * wanted_s)))
    behind = merge.max_staleness_rounds / (times - 1)
    return Bottleneck(
        what="stragglers",
        utilization=times - 1,
        why=f"a round of the slowest lasts {_time(found.round_most_s)}, {times:.1f} times the median's: after "
        f"{behind:.0f} of its rounds it is {merge.max_staleness_rounds} behind, drops its own weights and fetches "
        f"the others'",
        change=" and ".join(changes) or "leave out volunteers that are so much slower",
    )


def _late_gradients(run: RunFile, found: Plan) -> Bottleneck | None:
    """Return the bottleneck of the slowest volunteer's gradients, by how long they take of the time for which a large
    batch waits: the shortest step, of one sequence, and the wire where the signer needs the bytes."""
    merge, rate = run.merge, found.link_up_bytes_per_s
    if not merge.kind.common_step or found.num_peers < 2:
        return None
    step_s = found.step_most_s / run.inner.batch_sequences
    pulled = found.num_peers <= merge.share_above
    wire_s = found.payload_up_bytes / rate if rate and pulled else 0.0
    utilization = (step_s + wire_s) / merge.max_wait_s
    changes, formats = [], merge.kind.formats
    if (wait_s := _round_up(_MARGIN * (step_s + wire_s))) <= _MOST_WAIT_S:
        changes.append(_to(run, "merge.max_wait_s", max(wait_s, math.ceil(merge.max_wait_s * _MARGIN))))
    if wire_s > step_s and merge.gradient_format != formats[-1]:
        changes.append(_to(run, "merge.gradient_format", formats[-1]))
    return Bottleneck(
        what="late gradients",
        utilization=utilization,
        why=f"once the batch is there, {_time(merge.max_wait_s)} are waited for the others' gradients: the slowest "
        f"volunteer's shortest step, of one sequence, takes {_time(step_s)}"
        + (f", and its gradient {_time(wire_s)} to the others" if wire_s else "")
        + "; what comes later does not count",
        change=" or ".join(changes) or "leave out volunteers that are so much slower",
    )


def _memory(run: RunFile, found: Plan) -> Bottleneck | None:
    cost = estimate(run, num_trained_parameters(run), found.num_peers)
    by_activations = cost.memory_activations_bytes > cost.memory_bytes / 2
    return Bottleneck(
        what="memory",
        utilization=found.memory_bytes / _LAPTOP_BYTES,
        why=f"a volunteer needs {size(found.memory_bytes)}; many laptops have {size(_LAPTOP_BYTES)}, for all programs",
        change=_fewer_sequences(run) if by_activations else _fewer_parameters(run, found),
    )


def _fewer_sequences(run: RunFile) -> str:
    """Suggest fewer sequences at once, in training and in evaluation, which takes a quarter as much memory each."""
    batch, evaluated = run.inner.batch_sequences, run.evaluation.batch_sequences // 4
    goal = max(1, max(run.microbatch_sequences, evaluated) // 4)
    fewer = next(number for number in range(goal, 0, -1) if batch % number == 0)
    changes = []
    if run.microbatch_sequences > fewer:
        changes.append(f"inner.microbatch_sequences = {fewer} (now {run.microbatch_sequences})")
    if evaluated > fewer:
        changes.append(_to(run, "evaluation.batch_sequences", 4 * fewer))
    return (
        " and ".join(changes)
        or f"{_to(run, 'model.context_tokens', max(2, run.model.context_tokens // 2))} or a smaller model"
    )


def _fewer_parameters(run: RunFile, found: Plan) -> str:
    """Suggest a pipeline, or one of more stages. Only gossip has pipelines."""
    now = run.pipeline.stages
    stages = min(2 * now, run.model.num_layers + 2, found.num_peers)
    if stages <= now:
        return "a smaller model"
    changes = [] if run.merge.kind.stages else [_by_gossip(run)]
    changes.append(_to(run, "pipeline.stages", stages))
    if run.pipeline.boundaries:
        changes.append("no pipeline.boundaries")
    return f"{' and '.join(changes)} or a smaller model"
