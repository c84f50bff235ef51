"""Measure the package's structure by reading its source, in seconds; nothing of it is imported or run.

    python benchmarks/structure.py                        # this checkout
    python benchmarks/structure.py --at 6d65395 --at HEAD # commits side by side, without a checkout of them
    python benchmarks/structure.py --list                 # also the places, of the last column
    python benchmarks/structure.py --json

docs/results/structure.md says what each row counts, and so does the function here that counts it. `PATHS`, `MARKERS`
and `METHODS_LIVE_IN` follow names: if the code they name is replaced, add its successor there; until then the row says
what it no longer finds.
"""

from __future__ import annotations

import argparse
import ast
import functools
import io
import json
import re
import subprocess
import sys
import tarfile
import tokenize
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, GENERATED = "swarmtrain/", "swarmtrain/v1/"
TESTS = "tests/"

METHODS = frozenset({"gossip", "diloco", "server", "batch"})
"""Values of `merge.method`."""
METHODS_LIVE_IN = ("swarmtrain/methods/", "swarmtrain/methods.py")
"""Files in which a method's own object may say its name."""
MERGES = frozenset({"Averaged", "Gathered", "Served", "Replaced"})
"""Types of a merge's result: to ask which one it is, is to ask for the method."""
PROTOCOL = ("swarmtrain/protocol/", "swarmtrain/membership/")
"""Folders of the decisions; the first that exists counts."""
MOVED = re.compile("^membership/")
"""Former name of the protocol's folder: the paths below have its present name."""
MOST_METHODS, MOST_FIELDS, MOST_LINES = 25, 10, 600

MARKERS = {
    "gossip": ["pulls:plan_pulls"],
    "synchronous rounds": ["rosters:decide"],
    "stages, microbatches": ["routing:Router.choose", "router:Router.choose"],
    "stages, moves": ["balance:my_change"],
}
"""Each protocol's deciding function, as `module:name`: whatever orchestrates the protocol must use it."""

