"""Output of `swarmtrain plan`: bounds, what grows with what, the first bottleneck, text and JSON."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
from codes import raises_code

from swarmtrain.cli.main import run as run_command
from swarmtrain.cli.plan import report
from swarmtrain.errors import UserError
from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.protocol.devices import FoundDevice, Precision, ProbeResult
from swarmtrain.rehearsal import LinksSection, RehearsalChurn
from swarmtrain.run import RunFile, parse_run
from swarmtrain.simulate.planning.bottlenecks import FELT, Bottleneck, bottlenecks
from swarmtrain.simulate.planning.plan import Plan, plan
from swarmtrain.simulate.planning.playback import PlaybackMachines
from swarmtrain.simulate.planning.traffic import archived_every_s, dht_bytes_per_s

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
SLOW = LinksSection(up_mbit=20, down_mbit=100, rtt_ms=40)
MODEL = "[model]\ncontext_tokens = 64\nnum_layers = 2\n"
PARAMETERS = 455_296
"""Parameters of that model: two of 256 x 128, and two layers of 4 x 128 x 128, 3 x 128 x 336 and 2 x 128; and 128."""


@pytest.fixture(autouse=True)
def few_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """Play back few peers, so that these tests are quick."""
    monkeypatch.setattr("swarmtrain.simulate.planning.playback._MOST_GOSSIPING", 16)


def a_text(merge: str = "", *, tokens: int = 30_000_000, model: str = MODEL, batch: int = 4) -> str:
    return f"[run]\ntotal_tokens = {tokens}\n{model}[inner]\nbatch_sequences = {batch}\n[merge]\n{merge}\n"


def a_run(merge: str = "", *, tokens: int = 30_000_000) -> RunFile:
    return parse_run(a_text(merge, tokens=tokens), "r")


def by_name(run: RunFile, found: Plan) -> dict[str, Bottleneck]:
    return {one.what: one for one in bottlenecks(run, found)}


def machines(number: int, step_s: float = 0.5, factors: tuple[float, ...] = (1.0, 1.5, 3.0)) -> PlaybackMachines:
    return PlaybackMachines(
        step_s=tuple(step_s * factor for factor in itertools.islice(itertools.cycle(factors), number))
    )


def planned(run: RunFile, number: int = 6, links: LinksSection = SLOW, step_s: float = 0.5) -> Plan:
    return plan(run, machines(number, step_s), links)


def worst(run: RunFile, number: int = 6, links: LinksSection = SLOW, step_s: float = 0.5) -> Bottleneck:
    return bottlenecks(run, planned(run, number, links, step_s))[0]


def test_a_gossip_round_takes_its_steps_and_the_run_its_tokens() -> None:
    run = a_run("inner_steps = 30\npublications_per_round = 4")
    found = planned(run, 3)
    assert found.round_s == pytest.approx(30 * 0.75, rel=0.04), (
        "three: the second fastest takes all steps, and one or two more to end with the slowest, whose steps are long"
    )
    assert 30 * 0.5 <= found.round_least_s < found.round_s, (
        "the fastest takes more steps, to be in step with the others"
    )
    assert found.round_most_s < 1.05 * found.round_s
    assert found.full_steps == 30, "of a round that is not made longer"
    steps_per_s = 1 / 0.5 + 1 / 0.75 + 1 / 1.5
    assert found.tokens_per_s == pytest.approx(256 * steps_per_s, rel=0.02)
    assert found.run_s == pytest.approx(30_000_000 / found.tokens_per_s + found.round_s)
    assert 0 < found.stall_share < 0.001
    pulled = found.payload_down_bytes / found.publication_bytes
    assert 1.0 < pulled <= 2.0, "of two others"


def test_twice_the_volunteers_cost_each_the_same_and_take_half_as_long() -> None:
    run = a_run("inner_steps = 30")
    few, many = planned(run, 12), planned(run, 24)
    assert many.payload_down_bytes == pytest.approx(few.payload_down_bytes, rel=0.1)
    assert many.traffic.merging_up == pytest.approx(few.traffic.merging_up, rel=0.1)
    assert many.run_s == pytest.approx(few.run_s / 2, rel=0.1)
    assert many.traffic.records > few.traffic.records


def test_of_many_volunteers_some_live_and_all_count() -> None:
    run = a_run("inner_steps = 30")
    some, all_ = planned(run, 16), planned(run, 600)
    assert "16 of 600 volunteers" in all_.by
    assert all_.tokens_per_s == pytest.approx(600 / 16 * some.tokens_per_s, rel=0.1)


@pytest.mark.parametrize("merge", ["", 'method = "diloco"', 'method = "server"', 'method = "diloco"\npacing = true'])
def test_a_slower_link_makes_nothing_quicker(merge: str) -> None:
    run = a_run(f"inner_steps = 10\n{merge}")
    found = [planned(run, 4, LinksSection(up_mbit=mbit, down_mbit=mbit), 0.05) for mbit in (0, 100, 20, 10)]
    assert all(quick.run_s <= slow.run_s * 1.001 for quick, slow in itertools.pairwise(found))
    assert all(quick.payload_down_bytes >= slow.payload_down_bytes * 0.999 for quick, slow in itertools.pairwise(found))
    assert found[0].up_share is None and found[3].up_share is not None


def test_where_pseudo_gradients_do_not_arrive_rosters_are_short() -> None:
    run, links = a_run('inner_steps = 10\nmethod = "diloco"\nsilence_s = 1'), LinksSection(up_mbit=1, down_mbit=1)
    found = {one.what: one for one in bottlenecks(run, planned(run, 4, links, 0.05))}
    assert found["short rosters"].utilization > 1 and found["uplink"].utilization > 1


def test_synchronous_rounds_wait_for_the_slowest_and_for_the_wire() -> None:
    alike = plan(a_run('method = "diloco"\ninner_steps = 20'), machines(4, factors=(1.0,)), LinksSection())
    unequal = planned(a_run('method = "diloco"\ninner_steps = 20'), 4, LinksSection())
    paced = planned(a_run('method = "diloco"\ninner_steps = 20\npacing = true'), 4, LinksSection())
    thin = plan(a_run('method = "diloco"\ninner_steps = 20'), machines(4, factors=(1.0,)), LinksSection(up_mbit=8))
    assert alike.round_s == pytest.approx(10.0, rel=0.05)
    assert unequal.round_s == pytest.approx(30.0, rel=0.05)
    assert 0.4 < unequal.stall_share < 0.6
    assert paced.stall_share < 0.35 < unequal.stall_share
    assert thin.round_s - alike.round_s >= 0.98 * thin.payload_up_bytes / 1e6, "of three at a megabyte a second"


@pytest.mark.parametrize(
    ("number", "up_mbit", "down_mbit", "rtt_ms"), [(8, 20, 100, 0), (8, 20, 100, 40), (5, 20, 100, 0), (8, 100, 20, 0)]
)
def test_a_large_batch_of_quick_volunteers_lasts_as_long_as_its_bytes_take(
    number: int, up_mbit: float, down_mbit: float, rtt_ms: float
) -> None:
    """Two inner steps each, then averaging: nobody is left out, and no link carries more than it can."""
    run = parse_run((EXAMPLES / "batch.toml").read_text(), "r")
    links = LinksSection(up_mbit=up_mbit, down_mbit=down_mbit, rtt_ms=rtt_ms)
    found = plan(run, machines(number, 0.0146, ALIKE), links)
    body = 4 * 455_296
    bytes_each = 2 * (number - 1) / number * body if number > run.merge.share_above else (number - 1) * body
    assert found.payload_up_bytes == pytest.approx(bytes_each, rel=0.01)
    wire_s = bytes_each / (min(up_mbit, down_mbit) * 125_000)
    assert wire_s < found.round_s < 1.35 * wire_s + 10 * rtt_ms / 1000
    assert found.fresh_share == 1.0 and found.partners_per_round == number - 1
    assert found.up_share is not None and found.up_share <= 1.0001
    assert found.down_share is not None and found.down_share <= 1.0001
    assert "short rosters" not in {one.what for one in bottlenecks(run, found) if one.utilization >= FELT}


@pytest.mark.parametrize("merge", ["", 'method = "diloco"', 'method = "batch"', 'method = "server"'])
@pytest.mark.parametrize("mbit", [0.05, 0.5, 3])
def test_no_more_than_a_whole_link_is_told_as_its_share(merge: str, mbit: float) -> None:
    run, links = a_run(f"inner_steps = 4\n{merge}"), LinksSection(up_mbit=mbit, down_mbit=mbit)
    found = planned(run, 6, links, 0.01)
    for share, line in zip(
        (found.up_share, found.down_share),
        (line for line in report(run, found, links) if line.split()[0] in ("sent", "received")),
        strict=True,
    ):
        assert share is not None
        told = re.search(r"([0-9.]+)% of the link", line)
        fits = told is not None and float(told[1]) <= 100
        assert fits if share <= 1.0005 else f"but the link carries {mbit:.2g}" in line


def test_pipelines_send_activations_too() -> None:
    pipeline, batch = "[pipeline]\nstages = 2\n", "[inner]\nbatch_sequences = 64\n"
    runs = [parse_run(f"[run]\ntotal_tokens = 30_000_000\n{MODEL}{batch}{more}", "r") for more in ("", pipeline)]
    whole, cut = (planned(run, 8) for run in runs)
    assert cut.memory_bytes < whole.memory_bytes and "2 stages" in cut.by
    assert 0.5 * whole.tokens_per_s < cut.tokens_per_s <= 1.05 * whole.tokens_per_s
    assert cut.payload_up_bytes > cut.publication_bytes * 3
    quick = planned(runs[1], 8, step_s=0.01)
    assert quick.tokens_per_s > 4 * 128 / 0.1, (
        "of four drivers each has a microbatch on its way, which takes less than 0.1 s"
    )
    with raises_code("too-few-peers", UserError, "--peers: 1 volunteer cannot hold 2 stages (pipeline.stages)"):
        planned(runs[1], 1)


def test_who_comes_and_goes_costs_time_and_bytes() -> None:
    run, steady = a_run("inner_steps = 30"), machines(6)
    coming = PlaybackMachines(step_s=steady.step_s, churn=RehearsalChurn(every_s=20))
    calm, rough = plan(run, steady, SLOW), plan(run, coming, SLOW)
    assert rough.run_s > 1.1 * calm.run_s and rough.traffic.returns_down > calm.traffic.returns_down == 0
    assert plan(run, coming, SLOW) == rough, "the same seed, the same plan"


def test_losses_and_jitter_are_no_help() -> None:
    run = a_run("inner_steps = 4")
    good = planned(run, 6, LinksSection(up_mbit=20, down_mbit=20, rtt_ms=100), 0.05)
    bad = planned(run, 6, LinksSection(up_mbit=20, down_mbit=20, rtt_ms=100, jitter_ms=500, loss_percent=5), 0.05)
    assert bad.fresh_share <= good.fresh_share and bad.payload_down_bytes < good.payload_down_bytes


@pytest.mark.parametrize("method", ["gossip", "diloco", "server"])
def test_one_alone_and_ten_thousand_are_planned_too(method: str) -> None:
    run = a_run(f'inner_steps = 10\nmethod = "{method}"')
    alone, crowd = planned(run, 1), planned(run, 10_000)
    assert alone.run_s == pytest.approx(117_188 * 0.5, rel=0.02), "30 million tokens by steps of 256 in half a second"
    assert crowd.run_s < alone.run_s and crowd.traffic.up > alone.traffic.up
    single, many = by_name(run, alone), by_name(run, crowd)
    if method == "server":
        assert set(single) == {"the server's uplink", "stall", "memory"}
        # A third each take 10 steps of 0.5 s, 6 of 0.75 and 3 of 1.5, and merge for 7 ms; 462,412 bytes to each.
        rounds_per_s = 10_000 / 3 * (1 / 5.007 + 2 / 4.507)
        assert many["the server's uplink"].utilization == pytest.approx(
            1.01 * 462_412 * rounds_per_s / 2.5e6 / 0.65, rel=0.01
        )
    else:
        assert set(single) == {"archive", "stall", "memory"}
        assert single["archive"].utilization == pytest.approx(1.01 * 8 * PARAMETERS / 60 / 2.5e6 / 0.1), (
            "its own state, whole"
        )
        assert many["records of the DHT"].utilization == pytest.approx(dht_bytes_per_s(10_001, 30.0) / 2.5e6 / 0.1)
        assert "late joiners" in many if method == "gossip" else "late joiners" not in many


def test_what_a_server_and_its_volunteers_send() -> None:
    found = plan(a_run('inner_steps = 10\nmethod = "server"'), machines(3, factors=(1.0,)), SLOW)
    round_s = 10 * 0.5 + PARAMETERS * (2 * 3e-9 + 9e-9)
    records = 500 * 3 * (4 / 3 + 4 / 5)  # four nodes' are kept by the three others, and read every 3 s and every 5 s
    weights, gradient, talk = PARAMETERS + 1779 * 4, PARAMETERS / 4 + 3557 * 4, 2 * 1200  # int8 and int2, with scales
    assert found.traffic.up == pytest.approx(1.01 * (gradient + talk) / round_s + records)
    assert found.traffic.down == pytest.approx(1.01 * (weights + talk) / round_s + records)
    assert found.traffic.bootstrap_up == pytest.approx(1.01 * 3 * weights / round_s + records)
    assert found.up_bytes_per_day == pytest.approx(86_400 * found.traffic.up)
    assert found.up_share == pytest.approx(found.traffic.up / 2.5e6)


def test_the_archive_is_told_apart_from_those_who_come_back() -> None:
    run, coming = a_run("inner_steps = 30"), replace(machines(6), churn=RehearsalChurn(every_s=20))
    traffic = plan(run, coming, SLOW).traffic
    theta = 4 * PARAMETERS
    assert traffic.archive == pytest.approx(1.01 * 7 * theta / 60 / 6), "of six the weights, of one the momentum"
    assert traffic.returns_up == traffic.returns_down == pytest.approx(1.01 * 5 * theta / (20 * 6)), "of four others"
    server = plan(a_run('method = "server"'), coming, SLOW).traffic
    assert server.archive == server.returns_up == 0 < server.returns_down, "the server sends them"


def test_a_state_with_two_moments_costs_a_half_more() -> None:
    """Of a large batch: AdamW's two moments travel with the weights."""
    coming = replace(machines(6), churn=RehearsalChurn(every_s=20))
    large, usual = (a_run(f'inner_steps = 30\nmethod = "{method}"') for method in ("batch", "diloco"))
    two, one = (plan(run, coming, SLOW).traffic for run in (large, usual))
    assert two.returns_down == pytest.approx(1.01 * 12 * PARAMETERS / (20 * 6)) == pytest.approx(1.5 * one.returns_down)
    assert two.archive == pytest.approx(1.01 * 12 * PARAMETERS / 60 / 6) == pytest.approx(1.5 * one.archive)
    big = [parse_run(a_text(f'method = "{method}"', model=HUGE, batch=1), "r") for method in ("batch", "diloco")]
    slower, sooner = (archived_every_s(run, 1e8) for run in big)
    assert sooner > 60 and slower == pytest.approx(1.5 * sooner)


