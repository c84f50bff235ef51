"""Averaging with roles by bandwidth beside equal shares, and beside what the linear program predicts.

    python benchmarks/roles.py                    # in virtual time
    python benchmarks/roles.py --only eight --mb 25
    python benchmarks/roles.py --real             # real processes behind the links of a rehearsal: half an hour

With `--real` the peers are processes of `swarmtrain join`, which measure their links themselves; the first rounds, in
which they have not yet, are left out. Equal shares are the same program with that one decision patched.

Two swarms: links of 10, 20, 50, 100 and 200 Mbit/s and a hidden peer with 50; and eight peers. Each row is the time
from a round's roster to the last peer that has its mean: the median of the rounds measured, by roles and with equal
shares in the same call. "The program" is the optimum of the paper's linear program (DeDLOC, arXiv 2106.10207, section
3.2) for the true links, solved by scipy; "its bound" is 2 - 2/n, more than which no division can gain over equal shares
among n peers, because the slowest link carries a whole gradient each way with any.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import linprog

from swarmtrain.events import RoundEvent, StartedEvent
from swarmtrain.network.links.throttle import BYTES_PER_S_OF_MBIT
from swarmtrain.peer.local.swarm import BOOTSTRAP, LocalLinks, LocalSwarm
from swarmtrain.rehearsal import LinksSection, RehearsalFile, RehearsedVolunteer
from swarmtrain.simulate.systems.messages import Settings, SimulatedLink
from swarmtrain.simulate.systems.world import SynchronousWorld

RTT_S = 0.05


@dataclass(frozen=True)
class Case:
    """Swarm that is measured: links in Mbit/s, the same both ways, and the numbers of the hidden peers."""

    name: str
    mbit: tuple[float, ...]
    hidden: tuple[int, ...] = ()


CASES = (
    Case("six", (10, 20, 50, 100, 200, 50), (5,)),
    Case("eight", (10, 20, 50, 100, 200, 20, 50, 100)),
)


def program_s(case: Case, body_bytes: float, owns: Sequence[float] | None = None) -> float:
    """Solve the linear program: the largest rate R at which everyone gets the mean, with x_i the rate of the part that
    peer i averages. Peer i sends and receives R + (n - 2) x_i, and all x_i add up to R. Return body / R in seconds.

    `owns` fixes the fractions x_i / R in place of the best ones.
    """
    num = len(case.mbit)
    limits = [rate * BYTES_PER_S_OF_MBIT / body_bytes for rate in case.mbit]
    up_and_down = [[1.0, *((num - 2.0) * (i == j) for j in range(num))] for i in range(num)]
    equal_rows, bounds = [[-1.0, *([1.0] * num)]], [(0, None)] * (num + 1)
    for index in range(num):
        if owns is not None:
            equal_rows.append([-owns[index], *(float(index == j) for j in range(num))])
        elif index in case.hidden:
            bounds[1 + index] = (0, 0)
    found = linprog(
        [-1.0] + [0.0] * num,
        A_ub=np.array(up_and_down),
        b_ub=np.array(limits),
        A_eq=np.array(equal_rows),
        b_eq=np.zeros(len(equal_rows)),
        bounds=bounds,
        method="highs",
    )
    assert found.success, found.message
    return 1.0 / float(found.x[0])


@dataclass(frozen=True)
class Measured:
    """Seconds of averaging in each round measured, and the shares of the last one in parts of the whole."""

    seconds: tuple[float, ...]
    shares: tuple[float, ...]


def simulated(case: Case, body_bytes: int, by_bandwidth: bool, rounds: int = 3) -> Measured:
    """Play the swarm in virtual time, by the product's decisions, with transfers that share its links fairly."""
    settings = Settings(
        inner_steps=10,
        silence_s=20.0,
        publication_bytes=body_bytes,
        state_bytes=2 * body_bytes,
        transfers_share_links=True,
        by_bandwidth=by_bandwidth,
    )
    world = SynchronousWorld(settings)
    for number, rate in enumerate(case.mbit):
        link = SimulatedLink(
            latency_s=RTT_S / 4,
            bytes_per_s=rate * BYTES_PER_S_OF_MBIT,
            can_be_dialled=number not in case.hidden,
        )
        world.join(f"p{number}", steps_per_s=1.0, link=link)
    assert world.run_rounds(1 + rounds, 1e6)
    took_s = []
    for round in range(1, 1 + rounds):
        signed_s = min(event.time_s for event in world.events("signed") if event.round == round)
        ends_s = [event.time_s for event in world.events("applied") if event.round == round]
        assert len(ends_s) == len(case.mbit)
        took_s.append(max(ends_s) - signed_s)
    last = world.peers["p0"].last
    assert last is not None
    total = sum(last.shares)
    return Measured(tuple(took_s), tuple(share / total for share in last.shares))


# ---------------------------------------------------------------- real processes

EQUAL = (
    "from swarmtrain.protocol.rounds.link_claims import LinkClaims; LinkClaims.shares = lambda *_: (); "
    "from swarmtrain.cli.__main__ import main; main()"
)
"""Program that is `swarmtrain` with equal shares."""
_AVERAGED = re.compile(r"round (\d+): averaged (\d+) in ([\d.]+) s, (.*)")
_LIMIT_S = 900.0
_FIRST = 2
"""Round from which on it is measured."""
# With fewer inner steps a round takes no longer than the volunteers' applying of a roster lies apart: those behind then
# join the next round late, and are not waited for.
RUN = """
[run]
name = "roles"
total_tokens = 1_000_000_000
[model]
tokenizer = "bytes"
context_tokens = 16
num_layers = 5
width = 320
num_heads = 5
[data]
source = "text"
paths = ["texts/*.txt"]
held_out_bytes = 4096
[inner]
batch_sequences = 1
[merge]
method = "diloco"
inner_steps = 200
min_peers = {num}
silence_s = 40.0
[network]
archive_every_s = 3600.0
"""