PATHS = {
    "pseudo-gradient, gossip": """
        + algorithm/fragments.py Fragment.pick
        peer/training/replica.py Replica.contribution | peer/replica.py Replica.contribution | peer/trainer.py Trainer.contribution
        + protocol/gossip/fragments.py FragmentRounds.at | protocol/fragments.py FragmentRounds.at
        peer/training/session.py Session._publish | peer/session.py Session._publish | peer/trainer.py Trainer._publish
        peer/merging/gossip_exchange.py GossipExchange.publish | peer/gossip_exchange.py GossipExchange.publish
        network/asynchronous/publications.py OwnPublication | network/publications.py Publication
        + network/service.py service_type.PeerService.rpc_publication
        + network/swarm.py Swarm.publication | network/answers.py SwarmAnswers.publication
        network/asynchronous/publications.py Publisher.held_after | network/publications.py Publisher.held_after
        network/tasks.py SingleFlight.made | network/tasks.py Making.made
        network/asynchronous/publications.py Publisher._build | network/publications.py Publisher._build
        peer/merging/gossip_exchange.py GossipExchange._encode_gradient | peer/gossip_exchange.py GossipExchange._encode_gradient
        peer/merging/updates.py LentWeights.gradient | peer/updates.py LentWeights.gradient | peer/trainer.py LentWeights.gradient | peer/trainer.py Contribution.gradient_of
        network/codec.py GradientCodec.encode_sum
        algorithm/quantize.py ErrorFeedback.encode
        algorithm/quantize.py encode
        network/snapshots/store.py Body | network/snapshots.py Body
        network/snapshots/store.py build_snapshot | network/snapshots.py build_snapshot
        + network/signatures.py sign | network/signing.py sign
        + network/identity.py Identity.sign
        network/snapshots/store.py SnapshotStore.add | network/snapshots.py SnapshotStore.add
        + network/asynchronous/puller.py Puller._reply_untrusted | network/gossiping.py Gossip._ask | network/puller.py Puller._reply_untrusted
        + network/asynchronous/publications.py publication_untrusted | network/publications.py publication_untrusted
        + network/signatures.py open_signed_untrusted | network/signing.py open_signed_untrusted
        + network/identity.py verify_untrusted
        + protocol/gossip/partners.py Ledger.news | protocol/partners.py Ledger.news
        network/snapshots/store.py SnapshotStore.serve | network/snapshots.py SnapshotStore.serve
        network/service.py service_type.PeerService.pull_replies
        network/snapshots/replies.py answer | network/replies.py answer
        network/node.py Node.open_stream
        network/service.py PeerCalls.open_pull
        network/node.py Stream.take
        network/snapshots/store.py pull_run | network/snapshots/store.py _pull_run | network/snapshots.py _pull_run
        network/snapshots/store.py pull_chunks | network/snapshots.py pull_chunks
        network/snapshots/download.py download_snapshot | network/bringing.py bring
        network/asynchronous/puller.py Puller.download | network/gossiping.py Gossip._bring | network/puller.py Puller.download
        peer/merging/gossip_runner.py GossipRunner._decoded | network/gossiping.py Gossip._pull_from | peer/gossip_driver.py GossipDriver._decoded
        peer/merging/gossip_exchange.py GossipExchange.decode_untrusted | peer/gossip_exchange.py GossipExchange._decode_gradient_untrusted | GossipExchange.decode_untrusted
        network/codec.py PublicationCodec.arrival_untrusted | PublicationCodec.gradient_untrusted
        network/codec.py PublicationCodec.gradient_untrusted
        network/codec.py VectorCodec.decode_untrusted
        algorithm/quantize.py decode
        algorithm/gossip.py PartnerUpdate | algorithm/gossip.py Arrival
        peer/merging/gossip_exchange.py GossipExchange._accept_untrusted | peer/gossip_exchange.py GossipExchange._accept_untrusted
        peer/merging/robustness.py Robustness.accept | peer/robustness.py Robustness.accept
        algorithm/robust.py GradientClip.clip
        peer/merging/gossip_exchange.py GossipExchange._kept_untrusted | peer/gossip_exchange.py GossipExchange._kept_untrusted | GossipExchange._decode_gradient_untrusted
        protocol/gossip/messages.py ReceivedPublication | network/lanes.py Pulled | protocol/gossip_messages.py Pulled
        peer/merging/gossip_runner.py GossipRunner._prepared | network/gossiping.py Gossip._try_to_prepare | peer/gossip_driver.py GossipDriver._prepared
        peer/merging/gossip_exchange.py GossipExchange.prepare | peer/gossip_exchange.py GossipExchange._prepare | GossipExchange.prepare
        + protocol/gossip/pulls.py ahead_rounds | protocol/pulls.py ahead_rounds
        algorithm/gossip.py prepare
        protocol/gossip/messages.py MergeFragment | network/lanes.py Ready | protocol/gossip_messages.py Merge
        peer/merging/gossip_runner.py GossipRunner.merge_due | network/gossiping.py Gossip.take | peer/gossip_driver.py GossipDriver.merge_due
        peer/merging/gossip_exchange.py GossipExchange.collect | peer/gossip_exchange.py GossipExchange.collect
        peer/merging/updates.py Gathered | peer/updates.py Gathered | peer/trainer.py Gathered
        peer/merging/updates.py OuterUpdate | peer/updates.py OuterUpdate | peer/trainer.py OuterUpdate | peer/trainer.py Gathered
        peer/training/session.py Session._merge | peer/session.py Session._merge | peer/trainer.py Trainer.merge
        peer/training/replica.py Replica.merge | peer/replica.py Replica.merge | peer/trainer.py Trainer.merge
        peer/merging/updates.py Gathered.next_state | peer/updates.py Gathered.next_state | peer/trainer.py Trainer._merge_gathered | peer/trainer.py Gathered.next_state
        algorithm/gossip.py gossip_merge
        algorithm/outer.py outer_step
    """,  # noqa: E501 - a step and its successors are one line
    "pseudo-gradient, synchronous rounds": """
        peer/training/replica.py Replica.contribution | peer/replica.py Replica.contribution | peer/trainer.py Trainer.contribution
        peer/training/session.py Session._publish | peer/session.py Session._publish | peer/trainer.py Trainer._publish
        peer/merging/roster_exchange.py RosterExchange.publish | peer/exchange.py RosterExchange.publish
        network/codec.py body_of
        network/snapshots/store.py Body | network/snapshots.py Body
        network/snapshots/store.py build_snapshot | network/snapshots.py build_snapshot
        + network/signatures.py sign | network/signing.py sign
        + network/identity.py Identity.sign
        network/rounds/runner.py RoundRunner.finish | network/rounds.py Rounds.finish
        network/snapshots/store.py SnapshotStore.add | network/snapshots.py SnapshotStore.add
        + network/service.py service_type.PeerService.rpc_round
        + network/rounds/questions.py RoundQuestions.read_untrusted | network/rounds.py Rounds._read_untrusted | network/rounds.py Rounds._reply_untrusted | network/round_questions.py RoundQuestions.read_untrusted
        + network/rounds/roster.py check_publication | network/roster.py check_publication
        + network/signatures.py open_signed_untrusted | network/signing.py open_signed_untrusted
        + network/identity.py verify_untrusted
        + protocol/rounds/rosters.py decide | protocol/rosters.py decide
        + network/rounds/roster.py sign_roster | network/roster.py sign_roster
        network/snapshots/store.py SnapshotStore.serve | network/snapshots.py SnapshotStore.serve
        network/service.py service_type.PeerService.pull_replies
        network/snapshots/replies.py answer | network/replies.py answer
        network/node.py Node.open_stream
        network/service.py PeerCalls.open_pull
        network/node.py Stream.take
        network/snapshots/store.py pull_run | network/snapshots/store.py _pull_run | network/snapshots.py _pull_run
        network/snapshots/store.py pull_chunks | network/snapshots.py pull_chunks
        network/rounds/downloads.py Downloads.pull | network/merging.py Merger.pull | network/downloads.py Downloads.pull
        network/rounds/merger.py Merger.average_range | network/merging.py Merger._average_range | network/merging.py Merger.average_range
        network/codec.py average_bytes_untrusted
        algorithm/outer.py weighted_mean
        network/rounds/merger.py Merger.merge | network/merging.py Merger.merge
        network/rounds/round_end.py EndedRound._merge | network/rounds.py Rounds._merge | network/round_end.py EndedRound._merge
        network/rounds/round_end.py RosterMean | network/round_state.py Merged | network/rounds.py Merged | network/round_end.py Merged
        network/rounds/runner.py RoundRunner._do | network/rounds.py Rounds._step | network/rounds.py Rounds._do
        network/rounds/runner.py RoundRunner.finish | network/rounds.py Rounds.finish
        peer/merging/roster_exchange.py RosterExchange.collect | peer/exchange.py RosterExchange.collect
        peer/merging/updates.py Averaged | peer/updates.py Averaged | peer/trainer.py Averaged
        peer/merging/updates.py OuterUpdate | peer/updates.py OuterUpdate | peer/trainer.py OuterUpdate | peer/trainer.py Averaged
        peer/training/session.py Session._merge | peer/session.py Session._merge | peer/trainer.py Trainer.merge
        peer/training/replica.py Replica.merge | peer/replica.py Replica.merge | peer/trainer.py Trainer.merge
        peer/merging/updates.py Averaged.next_state | peer/updates.py Averaged.next_state | peer/trainer.py Averaged.next_state | peer/trainer.py Trainer.merge
        algorithm/outer.py outer_step
    """,  # noqa: E501 - a step and its successors are one line
    "activations, pipeline": """
        peer/pipeline/microbatch_source.py MicrobatchSource.next_microbatch | peer/microbatches.py MicrobatchSource.next_microbatch
        peer/pipeline/scheduler.py MicrobatchScheduler._keep_drawing | peer/driving.py Driving._keep_drawing | Driving._keep_driving
        peer/pipeline/scheduler.py MicrobatchScheduler._drive | peer/driving.py Driving._drive
        peer/pipeline/driver.py Driver.drive | peer/driver.py Driver.drive
        + protocol/pipeline/driver.py DriverEngine.receive | protocol/driving.py DrivingEngine.receive | peer/driver.py Driver._there
        peer/pipeline/driver.py Driver._ask | peer/driver.py Driver._ask
        peer/pipeline/stage_service.py WireCalls.forward | peer/stage_service.py WireCalls.forward
        peer/pipeline/stage_service.py WireCalls._own | peer/stage_service.py WireCalls._own
        peer/pipeline/request_queue.py StageRequestQueue.ask | peer/stage_desk.py StageDesk.ask
        + protocol/pipeline/ledger.py StageLedger.ask | protocol/microbatches.py StageLedger.ask
        peer/pipeline/request_queue.py StageRequestQueue.next | peer/stage_desk.py StageDesk.next
        peer/pipeline/stage_loop.py StageLoop.step | peer/stage_loop.py StageLoop.step
        peer/pipeline/stage_loop.py StageLoop._compute | peer/stage_loop.py StageLoop._compute
        model/stage_work.py StageWork.forward
        model/stages.py Stage.forward
        peer/pipeline/request_queue.py StageRequestQueue.done | peer/stage_desk.py StageDesk.done
        peer/pipeline/driver.py Driver._ask | peer/driver.py Driver._ask
        + protocol/pipeline/router.py Router.choose | protocol/routing.py Router.choose
        peer/pipeline/stage_service.py WireCalls._activations | peer/stage_service.py WireCalls._activations
        peer/pipeline/stage_service.py WireCalls._encoded | peer/stage_service.py WireCalls._encoded
        network/codec.py ActivationCodec.encode
        algorithm/quantize.py encode
        peer/pipeline/stage_service.py WireCalls._ask | peer/stage_service.py WireCalls._ask
        network/stage_calls.py StageClient.ask
        network/stage_calls.py _send
        network/node.py Node.open_pipe
        network/node.py Node.serve_pipes
        network/stage_calls.py StageHost._serve
        network/stage_calls.py _body_untrusted
        peer/pipeline/stage_service.py StageServer.answer_untrusted | peer/stage_service.py StageServer.answer_untrusted
        network/codec.py ActivationCodec.decode_untrusted
        algorithm/quantize.py decode
        peer/pipeline/request_queue.py StageRequestQueue.ask | peer/stage_desk.py StageDesk.ask
        + protocol/pipeline/ledger.py StageLedger.ask | protocol/microbatches.py StageLedger.ask
        peer/pipeline/request_queue.py StageRequestQueue.next | peer/stage_desk.py StageDesk.next
        peer/pipeline/stage_loop.py StageLoop.step | peer/stage_loop.py StageLoop.step
        peer/pipeline/stage_loop.py StageLoop._compute | peer/stage_loop.py StageLoop._compute
        model/stage_work.py StageWork.tail
        model/stages.py Stage.loss
    """,  # noqa: E501 - a step and its successors are one line
}
"""Functions that a payload is passed to, and types that hold it, in the order in which it passes them.

Functions that a call returns to are left out, unless they pass it to a function that is not listed. A `+` marks steps
of what accompanies the payload: its manifest, signature and place. `A | B` is the first that exists, `B` with its file
if that differs. A missing step shows: its neighbours are no longer joined by a name."""