# ---------------------------------------------------------------- what hurts


def test_a_link_that_is_too_slow_hurts_first() -> None:
    thin = worst(a_run("inner_steps = 4"), links=LinksSection(up_mbit=1, down_mbit=100), step_s=0.1)
    assert thin.what == "uplink" and thin.utilization > 1 and "1 Mbit/s" in thin.why
    assert "merge.inner_steps = " in thin.change and 'merge.theta_format = "int4"' in thin.change
    narrow = worst(a_run("inner_steps = 4"), links=LinksSection(up_mbit=100, down_mbit=1), step_s=0.1)
    assert narrow.what == "downlink"


def advised(text: str, change: str) -> str:
    """Return the run file with the first advised alternative."""
    table = tomllib.loads(text)
    for part in change.partition(" or ")[0].split(" and "):
        said = re.fullmatch(r"(?:no (\w+)\.(\w+)|(\w+)\.(\w+) = (.+) \(now .+\)(?::.*)?)", part)
        assert said is not None, f"{part!r} in {change!r} is no change of a run file"
        gone_from, gone, section, key, value = said.groups()
        if gone:
            del table[gone_from][gone]
        else:
            table.setdefault(section, {})[key] = tomllib.loads(f"it = {value}")["it"]
    return tomli_w.dumps(table)


