"""Fault schedules in which processes start, end and restart with various folders, and the invariants that must hold.

Volunteers come, train, leave politely, are killed, and come back with their folder, with an old copy of it or without.
Some live for seconds, and one may lie about what it has trained. The bootstrap, which may be the run's server, leaves,
crashes, comes back with its folder, with an old copy, or on another machine. At times everybody is gone, and a folder
is all that is left. Peers gossip, hand in to the server, or train in synchronous rounds.

- A run's tokens never fall, and the learning rate never rises again after its peak, wherever weights come from.
- What is trained counts.
- Work that a bootstrap acknowledged is in its archive a minute later, while somebody has it.
- Nobody leaves with what nobody else has, unless no bootstrap comes within a minute.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from fault_search.lives_peers import (
    RUN,
    Bootstrap,
    Folder,
    LivesLiar,
    LivesWorld,
    Process,
    Round,
    SearchedVolunteer,
    identity_of,
)
from fault_search.lives_rounds import ROUNDS_RUN, RoundsBootstrap, RoundsVolunteer
from fault_search.lives_server import SERVED_RUN, Server, Worker
from fault_search.schedule import FaultSchedule, FaultSpan, Played, ScheduledFault, Violation, draw_faults
from swarmtrain.algorithm.inner import learning_rate_at
from swarmtrain.peer.lifecycle.bootstrap_peer import LOOK_EVERY_S
from swarmtrain.peer.training.loop import inner_constants
from swarmtrain.protocol.membership.membership import PeerState

_SPAN = FaultSpan(4.0, 60.0, 40.0)
_LEAST_S = 20.0
_RECOVERY_S = 75.0
_ARCHIVED_S = 60.0
_WAITS_S = 60.0
"""Seconds that the last peer with unarchived work waits for a bootstrap that does not answer."""
_SURE_S = 10.0
_LAG_S = 10.0
"""Seconds until a peer knows what others have counted."""
_BELIEVED_S = 20.0
"""Seconds until the claims of a returning peer are believed."""
_KINDS = {
    "leave": 2, "kill": 2, "restart": 4, "old folder": 2, "lost folder": 1, "join": 2, "liar joins": 1, "visits": 4,
    "freeze": 1, "bootstrap away": 5, "bootstrap crash": 3, "bootstrap old folder": 3, "bootstrap moves": 2,
    "everybody": 5,
}  # fmt: skip
_WARM_TOKENS = RUN.inner.warmup_fraction * RUN.run.total_tokens
_CONSTANTS = inner_constants(RUN)


def draw_lives(rng: random.Random) -> FaultSchedule:
    """Draw a bootstrap, up to four volunteers at first, and what happens to them."""
    speeds = (rng.choice((4.0, 6.0, 8.0)),) * rng.choice((1, 1, 2, 2, 3, 4))  # rounds are paced: all are as long
    faults = draw_faults(rng, _KINDS, len(speeds), _SPAN, lambda kind: rng.randrange(16))
    chance = rng.random()
    options = (("server", 1.0),) if chance < 0.25 else (("rounds", 1.0),) if chance > 0.85 else ()
    return FaultSchedule(world="lives", speeds=speeds, faults=faults, options=options, seed=rng.randrange(2**16))


# ---------------------------------------------------------------- who comes and goes


class _Lives(LivesWorld):
    """Simulated world that carries out a schedule and judges the result."""

    def __init__(self, schedule: FaultSchedule) -> None:
        self.served, self.in_rounds = bool(schedule.option("server", 0)), bool(schedule.option("rounds", 0))
        super().__init__(schedule.seed, SERVED_RUN if self.served else ROUNDS_RUN if self.in_rounds else RUN)
        self.broken: list[Violation] = []
        self.speeds = dict(zip(schedule.names, schedule.speeds, strict=True))
        self.usual_speed = max(schedule.speeds)
        self.folders: dict[str, Folder] = {}
        self.left_alone: set[str] = set()
        """Peers that no other volunteer trained beside when they left."""
        self.volunteers: list[SearchedVolunteer] = []
        self.liars: dict[str, float] = {}
        """Time since which each liar lies."""
        self.address = 0
        """Address of the bootstrap; it changes when the bootstrap moves to another machine. Volunteers keep their
        addresses."""
        self.owed: dict[Round, _Owed] = {}
        self.acknowledged: dict[str, int] = {}
        self.counted: list[tuple[float, int]] = []
        """(time, tokens that the bootstrap counted), over all processes that used the same folder."""
        self.counts_of: Folder | None = None
        self.ended_s = 0.0
        """Last time at which a bootstrap was running."""

    # ------------------------------------------------------------- events

    def come(self, name: str, folder: Folder | None = None, *, lies: bool = False) -> None:
        """Start a volunteer if it is not running: with the given folder, its last one, or a new one."""
        if self._lives(name):
            return
        folder = self.folders[name] = folder or self.folders.get(name) or Folder(name)
        invite = {one.folder.key: one.address for one in self.living() if not one.away} | {"b": self.address}
        invite.pop(name, None)
        kind = (
            LivesLiar if lies else Worker if self.served else RoundsVolunteer if self.in_rounds else SearchedVolunteer
        )
        self.left_alone.discard(name)
        new = self.processes[name] = kind(self, folder, 0, invite, self.speeds.setdefault(name, self.usual_speed))
        self.volunteers.append(new)

    def bootstrap(self, folder: Folder | None = None, address: int | None = None) -> None:
        """Start the bootstrap if it is not running."""
        if self._lives("b"):
            return
        self.address = self.address if address is None else address
        folder = self.folders["b"] = folder or self.folders.get("b") or Folder("b")
        kind = Server if self.served else RoundsBootstrap if self.in_rounds else Bootstrap
        self.processes["b"] = kind(self, folder, self.address, {})

    def all_go(self, but: str = "") -> None:
        """Kill all volunteers that were ever started, except `but`."""
        for name in sorted(self.speeds.keys() - {but}):
            self.goes(name, False)

    def goes(self, name: str, politely: bool) -> None:
        """End a process: by a request to leave if `politely`, else by a kill."""
        process = self.processes.get(name)
        if process is None or not process.alive:
            return
        if politely and process.answers:
            process.leave()
        else:
            process.kill()

    def _lives(self, name: str) -> bool:
        return name in self.processes and self.processes[name].alive

    def again(self, name: str, folder: Folder | None = None) -> None:
        """Restart a process; if it is still leaving, kill it first."""
        if (process := self.processes.get(name)) is not None:
            process.kill()
        if name == "b":
            self.bootstrap(folder)
        else:
            self.come(name, folder)

    # ------------------------------------------------------------- what must hold

    def lag_tokens(self) -> float:
        """Return the tokens that others may have trained recently and that one peer has not counted yet."""
        lately = [one for one in self.volunteers if one.alive or self.clock.now < one.ended_s + _LAG_S]
        speeds = sorted(one.speed for one in lately)[:-1]
        return 2 * RUN.round_tokens + sum(_LAG_S * speed * RUN.tokens_per_step for speed in speeds)

    def trains(self, volunteer: SearchedVolunteer) -> None:
        """Judge a volunteer's count of tokens and its learning rate. With liars there is no judgement, because their
        claims count, within bounds."""
        if self.liars:
            self._judge_claims(volunteer)
            return
        others = [one for one in self.volunteers if one is not volunteer and one.folder.checkpoints]
        if any(one.came_s < self.clock.now < one.came_s + _BELIEVED_S for one in others):
            return
        behind, tokens = volunteer.behind, volunteer.progress.run_tokens
        before = min(behind.at_tokens, len(behind.rounds) * RUN.round_tokens) - self.lag_tokens()
        said = f"{volunteer.folder.key} goes on from weights that were trained at {behind.at_tokens} tokens"
        if tokens < before:
            self._break("a run's tokens never fall", f"{said}, and counts {tokens}")
        if before >= _WARM_TOKENS and (tokens < _WARM_TOKENS or _rate(tokens) > _rate(before)):
            rates = f"{_rate(before):.3e} or less, with {_rate(tokens):.3e}"
            self._break("the learning rate never rises again", f"{said} and {rates}")
        volunteer.behind = dataclasses.replace(behind, at_tokens=max(behind.at_tokens, tokens))

    def first_round(self, volunteer: SearchedVolunteer) -> None:
        """Check a volunteer that finds only a bootstrap.

        It must continue from the archive, or from its own state if that is ahead of the archive.
        """
        boot, others = self.processes.get("b"), [one for one in volunteer.neighbours() if not one.is_bootstrap]
        if others or boot not in volunteer.neighbours() or not isinstance(boot, Bootstrap) or boot.away:
            return
        tokens, archived = volunteer.progress.run_tokens, boot.progress.run_tokens
        if tokens < archived:
            detail = f"{volunteer.folder.key} begins with {tokens} tokens beside an archive of {archived}"
            self._break("a run's tokens never fall", detail)

    def trained(self, volunteer: SearchedVolunteer, before_tokens: int) -> None:
        """Check that a finished round counts, whichever folder its peer was started with.

        Checked only if a bootstrap was present to report what the peer had trained in later incarnations than that
        folder's.
        """
        if not volunteer.met_bootstrap:
            return
        counted = volunteer.accounting.contributions().get(volunteer.me, 0)
        if volunteer.folder.key not in self.liars and counted < before_tokens + RUN.round_tokens:
            detail = f"{counted} tokens of {volunteer.folder.key} count after a round, and {before_tokens} did before"
            self._break("what is trained counts", detail)

    def _judge_claims(self, judge: Process) -> None:
        """Check how many tokens of a liar the process `judge` counts, if the liar started after it.

        The limit is what all volunteers together can have trained since the liar started.
        """
        counts = judge.accounting.contributions()
        fastest_per_s = RUN.tokens_per_step * max(self.speeds.values())
        for name, came_s in self.liars.items():
            since_s = self.clock.now - came_s
            each = 4 * RUN.round_tokens + 4 * fastest_per_s * (since_s + RUN.network.archive_every_s)
            most = (len(self.volunteers) + 2) * each
            claimed = counts.get(identity_of(name).peer_id, 0)
            if judge.came_s < came_s and name != judge.folder.key and claimed > most:
                detail = f"{judge.folder.key} counts {claimed} of {name}, which came {since_s:.0f} s ago"
                self._break("claims are bounded", detail)

    def lie(self, name: str) -> None:
        """Start a liar. Lies about rosters are searched in the world "rounds"."""
        if self.in_rounds:
            self.come(name)
            return
        self.liars[name] = self.clock.now
        self.come(name, lies=True)

    def archived(self, bootstrap: Bootstrap) -> None:
        """Check that each archive counts at least the tokens of the one before."""
        before = bootstrap.folder.checkpoints[-2:-1]
        if before and bootstrap.progress.run_tokens < before[0].progress.run_tokens:
            detail = f"an archive of {before[0].progress.run_tokens} is followed by {bootstrap.progress.run_tokens}"
            self._break("a run's tokens never fall", detail)

    def begun(self, bootstrap: Bootstrap) -> None:
        """Check that a restarted bootstrap has not lost its counts, except for those of its last seconds.

        With an old folder it continues from the counts there. In synchronous rounds the roster behind its archive has
        the counts.
        """
        if self.in_rounds:
            return
        if bootstrap.folder is not self.counts_of:
            self.counts_of, self.counted = bootstrap.folder, []
        self.counted = [(at_s, total) for at_s, total in self.counted if at_s < self.ended_s - _SURE_S]
        least = max(
            [
                *(total for _, total in self.counted),
                *(kept.progress.run_tokens for kept in bootstrap.folder.checkpoints[-1:]),
            ],
            default=0,
        )
        if bootstrap.accounting.total < least:
            detail = f"the bootstrap counts {bootstrap.accounting.total}, and before it was started again {least}"
            self._break("a run's tokens never fall", detail)

    def look(self) -> None:
        """Check every second whether the work that a bootstrap acknowledged is in the archive, or which processes still
        have it."""
        self.clock.call_later(1.0, self.look)
        boot = self.processes.get("b")
        if not isinstance(boot, Bootstrap) or not boot.answers or boot.away:
            for owed in self.owed.values():
                owed.since_s = self.clock.now
            return
        self.ended_s = self.clock.now
        self._judge_claims(boot)
        self.counted.append((self.clock.now, boot.accounting.total))
        self._acknowledge(boot)
        archive = boot.behind.rounds
        for round, owed in list(self.owed.items()):
            if round in archive:
                del self.owed[round]
                continue
            if holders := {one.folder.key for one in self._holders(boot) if round in one.holds.rounds}:
                owed.holders = holders
                refuses = boot.archive.watch.refused_s is not None  # for a minute: then those who train are the run
                if self.clock.now > owed.since_s + _ARCHIVED_S * (2.5 if refuses else 1):
                    told = f"round {round[1]} of {round[0]}, which {sorted(holders)} have"
                    self._break("acknowledged work is archived", f"{told}, is in no archive after a minute")
                    del self.owed[round]
            elif any(one.alive and one.frozen for one in self.processes.values()):
                owed.since_s = self.clock.now
            else:
                self._nobody_has(round, owed)
                del self.owed[round]

    def _holders(self, boot: Bootstrap) -> list[Process]:
        """Return the processes from whose weights an archive can be made; with a server, the server alone."""
        return [boot] if isinstance(boot, Server) else [one for one in boot.neighbours() if not one.is_bootstrap]

    def _acknowledge(self, boot: Bootstrap) -> None:
        for peer, tokens in boot.accounting.acknowledged().items():
            if tokens <= self.acknowledged.get(peer, 0):
                continue
            self.acknowledged[peer] = tokens
            told = self.told.get(peer, {})
            for round in told.get(max((of for of in told if of <= tokens), default=0), frozenset()):
                self.owed.setdefault(round, _Owed(self.clock.now))

    def _nobody_has(self, round: Round, owed: _Owed) -> None:
        """Report an acknowledged round that no process has any more. It is excused if the peer that had it was
        killed."""
        for name in owed.holders:
            process = self.processes[name]
            if name not in self.left_alone or process.me in self.left_untaken or name in self.liars:
                continue
            boot, told = self.processes["b"], f"{name} left with round {round[1]} of {round[0]}"
            if boot.came_s + _SURE_S < process.asked_s:
                detail = f"{told}, which a bootstrap acknowledged, and it was there"
                self._break("nobody leaves with what nobody else has", detail)
            elif process.asked_s < boot.came_s < process.asked_s + _WAITS_S - _SURE_S:
                self._break("who has what nobody else has waits", f"{told}, and the bootstrap is back")

    def left(self, volunteer: SearchedVolunteer) -> None:
        """Check that a volunteer that leaves without a bootstrap's request to stay loses nothing.

        Two losses are allowed: with a server, rounds that were not uploaded; and the last round of a volunteer that
        leaves while others train.
        """
        self.left_alone.discard(volunteer.folder.key)
        boot = self.processes.get("b")
        just_killed = [  # it was heard of since the leaver asked, and nobody can know yet that it is gone
            one
            for one in self.processes.values()
            if not (one.is_bootstrap or one.alive or one.said_goodbye)
            and one.ended_s > self.clock.now - LOOK_EVERY_S
            and isinstance(boot, Bootstrap)
            and boot.membership.heard_s(one.me) > volunteer.asked_s
        ]
        if not just_killed and all(one.is_bootstrap for one in volunteer.neighbours()):
            self.left_alone.add(volunteer.folder.key)
        if not isinstance(boot, Bootstrap) or boot not in volunteer.neighbours() or volunteer.me in self.left_untaken:
            return
        if self.served or any(one.peer != volunteer.me for one in boot.membership.volunteers()):
            return
        if volunteer.membership.state(boot.me) is not PeerState.LIVE:
            return  # it has not seen yet that the bootstrap is back
        if lacks := volunteer.holds.rounds - boot.behind.rounds:
            detail = f"{volunteer.folder.key} left, and {len(lacks)} rounds of its weights are in no archive"
            self._break("nobody leaves with what nobody else has", detail)

    def _break(self, invariant: str, detail: str) -> None:
        """Record an invariant's first violation; later ones may only follow from it."""
        if all(one.invariant != invariant for one in self.broken):
            self.broken.append(Violation(invariant, f"at {self.clock.now:.1f} s {detail}"))