# ---------------------------------------------------------------- the source


@dataclass(frozen=True)
class Module:
    """Source file."""

    path: str
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        """Syntax tree."""
        return ast.parse(self.text, self.path)

    @functools.cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the syntax tree."""
        return list(ast.walk(self.tree))

    @property
    def name(self) -> str:
        """Module name, as it is imported."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def folder(self) -> str:
        """Folder within the package, such as "peer"; "" at its top."""
        parts = self.path.split("/")
        return parts[1] if len(parts) > 2 else ""

    @functools.cached_property
    def definitions(self) -> dict[str, ast.AST]:
        """Functions and classes by qualified name, nested ones too."""
        found: dict[str, ast.AST] = {}

        def look(node: ast.AST, before: str) -> None:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    found.setdefault(before + child.name, child)
                    look(child, f"{before}{child.name}.")
                else:
                    look(child, before)

        look(self.tree, "")
        return found

    @functools.cached_property
    def imported(self) -> dict[str, tuple[str, str]]:
        """Imports by local name: (module, name there; "" for the module itself)."""
        found = {}
        for node in self.nodes:
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    found[alias.asname or alias.name] = node.module, alias.name
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    found[alias.asname or alias.name.split(".")[0]] = alias.name, ""
        return found


@dataclass(frozen=True)
class Place:
    """Place of a finding."""

    where: str
    what: str

    def order(self) -> tuple[str, int]:
        """Sort key: file and line."""
        path, _, line = self.where.partition(":")
        return path, int(line or 0)

    def __str__(self) -> str:
        return f"{self.where}  {self.what}"


def place(module: Module, node: ast.AST, what: str = "") -> Place:
    """Return the place of a node, with its source unless `what` is given."""
    text = what or " ".join((ast.get_source_segment(module.text, node) or "").split())
    return Place(f"{module.path}:{getattr(node, 'lineno', 0)}", text[:110])


def is_counted(path: str) -> bool:
    """Return whether a file is the package's own, or a test."""
    return path.startswith((PACKAGE, TESTS)) and path.endswith(".py") and not path.startswith(GENERATED)


def of_folder(root: Path, folder: str = PACKAGE) -> list[Module]:
    """Read the source of a folder of a checkout."""
    paths = sorted(path.relative_to(root).as_posix() for path in (root / folder).rglob("*.py"))
    return [Module(path, (root / path).read_text(encoding="utf-8")) for path in paths if is_counted(path)]


def of_commit(root: Path, commit: str, folder: str = PACKAGE) -> list[Module]:
    """Read the source of a folder of a commit."""
    done = subprocess.run(["git", "-C", root, "archive", commit, folder], capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"structure.py: {commit} cannot be read: {done.stderr.decode().strip()}")
    modules = []
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        for member in archive:
            if is_counted(member.name) and (data := archive.extractfile(member)) is not None:
                modules.append(Module(member.name, data.read().decode()))
    return sorted(modules, key=lambda module: module.path)


# ---------------------------------------------------------------- lines


def num_lines(module: Module) -> int:
    """Count lines as `wc -l` does."""
    return module.text.count("\n")


def num_code_lines(module: Module) -> int:
    """Count lines without blank lines and comments; docstrings count."""
    passed = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type not in passed:
            lines.update(range(token.start[0], token.end[0] + 1))
    rows = module.text.splitlines()
    return sum(bool(rows[line - 1].strip()) for line in lines)


# ---------------------------------------------------------------- data paths


@dataclass(frozen=True)
class Step:
    """Function or type on a path."""

    file: str
    name: str
    is_payload: bool = True
    """True if it passes the payload itself, not only what accompanies it."""

    @property
    def short(self) -> str:
        """Name by which other code refers to it."""
        return self.name.split(".")[-1]

    def __str__(self) -> str:
        return f"{self.file} {self.name}"