def thin(mbit: float) -> LinksSection:
    return LinksSection(up_mbit=mbit, down_mbit=100)


LONG = "[model]\nnum_layers = 4\nwidth = 512\nnum_heads = 8\ncontext_tokens = 1024\n"
HUGE = "[model]\nnum_layers = 24\nwidth = 2048\nnum_heads = 16\ncontext_tokens = 16\n"
ALIKE = (1.0,)
FREE = LinksSection()
DILOCO = 'method = "diloco"\n'
BATCH = 'method = "batch"\n'


@pytest.mark.parametrize(
    ("what", "text", "number", "links", "step_s", "factors"),
    [
        ("uplink", a_text("inner_steps = 4"), 6, thin(1), 0.1, ALIKE),
        ("uplink", a_text("inner_steps = 1000\nround_limit_s = 2"), 6, thin(1), 0.1, ALIKE),
        ("uplink", a_text("inner_steps = 19\nround_limit_s = 2"), 6, thin(1), 0.1, ALIKE),
        ("uplink", a_text('inner_steps = 10\nmethod = "diloco"\nshare_above = 3'), 6, thin(1), 0.05, ALIKE),
        ("uplink shared by readers", a_text("inner_steps = 1000"), 6, thin(0.8), 0.5, ALIKE),
        ("uplink shared by readers", a_text("inner_steps = 1000"), 6, thin(0.3), 0.5, ALIKE),
        ("whole uplink", a_text('inner_steps = 4\nmethod = "server"\nbuffer_arrivals = 4'), 6, thin(1), 0.1, ALIKE),
        ("whole uplink", a_text("[pipeline]\nstages = 2", batch=64), 8, thin(5), 0.5, ALIKE),
        ("the server's uplink", a_text('method = "server"\nbuffer_arrivals = 4'), 60, thin(1), 0.5, ALIKE),
        ("archive", a_text("[network]\narchive_every_s = 5"), 6, thin(5), 0.5, ALIKE),
        ("late joiners", a_text("inner_steps = 1"), 6, thin(20), 0.01, ALIKE),
        ("records of the DHT", a_text(), 100, thin(2), 0.5, ALIKE),
        ("records of the DHT", a_text("[network]\npresence_ttl_s = 60"), 300, thin(2), 0.5, ALIKE),
        ("number of rounds", a_text(tokens=300_000), 6, SLOW, 2.0, ALIKE),
        ("number of rounds", a_text("inner_steps = 1000\nround_limit_s = 20", tokens=700_000), 6, SLOW, 1.0, ALIKE),
        ("stall", a_text("inner_steps = 1"), 6, LinksSection(), 0.001, ALIKE),
        ("stall", a_text('method = "diloco"\ninner_steps = 20'), 6, LinksSection(), 1.0, (1.0, 3.0)),
        ("stall", a_text(f"{DILOCO}inner_steps = 20\npacing = true\nshare_above = 8"), 6, FREE, 1.0, (1.0, 30.0)),
        ("freshness", a_text("inner_steps = 2"), 6, thin(1), 0.05, ALIKE),
        ("short rosters", a_text(f"{DILOCO}silence_s = 1"), 4, LinksSection(up_mbit=1, down_mbit=1), 0.05, ALIKE),
        ("short rosters", a_text(f"{BATCH}max_wait_s = 3"), 4, LinksSection(up_mbit=1, down_mbit=1), 0.05, ALIKE),
        ("stragglers", a_text("inner_steps = 4"), 6, SLOW, 1.0, (1, 1, 1, 1, 1, 30)),
        ("stragglers", a_text("inner_steps = 100"), 6, SLOW, 1.0, (1, 1, 1, 1, 1, 60)),
        ("stragglers", a_text("inner_steps = 100\npacing = false"), 6, SLOW, 1.0, (1, 1, 1, 1, 1, 10)),
        ("late gradients", a_text(f"{BATCH}inner_steps = 30\nmax_wait_s = 3"), 6, SLOW, 8.0, (1, 1, 1, 1, 1, 4)),
        ("late gradients", a_text(f"{BATCH}inner_steps = 300\nmax_wait_s = 3"), 5, thin(1), 0.5, ALIKE),
        ("memory", a_text("inner_steps = 500", model=LONG, batch=90), 2, LinksSection(), 2.0, ALIKE),
        ("memory", a_text("inner_steps = 500", model=HUGE, batch=1), 4, LinksSection(), 2.0, ALIKE),
        ("memory", a_text('method = "diloco"', model=HUGE, batch=1), 4, LinksSection(), 2.0, ALIKE),
    ],
)  # fmt: skip
def test_what_is_changed_as_advised_hurts_less(
    what: str, text: str, number: int, links: LinksSection, step_s: float, factors: tuple[float, ...]
) -> None:
    them, run = machines(number, step_s, factors), parse_run(text, "r")
    before = by_name(run, plan(run, them, links))[what]
    assert before.utilization >= FELT
    changed = parse_run(advised(text, before.change), "r")
    after = by_name(changed, plan(changed, them, links))
    assert what not in after or after[what].utilization < 0.95 * before.utilization, before.change