@dataclass
class _Owed:
    """Acknowledged round that is not in an archive yet, and the time since which it could be."""

    since_s: float
    holders: set[str] = field(default_factory=set)


def _rate(tokens: float) -> float:
    return learning_rate_at(_CONSTANTS, tokens / RUN.run.total_tokens)


# ---------------------------------------------------------------- play


def play_lives(schedule: FaultSchedule) -> Played:
    """Play the schedule, and return the violations."""
    world, before = _Lives(schedule), random.getstate()
    random.seed(schedule.seed)  # exchanges choose by it whom they ask
    try:
        world.bootstrap()
        for i, name in enumerate(schedule.names):
            world.clock.call_later(0.3 * i, world.come, name)
        for index, fault in enumerate(schedule.faults):
            _declare(world, fault, schedule.name(fault), index)
        world.clock.call_later(1.0, world.look)
        world.clock.run_until(schedule.faults_end_s(_LEAST_S) + _SURE_S)
        for process in world.living():
            process.thaw()
        world.bootstrap()
        world.clock.call_later(5.0, world.come, "z")
        world.clock.run_until(world.clock.now + _RECOVERY_S)
        counted = [(one.folder.key, one.progress.round, one.progress.run_tokens) for one in world.living()]
        found = [*world.broken, *_in_the_end(world)]
        return Played(found, f"{world.clock.num_events} events, {counted}")
    finally:
        random.setstate(before)
        world.close()