@dataclass
class Trip:
    """Way of a payload through the code."""

    steps: list[Step] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Names of the path that the code does not have."""
    gaps: list[str] = field(default_factory=list)
    """Steps of the payload not joined by a name in the code: a callable in a field, a queue, the wire."""

    @property
    def files(self) -> list[str]:
        """Files in the order in which the payload reaches them."""
        return list(dict.fromkeys(step.file for step in self.steps))

    @property
    def payload_files(self) -> list[str]:
        """Files that the payload itself reaches."""
        return list(dict.fromkeys(step.file for step in self.steps if step.is_payload))

    @property
    def crossings(self) -> list[tuple[str, str]]:
        """Crossings of the payload from `network/` to `peer/` or back, as (destination, step to step).

        Steps in other folders are skipped.
        """
        steps = [step for step in self.steps if step.is_payload and step.file.split("/")[0] in ("peer", "network")]
        sides = [step.file.split("/")[0] for step in steps]
        return [
            (sides[index], f"{steps[index - 1]} -> {steps[index]}")
            for index in range(1, len(steps))
            if sides[index] != sides[index - 1]
        ]


def names_in(node: ast.AST) -> set[str]:
    """Return all names and attributes used inside a node."""
    found = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    return found | {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}


def follow(modules: Sequence[Module], path: str) -> Trip:
    """Follow a path of `PATHS` through the source.

    Two steps of the payload are joined if one names the other, or if an earlier step names both.
    """
    by_path = {module.path.removeprefix(PACKAGE): module for module in modules}
    by_path |= {MOVED.sub("protocol/", file): module for file, module in by_path.items()}
    trip, passed = Trip(), list[tuple[Step, set[str]]]()
    for line in filter(None, map(str.strip, path.splitlines())):
        is_payload = not line.startswith("+ ")
        file, choices = line.removeprefix("+ ").split(" ", 1)
        options = [choice.split(" ") if " " in choice else [file, choice] for choice in choices.split(" | ")]
        known = [(file, name) for file, name in options if file in by_path and name in by_path[file].definitions]
        if not known:
            trip.lost.append(line)
            continue
        step = Step(*known[0], is_payload)
        trip.steps.append(step)
        if not is_payload:
            continue
        names = names_in(by_path[step.file].definitions[step.name])
        if passed:
            before, its_names = passed[-1]
            through = any({before.short, step.short} <= each for _, each in passed)
            if not (step.short in its_names or before.short in names or through or before.short == step.short):
                trip.gaps.append(f"{before} -> {step}")
        passed.append((step, names))
    return trip


# ---------------------------------------------------------------- who orchestrates


def orchestrators(modules: Sequence[Module], markers: Sequence[str]) -> list[Place] | None:
    """Find classes and top-level functions that use a protocol's deciding function; None if no such function exists."""
    found, is_there = [], False
    for marker in markers:
        home, name = marker.split(":")
        name, _, method = name.partition(".")
        for module in modules:
            is_home = module.name.split(".")[-1] == home
            is_there |= is_home and name in module.definitions
            local = {
                mine for mine, (of, what) in module.imported.items() if of.split(".")[-1] == home and what == name
            } | ({name} if is_home else set())
            if not local:
                continue
            for node in module.tree.body:
                if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                if is_home and (node.name == name or not isinstance(node, ast.ClassDef)):
                    continue  # the rule itself and its helpers
                if method:
                    uses = any(
                        isinstance(each, ast.Call) and isinstance(each.func, ast.Attribute) and each.func.attr == method
                        for each in ast.walk(node)
                    )
                else:
                    uses = any(
                        isinstance(each, ast.Name) and each.id in local and isinstance(each.ctx, ast.Load)
                        for each in ast.walk(node)
                    )
                if uses:
                    found.append(place(module, node, node.name))
    return list(dict.fromkeys(found)) if is_there else None


# ---------------------------------------------------------------- who asks for the method


def method_constants(module: Module) -> set[str]:
    """Return names of the module's constants that hold methods' names: `_SERVER = ("server",)`."""
    return {
        target.id
        for node in module.tree.body
        if isinstance(node, ast.Assign) and says_method(node.value, set())
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def says_method(node: ast.AST, constants: set[str]) -> bool:
    """Return whether an expression is one or several methods' names."""
    if isinstance(node, ast.Constant):
        return node.value in METHODS if isinstance(node.value, str) else False
    if isinstance(node, ast.Name):
        return node.id in constants
    if isinstance(node, ast.BinOp):
        return says_method(node.left, constants) and says_method(node.right, constants)
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return bool(node.elts) and all(says_method(each, constants) for each in node.elts)
    return False


def is_method_value(node: ast.AST) -> bool:
    """Return whether an expression holds a method's name, judged by its own name: `run.merge.method`, `method`."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name == "method" or name.endswith("_method")


def is_comparison(node: ast.AST, constants: set[str]) -> bool:
    """Match `merge.method == "gossip"` and `method in ("diloco", "server")`."""
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    return any(map(is_method_value, sides)) and any(says_method(side, constants) for side in sides)


def is_table(node: ast.AST, constants: set[str]) -> bool:
    """Match a dict keyed by several methods, or that maps several keys to methods."""
    if not isinstance(node, ast.Dict):
        return False

    def of_key(key: ast.AST | None) -> bool:
        if isinstance(key, ast.Tuple) and key.elts:  # ("method", "diloco")
            key = key.elts[-1]
        return key is not None and says_method(key, constants)

    lists = [value for value in node.values if not isinstance(value, ast.Constant) and says_method(value, constants)]
    return sum(map(of_key, node.keys)) >= 2 or len(lists) >= 2


def asks_for_type(node: ast.AST, types: frozenset[str]) -> bool:
    """Match `isinstance(arrived, Averaged)`."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"):
        return False
    return len(node.args) == 2 and bool(names_in(node.args[1]) & types)


@dataclass
class MethodUse:
    """Places outside a method's own object that ask which method it is."""

    comparisons: list[Place] = field(default_factory=list)
    """Comparisons with a string."""
    tables: list[Place] = field(default_factory=list)
    """Tables keyed by its name."""
    flags: list[Place] = field(default_factory=list)
    """Reads of a property that is such a comparison: `swarm.asynchronous`."""
    types: list[Place] = field(default_factory=list)
    """Checks of the type of a merge's result."""


def method_use(modules: Sequence[Module]) -> MethodUse:
    """Find all uses of each kind."""
    found, flags = MethodUse(), set[str]()
    outside = [module for module in modules if not module.path.startswith(METHODS_LIVE_IN)]
    for module in outside:
        constants = method_constants(module)
        for node in module.nodes:
            if is_comparison(node, constants):
                found.comparisons.append(place(module, node))
            elif isinstance(node, ast.Match) and is_method_value(node.subject):
                for case in node.cases:
                    values = [each.value for each in ast.walk(case.pattern) if isinstance(each, ast.MatchValue)]
                    if any(says_method(value, constants) for value in values):
                        found.comparisons.append(place(module, case.pattern))
            elif is_table(node, constants):
                found.tables.append(place(module, node))
            elif isinstance(node, ast.FunctionDef) and any(
                isinstance(of, ast.Name) and of.id == "property" for of in node.decorator_list
            ):
                returned = [each.value for each in ast.walk(node) if isinstance(each, ast.Return)]
                if any(value is not None and is_comparison(value, constants) for value in returned):
                    flags.add(node.name)
            elif asks_for_type(node, MERGES):
                found.types.append(place(module, node))
    for module in outside:
        found.flags += [
            place(module, node)
            for node in module.nodes
            if isinstance(node, ast.Attribute) and node.attr in flags and isinstance(node.ctx, ast.Load)
        ]
    return found