def test_where_no_key_helps_none_is_advised() -> None:
    crowd = plan(a_run(), machines(3000, factors=ALIKE), thin(2))
    longest = parse_run(a_text("[network]\npresence_ttl_s = 3600"), "r")
    seldom = by_name(longest, replace(crowd, traffic=replace(crowd.traffic, records=dht_bytes_per_s(3001, 3600.0))))
    assert seldom["records of the DHT"].change.startswith("fewer volunteers in one run")
    alone = plan(a_run("inner_steps = 100"), machines(6, 1.0, (1, 1, 1, 1, 1, 60)), SLOW)
    at_limit = a_run("inner_steps = 100\nround_limit_s = 100")
    slowest = by_name(at_limit, replace(alone, round_s=100.0, round_most_s=200.0))["stragglers"]
    assert slowest.change == "leave out volunteers that are so much slower"


def test_each_thing_that_can_hurt_is_named() -> None:
    assert worst(a_run(tokens=300_000), step_s=2.0).what == "number of rounds"
    assert worst(a_run("inner_steps = 1"), links=LinksSection(), step_s=0.001).what == "stall"
    assert worst(a_run('method = "diloco"\ninner_steps = 20'), step_s=1.0).what == "stall"
    assert "merge.pacing = true" in worst(a_run('method = "diloco"\ninner_steps = 20'), step_s=1.0).change
    assert worst(a_run('method = "server"'), 2000).what == "the server's uplink"
    assert worst(a_run(), 3000, LinksSection(up_mbit=8)).what == "records of the DHT"
    run = a_run("inner_steps = 1000")
    thin = {one.what: one for one in bottlenecks(run, planned(run, 6, LinksSection(up_mbit=0.8, down_mbit=8)))}
    assert thin["uplink shared by readers"].change == "network.max_readers = 1 (now 4)"
    stragglers = plan(a_run("inner_steps = 16"), machines(6, 1.0, (1, 1, 1, 1, 1, 60)), SLOW)
    found = {one.what: one for one in bottlenecks(a_run("inner_steps = 16"), stragglers)}
    assert found["stragglers"].utilization > 1