def real(case: Case, by_bandwidth: bool, rounds: int) -> tuple[Measured, int]:
    """Run the swarm as processes; return what was measured, and the bytes averaged."""
    folder = Path(tempfile.mkdtemp(prefix="swarmtrain-roles-"))
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("".join(f"{number} is a number.\n" for number in range(20_000)))
    run_file, num = folder / "run.toml", len(case.mbit)
    run_file.write_text(RUN.format(num=num))
    names = [f"volunteer-{number}" for number in range(1, num + 1)]
    told = [
        RehearsedVolunteer(name=name, up_mbit=rate, down_mbit=rate, hidden=number in case.hidden)
        for number, (name, rate) in enumerate(zip(names, case.mbit, strict=True))
    ]
    rehearsal = RehearsalFile(links=LinksSection(rtt_ms=1000 * RTT_S), volunteers=tuple(told))
    swarm = LocalSwarm(folder, links=LocalLinks(rehearsal))
    program = ("-m", "swarmtrain.cli") if by_bandwidth else ("-c", EQUAL)
    try:
        words = ["bootstrap", str(run_file), *swarm.place(BOOTSTRAP, limited=False), "--no-samples"]
        swarm.start(BOOTSTRAP, words)
        invite, _ = swarm.wait_for_invite(120.0)
        for name in names:
            words = ["join", invite.invite, *swarm.place(name, limited=True), "--threads", "1", "--log-level", "info"]
            swarm.start(name, [*words, "--data", str(folder), "--on-battery"], program)
        num_bytes = 0
        for event in swarm.events(_LIMIT_S):
            if isinstance(event, StartedEvent):
                num_bytes = 4 * event.num_parameters
            if isinstance(event, RoundEvent) and event.round >= _FIRST + rounds:
                break
    finally:
        swarm.stop()
    found: dict[int, dict[str, tuple[float, str]]] = defaultdict(dict)
    for name in names:
        for line in (folder / f"{name}.log").read_text().splitlines():
            if (match := _AVERAGED.search(line)) and int(match[2]) == num:
                found[int(match[1])][name] = float(match[3]), match[4]
    whole = [found[round] for round in sorted(found) if round >= _FIRST and len(found[round]) == num]
    print(f"  (round {min(found)}: {max(s for s, _ in found[min(found)].values()):.1f} s; logs in {folder})")
    assert whole, "no round with everyone"
    last = whole[-1][names[0]][1]
    shares = [_share_of(name, last, name == names[0]) for name in names]
    return Measured(tuple(max(s for s, _ in one.values()) for one in whole), tuple(shares)), num_bytes


def _share_of(name: str, words: str, is_reader: bool) -> float:
    """Return a volunteer's share in what the log says, as a part of the whole."""
    match = re.search(rf"{'this peer' if is_reader else name} (\d+)%", words)
    return int(match[1]) / 100 if match else 0.0


def show(case: Case, body_bytes: int, by_roles: Measured, equal: Measured, how: str) -> None:
    """Print one table."""
    num = len(case.mbit)
    best_s, even_s = program_s(case, body_bytes), program_s(case, body_bytes, [1 / num] * num)
    roles_s, equal_s = statistics.median(by_roles.seconds), statistics.median(equal.seconds)
    links = ", ".join(f"{rate:g}{' hidden' * (number in case.hidden)}" for number, rate in enumerate(case.mbit))
    print(f"\n{case.name}, {how}: links of {links} Mbit/s; {body_bytes / 1e6:.1f} MB averaged")
    print(f"  shares by roles: {', '.join(f'{share:.0%}' for share in by_roles.shares) or 'equal'}")
    for what, took_s, model_s, each in (
        ("by roles", roles_s, best_s, by_roles.seconds),
        ("equal shares", equal_s, even_s, equal.seconds),
    ):
        rounds = ", ".join(f"{one:.1f}" for one in each)
        print(f"  {what:13} {took_s:7.1f} s; the program says {model_s:.1f} s ({took_s / model_s - 1:+.1%}); {rounds}")
    print(
        f"  times faster  {equal_s / roles_s:7.2f}; the program says {even_s / best_s:.2f}; its bound {2 - 2 / num:.2f}"
    )


def main() -> None:
    """Run the command line described in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[case.name for case in CASES], help="this swarm alone")
    parser.add_argument("--real", action="store_true", help="real processes in place of virtual time")
    parser.add_argument("--rounds", type=int, default=3, help="rounds measured with --real [3]")
    parser.add_argument("--mb", type=float, default=100.0, help="size of the mean in virtual time [100]")
    given = parser.parse_args()
    for case in CASES:
        if given.only not in (None, case.name):
            continue
        if given.real:
            (by_roles, num_bytes), (equal, _) = (real(case, on, given.rounds) for on in (True, False))
            show(case, num_bytes, by_roles, equal, "real processes")
        else:
            body_bytes = int(given.mb * 1e6)
            by_roles, equal = (simulated(case, body_bytes, by_bandwidth) for by_bandwidth in (True, False))
            show(case, body_bytes, by_roles, equal, "in virtual time")


if __name__ == "__main__":
    main()