# ---------------------------------------------------------------- cycles


def imports_of(module: Module, known: set[str]) -> Iterator[tuple[str, str]]:
    """Yield (module, "running" or "type") of each import of ours. An import inside a function runs too, only later."""

    def look(node: ast.AST, kind: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in names_in(child.test):
                for inner in child.body:
                    yield from look(ast.Module([inner], []), "type")
                for inner in child.orelse:
                    yield from look(ast.Module([inner], []), kind)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    inside = (
                        module.name.split(".") if module.path.endswith("/__init__.py") else module.name.split(".")[:-1]
                    )
                    up = inside[: len(inside) - child.level + 1]
                    base = ".".join([*up, *([base] if base else [])])
                for alias in child.names:
                    whole = f"{base}.{alias.name}"
                    if whole in known or base in known:
                        yield (whole if whole in known else base), kind
            elif isinstance(child, ast.Import):
                yield from ((alias.name, kind) for alias in child.names if alias.name in known)
            else:
                yield from look(child, kind)

    yield from look(module.tree, "running")


def circles(arrows: Mapping[str, Iterable[str]]) -> list[tuple[str, ...]]:
    """Find sets of modules that reach each other (Tarjan's strongly connected components of more than one)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for other in sorted(set(arrows.get(node, ()))):
            if other not in order:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], order[other])
        if lowest[node] == order[node]:
            circle = []
            while not circle or circle[-1] != node:
                circle.append(stack.pop())
            if len(circle) > 1:
                found.append(tuple(sorted(circle)))

    for node in sorted(arrows):
        if node not in order:
            visit(node)
    return sorted(found)


def cycles(modules: Sequence[Module]) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]], list[Place]]:
    """Find import cycles: (of running imports, closed only by imports for types, pairs of the latter)."""
    known = {module.name for module in modules}
    running: dict[str, set[str]] = defaultdict(set)
    both: dict[str, set[str]] = defaultdict(set)
    typed = []
    for module in modules:
        for target, kind in imports_of(module, known):
            if target == module.name:
                continue
            both[module.name].add(target)
            if kind == "running":
                running[module.name].add(target)
            else:
                typed.append((module, target))
    run_circles = circles(running)
    type_circles = [circle for circle in circles(both) if circle not in run_circles]
    inside = {name: circle for circle in type_circles for name in circle}
    closing = [
        Place(module.path, f"imports {target} for its types")
        for module, target in dict.fromkeys(typed)
        if target in inside.get(module.name, ())
    ]
    return run_circles, type_circles, closing


# ---------------------------------------------------------------- classes


@dataclass
class Class:
    """Class, as its source says."""

    module: Module
    node: ast.ClassDef

    @property
    def name(self) -> str:
        """Name of the class."""
        return self.node.name

    @property
    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Functions in its body: methods, properties, `__init__`; a property with a setter counts twice."""
        return [each for each in self.node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]

    @property
    def fields(self) -> list[ast.AnnAssign]:
        """Annotated names in its body."""
        return [
            each for each in self.node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        ]

    def dataclass_call(self) -> ast.expr | None:
        """Decorator that makes it a dataclass; None without one."""
        return next((each for each in self.node.decorator_list if "dataclass" in names_in(each)), None)


class Classes:
    """All classes of the package."""

    def __init__(self, modules: Sequence[Module]) -> None:
        self.modules = modules
        self.all = [
            Class(module, node) for module in modules for node in module.nodes if isinstance(node, ast.ClassDef)
        ]
        self.by_place = {(each.module.name, each.name): each for each in self.all}
        self.by_name: dict[str, list[Class]] = defaultdict(list)
        for each in self.all:
            self.by_name[each.name].append(each)

    def find(self, module: Module, name: str) -> Class | None:
        """Find the class that `name` means in a module; None if it is not ours."""
        if (module.name, name) in self.by_place:
            return self.by_place[module.name, name]
        return self.by_place.get(module.imported.get(name, ("", "")))

    def bases(self, one: Class) -> list[Class]:
        """Return its bases among our classes, the nearest first."""
        found: list[Class] = []
        for base in one.node.bases:
            of = base.value if isinstance(base, ast.Subscript) else base
            known = self.find(one.module, of.id) if isinstance(of, ast.Name) else None
            if known is not None and known is not one:
                found += [known, *self.bases(known)]
        return found

    def base_names(self, one: Class) -> set[str]:
        """Return the names of all its bases, including those of other packages."""
        return {name for each in [one, *self.bases(one)] for base in each.node.bases for name in names_in(base)}

    def is_record(self, one: Class) -> bool:
        """Return whether it is a record: a frozen dataclass, a NamedTuple, a pydantic model, or without methods."""
        call = one.dataclass_call()
        frozen = isinstance(call, ast.Call) and any(
            key.arg == "frozen" and isinstance(key.value, ast.Constant) and key.value.value is True
            for key in call.keywords
        )
        return frozen or not one.functions or bool(self.base_names(one) & {"NamedTuple", "BaseModel", "TypedDict"})

    def constructor_fields(self, one: Class) -> int:
        """Count what its constructor takes: parameters of `__init__`, or fields of a dataclass with inherited ones."""
        for each in [one, *self.bases(one)]:
            init = next((of for of in each.functions if of.name == "__init__"), None)
            if init is not None:
                return len([*init.args.posonlyargs, *init.args.args, *init.args.kwonlyargs]) - 1
            if each.dataclass_call() is not None:
                break
        if one.dataclass_call() is None and not any(each.dataclass_call() for each in self.bases(one)):
            return 0
        names: dict[str, bool] = {}
        for each in reversed([one, *self.bases(one)]):
            for of in each.fields:
                assert isinstance(of.target, ast.Name)
                no_init = isinstance(of.value, ast.Call) and any(
                    key.arg == "init" and isinstance(key.value, ast.Constant) and key.value.value is False
                    for key in of.value.keywords
                )
                names[of.target.id] = not no_init and "ClassVar" not in names_in(of.annotation)
        return sum(names.values())

    def large(self) -> tuple[list[tuple[Class, int, int]], list[tuple[Class, int, int]]]:
        """Find classes over a limit, with their methods and constructor fields: (behaviour, records)."""
        counted = [(each, len(each.functions), self.constructor_fields(each)) for each in self.all]
        over = [one for one in counted if one[1] > MOST_METHODS or one[2] > MOST_FIELDS]
        over.sort(key=lambda one: (-one[1], -one[2], one[0].name))
        return [one for one in over if not self.is_record(one[0])], [one for one in over if self.is_record(one[0])]

    def twice(self) -> dict[str, list[str]]:
        """Find public names of top-level classes that occur in more than one module."""
        found: dict[str, list[str]] = defaultdict(list)
        for module in self.modules:
            for node in module.tree.body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found[node.name].append(module.path)
        return {name: paths for name, paths in sorted(found.items()) if len(paths) > 1}


def anys(modules: Iterable[Module]) -> list[Place]:
    """Find each use of typing's `Any`, imports excluded."""
    return [
        place(module, node, "Any")
        for module in modules
        for node in module.nodes
        if (isinstance(node, ast.Name) and node.id == "Any") or (isinstance(node, ast.Attribute) and node.attr == "Any")
    ]


# ---------------------------------------------------------------- what is set from outside


@dataclass(frozen=True)
class Declared:
    """Attribute of a class: its annotation, or else the value that it is set to."""

    owner: Class
    annotation: ast.expr | None
    value: ast.expr | None = None


class Types:
    """Type guesses from annotations and constructors: a class of ours, "other", or None."""

    def __init__(self, classes: Classes) -> None:
        self.classes = classes
        self.declared: dict[str, list[Declared]] = defaultdict(list)
        """Declarations by attribute."""
        self.returns: dict[str, list[tuple[Module, ast.expr | None]]] = defaultdict(list)
        """Return annotations by function."""
        for one in classes.all:
            for of in one.fields:
                assert isinstance(of.target, ast.Name)
                self.declared[of.target.id].append(Declared(one, of.annotation))
            for function in one.functions:
                arguments = {each.arg: each.annotation for each in arguments_of(function)}
                if any("setter" in names_in(each) for each in function.decorator_list):
                    self.declared[function.name].append(Declared(one, None))
                for node in ast.walk(function):
                    for target, value in targets_of(node):
                        if is_self(target.value):
                            annotation = node.annotation if isinstance(node, ast.AnnAssign) else None
                            if isinstance(value, ast.Name):
                                annotation = annotation or arguments.get(value.id)
                            self.declared[target.attr].append(Declared(one, annotation, value))
        for module in classes.modules:
            for name, node in module.definitions.items():
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    self.returns[name.split(".")[-1]].append((module, node.returns))

    def of_annotation(self, module: Module, annotation: ast.expr | None) -> Class | str | None:
        """Return the type that an annotation names."""
        if annotation is None:
            return None
        found = [self.classes.find(module, name) for name in sorted(names_in(annotation))]
        ours = [each for each in found if each is not None]
        if ours and not isinstance(annotation, ast.Subscript):
            return ours[0]
        return None if ours or "Any" in names_in(annotation) else "other"

    def of(self, module: Module, node: ast.expr, inside: ast.ClassDef | None, local: Mapping[str, Any]) -> Any:
        """Guess the type of an expression."""
        if isinstance(node, ast.Name):
            if node.id in local:
                return local[node.id]
            known = module.imported.get(node.id)
            return "other" if known and self.classes.find(module, node.id) is None else None
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if isinstance(node.func, ast.Name) and (one := self.classes.find(module, name)) is not None:
                return one
            called = node.func.value if isinstance(node.func, ast.Attribute) else None
            if isinstance(called, ast.Name) and self.of(module, called, inside, local) == "other":
                return "other"  # pb.PublicationReply(…), torch.empty(…)
            answers = {self._key(self.of_annotation(*each)): self.of_annotation(*each) for each in self.returns[name]}
            return next(iter(answers.values())) if len(answers) == 1 else None
        if isinstance(node, ast.Attribute):
            owner = self.of(module, node.value, inside, local)
            if is_self(node.value) and inside is not None:
                owner = self.classes.by_place.get((module.name, inside.name))
            if owner == "other":
                return "other"
            answers = {}
            for each in self.options(owner, node.attr):
                of = self.of_annotation(each.owner.module, each.annotation)
                if each.annotation is None and isinstance(each.value, ast.Call):
                    of = self.of(each.owner.module, each.value, None, {})
                if each.annotation is not None or of is not None:
                    answers[self._key(of)] = of
            return next(iter(answers.values())) if len(answers) == 1 else None
        return None

    def options(self, owner: Class | str | None, attribute: str) -> list[Declared]:
        """Return the declarations that an attribute of `owner` may mean."""
        options = self.declared.get(attribute, [])
        if isinstance(owner, Class):
            family = [owner, *self.classes.bases(owner)]
            return [each for each in options if each.owner in family]
        return options

    @staticmethod
    def _key(of: Class | str | None) -> Any:
        return (of.module.name, of.name) if isinstance(of, Class) else of


def is_self(node: ast.AST) -> bool:
    """Match `self` and `cls`."""
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def arguments_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """Return all arguments but `*args` and `**kwargs`."""
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def targets_of(node: ast.AST) -> Iterator[tuple[ast.Attribute, ast.expr | None]]:
    """Yield the attributes that a statement assigns, each with its own value, if it has one."""
    if isinstance(node, ast.Assign):
        pairs = [(target, node.value) for target in node.targets]
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        pairs = [(node.target, node.value)] if node.value is not None else []
    else:
        return
    for target, value in pairs:
        if isinstance(target, ast.Tuple):
            values = value.elts if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts) else None
            for index, each in enumerate(target.elts):
                if isinstance(each, ast.Attribute):
                    yield each, values[index] if values else None
        elif isinstance(target, ast.Attribute):
            yield target, value