def test_gradients_that_come_too_late_for_a_large_batch_are_told() -> None:
    """A volunteer's shortest step is one sequence, a quarter of the run's batch."""
    run = a_run(f"{BATCH}inner_steps = 30\nmax_wait_s = 3")
    late = by_name(run, plan(run, machines(6, 8.0, (1, 1, 1, 1, 1, 4)), SLOW))["late gradients"]
    assert late.utilization == pytest.approx(8 / 3) and "merge.max_wait_s = 12 (now 3)" in late.change
    assert "takes 8.0 s" in late.why and "to the others" not in late.why, "of six, the signer needs no bytes"
    assert by_name(run, plan(run, machines(6, 4.0, ALIKE), SLOW))["late gradients"].utilization == pytest.approx(1 / 3)
    assert "late gradients" not in by_name(a_run(DILOCO), planned(a_run(DILOCO)))


def test_big_models_hurt_by_memory_archives_and_late_joiners() -> None:
    model = "[model]\nnum_layers = 24\nwidth = 1024\nnum_heads = 16\n"
    big = parse_run(f"[run]\ntotal_tokens = 10_000_000_000\n{model}[merge]\ninner_steps = 500\n", "r")
    found = {one.what: one for one in bottlenecks(big, planned(big, 6, SLOW, 2.0))}
    assert found["archive"].utilization > 1 and "network.archive_every_s = " in found["archive"].change
    assert (
        found["memory"].utilization > 1 and found["memory"].change == "pipeline.stages = 2 (now 1) or a smaller model"
    )
    quick = {one.what: one for one in bottlenecks(big, planned(big, 6, SLOW, 0.01))}
    assert quick["late joiners"].utilization > 1 and "a peer more than 8 behind" in quick["late joiners"].why