def _in_the_end(world: _Lives) -> Iterable[Violation]:
    if not any(isinstance(one, SearchedVolunteer) and one.progress.round for one in world.living()):
        yield Violation("the run goes on", "who came last trains nothing")


def _declare(world: _Lives, fault: ScheduledFault, name: str, index: int) -> None:
    at, politely, other = world.clock.call_later, not fault.detail & 1, bool(fault.detail & 2)
    at_s, end_s = fault.at_s, fault.end_s
    match fault.kind:
        case "leave" | "kill":
            at(at_s, world.goes, name, fault.kind == "leave")
        case "restart":
            at(at_s, world.goes, name, politely)
            at(end_s + 1, world.again, name)
        case "old folder" | "bootstrap old folder":
            who = name if fault.kind == "old folder" else "b"

            def put_aside() -> None:
                copies.append(world.folders[who].copy() if who in world.folders else Folder(who))

            copies: list[Folder] = []
            at(at_s, put_aside)
            at(end_s + 1, world.goes, who, politely)
            at(end_s + 4, lambda: world.again(who, copies[0]))
        case "lost folder":
            at(at_s, world.goes, name, politely)
            at(end_s + 1, world.come, f"n{index}")
        case "join":
            at(at_s, world.come, f"n{index}")
        case "liar joins":
            at(at_s, world.lie, f"l{index}")
            if fault.detail & 8:  # what it has is all that there is
                at(at_s + 4, world.all_go, f"l{index}")
            at(end_s + 8, world.goes, f"l{index}", politely)
        case "visits":
            for visit in range(1 + fault.detail % 4):
                begins_s = at_s + visit * 8
                at(begins_s, world.come, f"v{index}.{visit}")
                at(begins_s + 5 + fault.lasts_s / 20, world.goes, f"v{index}.{visit}", fault.detail < 8)
        case "freeze":
            at(at_s, lambda: world.processes[name].freeze() if name in world.processes else None)
            at(end_s, lambda: world.processes[name].thaw() if name in world.processes else None)
        case "bootstrap away" | "bootstrap crash" | "bootstrap moves":
            at(at_s, world.goes, "b", fault.kind != "bootstrap crash")
            at(end_s + 1, lambda: world.bootstrap(address=index + 1 if fault.kind == "bootstrap moves" else None))
        case "everybody":
            crashes = bool(fault.detail & 4)  # and comes back while they wait for it
            back_s = at_s + (8 if crashes else 14) + fault.lasts_s
            for i, one in enumerate(sorted(world.speeds)):
                at(at_s + (i * 0.7 if other else 0.0), world.goes, one, politely or i > 0)
            at(at_s - 2 if crashes else at_s + 12, world.goes, "b", not crashes)
            if not crashes:
                at(at_s + 13, world.all_go)
            at(back_s, world.bootstrap)
            at(back_s + 2 + 12 * crashes, world.come, f"n{index}")
            if fault.detail & 8:
                at(back_s + 16, world.come, name)
        case _:
            raise ValueError(f"no such fault: {fault.kind}")