@dataclass
class FromOutside:
    """Assignments `other.attribute = …` where `other` is not `self` and is an object of ours."""

    near: list[Place] = field(default_factory=list)
    """Assignments to objects whose class is in the same module."""
    far: list[Place] = field(default_factory=list)
    """Assignments to objects whose class is in another module."""
    wiring: list[Place] = field(default_factory=list)
    """Assignments among these of a collaborator or a callable."""


def set_from_outside(modules: Sequence[Module], classes: Classes) -> FromOutside:
    """Find all such assignments.

    `other` counts as ours if annotations or a constructor say so, or if they say nothing but a class of ours has such
    an attribute. Protobuf messages, tensors and objects of other packages are recognised by annotations and modules. A
    value counts as wiring if it is a lambda or a bound method, or if the attribute is declared as a callable or as a
    class of ours that is no record; everything else is state.
    """
    types, found = Types(classes), FromOutside()
    for module in modules:
        for function, inside in functions_of(module.tree):
            local = local_types(types, module, function, inside)
            for node in own_nodes(function):
                for target, value in targets_of(node):
                    if is_self(target.value) or target.attr not in types.declared:
                        continue
                    owner = types.of(module, target.value, inside, local)
                    options = [] if owner == "other" else types.options(owner, target.attr)
                    if not options:
                        continue
                    at = place(module, target, f"{ast.unparse(target)} = …")
                    if any(each.owner.module is module for each in options):
                        found.near.append(at)
                        continue
                    found.far.append(at)
                    if is_wiring(classes, inside, value, options):
                        found.wiring.append(at)
    for places in (found.near, found.far, found.wiring):
        places.sort(key=Place.order)
    return found