def test_records_grow_with_those_who_are_read() -> None:
    rates = [dht_bytes_per_s(number, 30.0) for number in (1, 2, 5, 25, 65, 301, 10_001)]
    assert rates[0] == 0 and rates[1] > 0
    assert rates[2] == pytest.approx(5250, rel=0.1), "links of four volunteers carried 5.0 to 5.5 kB/s"
    assert rates[3] < rates[4] < rates[5] <= rates[6]
    assert dht_bytes_per_s(301, 120.0) < dht_bytes_per_s(301, 30.0)


# ---------------------------------------------------------------- the command


CPU = FoundDevice(name="cpu", title="")


def written(tmp_path: Path, text: str = "") -> str:
    path = tmp_path / "run.toml"
    path.write_text(f"[run]\ntotal_tokens = 30_000_000\n{MODEL}{text}", encoding="utf-8")
    return str(path)


def test_the_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--peers", "300", "--link-up", "20", "--link-down", "100", "--step-s", "1", "--slowdown", "1,2"]
    assert run_command(["plan", written(tmp_path), *options]) == 0
    said = capsys.readouterr().out
    assert said.startswith("run stdlib-gpt with 300 volunteers, 20 Mbit/s up, 100 Mbit/s down\n")
    for row in ("rounds", "whole run", "stall", "sent", "received", "bootstrap", "memory", "known by"):
        assert f"\n  {row}" in said
    assert "% of the link" in said and " by each volunteer" in said and "records of who is there " in said
    assert "first bottleneck: number of rounds" in said and "run.total_tokens = " in said