def functions_of(
    tree: ast.AST, inside: ast.ClassDef | None = None
) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, ast.ClassDef | None]]:
    """Yield every function with the class that it is in."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child, inside
            yield from functions_of(child, inside)
        else:
            yield from functions_of(child, child if isinstance(child, ast.ClassDef) else inside)


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function without those of nested functions."""
    left = deque(ast.iter_child_nodes(function))
    while left:
        node = left.popleft()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield node
            left.extend(ast.iter_child_nodes(node))


def local_types(
    types: Types, module: Module, function: ast.FunctionDef | ast.AsyncFunctionDef, inside: ast.ClassDef | None
) -> dict[str, Any]:
    """Guess types of parameters by annotation, and of names by assignment."""
    local: dict[str, Any] = {each.arg: types.of_annotation(module, each.annotation) for each in arguments_of(function)}
    for node in own_nodes(function):
        pairs: list[tuple[ast.expr, ast.expr]] = []
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs += zip(target.elts, node.value.elts, strict=False)
                else:
                    pairs.append((target, node.value))
        elif isinstance(node, ast.NamedExpr):
            pairs.append((node.target, node.value))
        elif isinstance(node, ast.With | ast.AsyncWith):
            pairs += [(item.optional_vars, item.context_expr) for item in node.items if item.optional_vars is not None]
        for target, value in pairs:
            if isinstance(target, ast.Name):
                of = value.value if isinstance(value, ast.Await) else value
                local[target.id] = types.of(module, of, inside, local)
    return local


def is_wiring(
    classes: Classes, inside: ast.ClassDef | None, value: ast.expr | None, options: Sequence[Declared]
) -> bool:
    """Return whether an assignment sets a collaborator or a callable, not a value."""
    if isinstance(value, ast.Lambda):
        return True
    if isinstance(value, ast.Attribute) and is_self(value.value) and inside is not None:
        methods = [each for each in inside.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
        if any(each.name == value.attr and not each.decorator_list for each in methods):
            return True
    said = [each for each in options if each.annotation is not None]
    return bool(said) and all(is_collaborator(classes, each) for each in said)


def is_collaborator(classes: Classes, declared: Declared) -> bool:
    """Return whether it is a callable or an object of ours that is no record, also in a collection."""
    assert declared.annotation is not None
    names = names_in(declared.annotation)
    known = [classes.find(declared.owner.module, name) for name in names]
    return "Callable" in names or any(each is not None and not classes.is_record(each) for each in known)


# ---------------------------------------------------------------- prose and names

OPENERS = re.compile(
    r"(The|A|An|What|Whether|Who|Whose|Whom|Of|How|That|Those|With|As|So|Where|When|Which|For|From|In|By|To|On|At|Its|One|If"
    r"|This|These|It|All|Such)\b"
)
"""First words after which a docstring says neither what a thing is nor what it does, yet."""
ENDS_IN_ING = re.compile(r"[a-z]{3,}ing$")


def openers(modules: Iterable[Module]) -> tuple[list[Place], int]:
    """Return the docstrings, of attributes too, that begin with one of `OPENERS`, and how many docstrings there are."""
    found, number = [], 0
    for module in modules:
        for node in module.nodes:
            for each in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
                if (
                    isinstance(each, ast.Expr)
                    and isinstance(each.value, ast.Constant)
                    and isinstance(each.value.value, str)
                ):
                    number += 1
                    if OPENERS.match(each.value.value.strip()):
                        found.append(place(module, each, each.value.value.strip().splitlines()[0]))
    return found, number


def comment_share(modules: Iterable[Module]) -> str:
    """Return which share of lines are comments with a line of their own, in per cent."""
    lines = [line.strip() for module in modules for line in module.text.splitlines()]
    return f"{100 * sum(line.startswith('#') for line in lines) / max(1, len(lines)):.1f} %"


def prose(modules: Sequence[Module]) -> list[Row]:
    """Compute the rows about docstrings, comments and names of modules."""
    found, number = openers(modules)
    protocol = [module for module in modules if module.path.startswith(PROTOCOL)]
    stems = [module.name.split(".")[-1] for module in modules]
    flat = [module.path for module in modules if re.fullmatch(r"swarmtrain/peer/\w+\.py", module.path)]
    return [
        Row(
            'docstrings that open with "The", "What", "Whether", "Of" ...',
            f"{len(found)} of {number}",
            [*map(str, found)],
        ),
        Row("lines that are a comment", comment_share(modules)),
        Row("lines that are a comment, in the protocol's folder", comment_share(protocol)),
        Row("modules whose name ends in -ing", str(sum(ENDS_IN_ING.search(stem) is not None for stem in stems))),
        Row("modules of peer/ that are in none of its folders", str(len(flat)), flat),
    ]


# ---------------------------------------------------------------- what tests quote

SENTENCE = re.compile(r"[A-Za-z']{2,} [A-Za-z'-]{2,}")
"""Two words side by side: no key, no code, no number."""
SAID = re.compile(r"\b(stderr|output|err|message|noise|error|caught|raised|refused|value)\b|str\(")
"""What an assertion looks at, where that is what a person is told."""


def quotes(modules: Iterable[Module]) -> list[Place]:
    """Assertions of tests that hold the words of an error, a refusal or a warning.

    These are `pytest.raises(…, match="two words")`, and `assert` with two words side by side in a string, beside what
    was said (`SAID`).
    """
    found = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("raises"):
                given = [item.value for item in node.keywords if item.arg == "match"]
                found += [place(module, each, ast.unparse(each)) for each in given if has_sentence(each)]
            elif isinstance(node, ast.Assert) and has_sentence(node.test) and SAID.search(without_strings(node.test)):
                found.append(place(module, node, ast.unparse(node.test)))
    return found


def has_sentence(tree: ast.AST) -> bool:
    """Whether a string in it has two words side by side."""
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return any(SENTENCE.search(text) for text in texts)


def without_strings(tree: ast.AST) -> str:
    """Its source, with nothing in the quotes."""
    return re.sub(r"'[^']*'|\"[^\"]*\"", "''", ast.unparse(tree))


# ---------------------------------------------------------------- the table


@dataclass
class Row:
    """Measure: its value, and the places it comes from."""

    name: str
    value: str
    places: list[str] = field(default_factory=list)


def measure(modules: Sequence[Module]) -> list[Row]:
    """Compute all measures."""
    rows = [
        Row("lines of the package", f"{sum(map(num_lines, modules)):,}"),
        Row("of them no blank line and no comment", f"{sum(map(num_code_lines, modules)):,}"),
        Row("modules", str(len(modules))),
    ]
    for name, path in PATHS.items():
        trip = follow(modules, path)
        lost = f" ({len(trip.lost)} steps not found)" if trip.lost else ""
        there = [text for side, text in trip.crossings if side == "network"]
        back = [text for side, text in trip.crossings if side == "peer"]
        listed = [f"{file}{'' if file in trip.payload_files else ' (what goes with it)'}" for file in trip.files]
        rows += [
            Row(f"{name}: files", f"{len(trip.files)}{lost}", [*listed, *(f"not found: {each}" for each in trip.lost)]),
            Row(f"{name}: files of the payload alone", f"{len(trip.payload_files)}{lost}"),
            Row(f"{name}: crossings, peer to network + back", f"{len(there)} + {len(back)}{lost}", [*there, *back]),
            Row(f"{name}: steps that no name joins", f"{len(trip.gaps)}{lost}", trip.gaps),
        ]
    for name, markers in MARKERS.items():
        found = orchestrators(modules, markers)
        value = f"{', '.join(markers)} is gone" if found is None else str(len(found))
        rows.append(Row(f"implementations: {name}", value, [str(each) for each in found or ()]))
    use = method_use(modules)
    for what, places in (
        ("comparisons with a merge method's name", use.comparisons),
        ("tables by merge methods' names", use.tables),
        ("reads of a flag that is such a comparison", use.flags),
        ("questions for the type of what a merge brought", use.types),
    ):
        files = {each.where.split(":")[0] for each in places}
        rows.append(Row(what, f"{len(places)} in {len(files)} modules", [str(each) for each in places]))
    run_circles, type_circles, closing = cycles(modules)
    rows.append(Row("cycles of imports", str(len(run_circles)), [" ".join(each) for each in run_circles]))
    typed = [" ".join(each) for each in type_circles] + [str(each) for each in closing]
    value = f"{len(type_circles)}, by {len(closing)} imports"
    rows.append(Row("cycles that only imports for types close", value, typed))
    classes = Classes(modules)
    for what, large in zip(("classes", "records"), classes.large(), strict=True):
        listed = [
            f"{one.module.path}:{one.node.lineno}  {one.name}: {methods} methods, {fields} fields"
            for one, methods, fields in large
        ]
        rows.append(
            Row(f"{what} of > {MOST_METHODS} methods or > {MOST_FIELDS} constructor fields", str(len(large)), listed)
        )
    home = next((of for of in PROTOCOL if any(module.path.startswith(of) for module in modules)), PROTOCOL[0])
    inside = anys(module for module in modules if module.path.startswith(home))
    rows.append(Row("`Any` in the protocol's folder", str(len(inside)), [str(each) for each in inside]))
    rows.append(Row("`Any` in the package", str(len(anys(modules)))))
    outside = set_from_outside(modules, classes)
    for what, places in (
        ("attributes set on an object of the same module's class", outside.near),
        ("attributes set on an object of another module's class", outside.far),
        ("of these a collaborator or a callable", outside.wiring),
    ):
        rows.append(Row(what, str(len(places)), [str(each) for each in places]))
    twice = classes.twice()
    rows.append(
        Row(
            "public class names in two modules or more",
            str(len(twice)),
            [f"{name}: {' '.join(paths)}" for name, paths in twice.items()],
        )
    )
    long = sorted(((num_lines(module), module.path) for module in modules), reverse=True)
    listed = [f"{path}: {lines}" for lines, path in long if lines > MOST_LINES]
    rows.append(Row(f"modules of more than {MOST_LINES} lines", str(len(listed)), listed))
    return rows + prose(modules)


def quoted(tests: Iterable[Module]) -> Row:
    """Return the row of assertions that quote text."""
    found = quotes(tests)
    return Row("assertions of tests that quote what a person is told", str(len(found)), [str(each) for each in found])


def as_table(columns: Mapping[str, Sequence[Row]]) -> str:
    """Format the measures as a Markdown table."""
    first = next(iter(columns.values()))
    lines = [f"| | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    for index, row in enumerate(first):
        lines.append(f"| {row.name} | {' | '.join(rows[index].value for rows in columns.values())} |")
    return "\n".join(lines)


def as_list(rows: Iterable[Row]) -> str:
    """List the places of each row."""
    return "\n".join(
        f"\n{row.name}: {row.value}\n" + "\n".join(f"  {at}" for at in row.places) for row in rows if row.places
    )


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", action="append", default=[], metavar="COMMIT", help="this commit; may be said again")
    parser.add_argument("--list", action="store_true", help="the places too, of the last column")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with this text in their name, a regex")
    parser.add_argument("--json", action="store_true", help="everything, places too")
    options = parser.parse_args(arguments)
    sources = {commit: of_commit(ROOT, commit) for commit in options.at} or {"here": of_folder(ROOT)}
    tests = {commit: of_commit(ROOT, commit, TESTS) for commit in options.at} or {"here": of_folder(ROOT, TESTS)}
    columns = {
        name: [row for row in [*measure(modules), quoted(tests[name])] if re.search(options.only, row.name)]
        for name, modules in sources.items()
    }
    if options.json:
        out = {
            name: {row.name: {"value": row.value, "places": row.places} for row in rows}
            for name, rows in columns.items()
        }
        print(json.dumps(out, indent=1))
        return 0
    print(as_table(columns))
    if options.list:
        print(as_list(list(columns.values())[-1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