def test_where_nothing_hurts_what_is_nearest_to_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", written(tmp_path), "--peers", "4", "--step-s", "1"]) == 0
    assert "  no bottleneck; closest to one: " in capsys.readouterr().out


def test_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = written(tmp_path, '[merge]\nmethod = "server"\ninner_steps = 10\n')
    assert run_command(["plan", server, "--step-s", "0.5", "--link-up", "20", "--json"]) == 0
    said = capsys.readouterr()
    assert not said.err and said.out.count("\n") == 1
    table = json.loads(said.out)
    assert table["num_peers"] == 3 and table["step_s"] == 0.5
    assert table["rounds_per_hour"] == pytest.approx(3600 / table["round_s"])
    assert table["up_bytes_per_day"] == pytest.approx(86_400 * 29_515, rel=1e-3), "as a server's volunteer sends, above"
    assert table["up_share"] == pytest.approx(29_515 / 2.5e6, rel=1e-3)
    assert table["down_share"] is None
    assert {"what", "strain", "why", "change"} == set(table["hurts"][0])
    assert all(bool(one["change"]) == (one["strain"] >= FELT) for one in table["hurts"])


def test_a_step_is_measured_unless_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmtrain.peer.training.speed.measure_speed", lambda run, compute: 4096.0)
    monkeypatch.setattr("swarmtrain.peer.devices.choice.find_devices", lambda parameters: [CPU])
    monkeypatch.setattr("swarmtrain.peer.devices.choice.missing_card", lambda: "")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert run_command(["plan", written(tmp_path), "--peers", "6"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("measuring an inner step on the processor in fp32 (no graphics card was found), ")
    assert "inner step 250 ms\n" in said.out
    assert "would be about 3 times slower: 6 volunteers would share 2 cores" in said.out


def test_a_step_is_measured_on_the_device_that_join_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[ComputeDevice] = []

    def measure(run: RunFile, compute: ComputeDevice) -> float:
        found.append(compute)
        return 4096.0

    def probe(run: RunFile, device: FoundDevice, precisions: tuple[Precision, ...]) -> ProbeResult:
        return ProbeResult(tokens_per_s={"fp32": 1000.0, "bf16": 3000.0})

    card = FoundDevice(name="cuda:0", title="A Card", precisions=("fp32", "bf16"), free_bytes=10**10)
    monkeypatch.setattr("swarmtrain.peer.training.speed.measure_speed", measure)
    monkeypatch.setattr("swarmtrain.peer.devices.choice.find_devices", lambda parameters: [card, CPU])
    monkeypatch.setattr("swarmtrain.peer.devices.choice.probe_device", probe)
    assert run_command(["plan", written(tmp_path), "--peers", "6"]) == 0
    said = capsys.readouterr()
    assert "on cuda:0 (A Card) in bf16 (it works; in a probe 3.0 times as fast as fp32), for at most" in said.err
    assert "would be about 6 times slower: 6 volunteers would share cuda:0" in said.out
    stages = written(tmp_path, "[pipeline]\nstages = 2\n")
    assert run_command(["plan", stages, "--peers", "6"]) == 0
    assert "on cuda:0 (A Card) in bf16 (it works; " in capsys.readouterr().err
    assert [(str(each.device), each.precision) for each in found] == [("cuda:0", "bf16")] * 2


def test_a_bad_run_file_is_told_as_check_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = written(tmp_path, "widht = 3\n")
    assert run_command(["plan", bad]) == run_command(["check", bad]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == second and "widht" in first


def test_every_row_of_the_report_has_its_words() -> None:
    for merge in ("", 'method = "server"', 'method = "diloco"'):
        run = a_run(merge)
        lines = report(run, planned(run, 4), LinksSection())
        assert any(line.startswith("  merging ") for line in lines) == (merge != 'method = "server"')
        assert "no limit on their links" in lines[0]


def test_batches_that_grow_are_planned_by_their_mean() -> None:
    fixed = a_run('inner_steps = 30\nmethod = "batch"')
    grows = a_run('inner_steps = 30\nmethod = "batch"\ntarget_tokens = "auto"')
    few, many = planned(grows, 4), planned(fixed, 4)
    assert few.num_rounds == pytest.approx(grows.batch_target.num_steps, rel=0.1) and few.num_rounds < many.num_rounds
    (rounds,) = (line for line in report(grows, few, LinksSection()) if line.startswith("  rounds "))
    assert "; batches grow from 7.68 k to 588 k tokens, and are planned as if all had " in rounds
    tight = by_name(grows, planned(grows, 4, LinksSection(up_mbit=0.2, down_mbit=0.2, rtt_ms=40)))
    changes = [each.change for each in tight.values() if "merge.inner_steps" in each.change]
    assert changes and all("merge.inner_steps = 120 (now 30)" in each for each in changes)


def test_of_samples_the_plan_is_the_least() -> None:
    samples = '[data]\nsource = "jsonl"\npaths = ["pairs.jsonl"]\nformat = "prompt-completion"\n'
    texts, pairs = (parse_run(a_text() + data, "r") for data in ("", samples))
    found = planned(texts, 4)
    reports = [report(run, found, LinksSection()) for run in (texts, pairs)]
    of_texts, of_pairs = (next(line for line in lines if line.startswith("  whole run")) for lines in reports)
    assert "at least" not in of_texts
    assert of_pairs.replace("at least ", "").removesuffix("; only tokens that are learnt count") == of_texts
