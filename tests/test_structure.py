"""`benchmarks/structure.py` on small sources; and that what it follows by name is there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def structure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("structure", ROOT / "benchmarks" / "structure.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["structure"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources(structure: ModuleType, **texts: str) -> list[Any]:
    """Modules of the package, `peer__one="…"` for `swarmtrain/peer/one.py`."""
    return [
        structure.Module(f"swarmtrain/{name.replace('__', '/')}.py", textwrap.dedent(text).lstrip("\n"))
        for name, text in texts.items()
    ]


def found(places: list[Any]) -> list[str]:
    return [f"{place.where.removeprefix('swarmtrain/')} {place.what}" for place in places]


def test_lines_of_code_are_no_comments_and_not_blank(structure: ModuleType) -> None:
    (module,) = sources(
        structure,
        run='''
        """Says it,

        in three lines."""
        # a comment

        x = (
            1,  # a comment behind code

            # and between
        )
        ''',
    )
    assert (structure.num_lines(module), structure.num_code_lines(module)) == (10, 5)


def test_assertions_that_quote_what_a_person_is_told(structure: ModuleType) -> None:
    text = """
    def test_one():
        with pytest.raises(UserError, match="the port is taken"):
            listen()
        with pytest.raises(UserError, match="--listen"), raises_code("port-taken", UserError, "two words"):
            listen()
        assert "is taken" in capsys.readouterr().err
        assert told == ["two words"]
        assert codes_in(done.stderr) == ["port-taken"]
        with pytest.raises(UserError, match=f"{where} is taken"):
            listen()
    """
    module = structure.Module("tests/test_one.py", textwrap.dedent(text))
    quoted = sorted(structure.quotes([module]), key=structure.Place.order)
    assert [place.where for place in quoted] == [f"tests/test_one.py:{line}" for line in (3, 7, 10)]


# ---------------------------------------------------------------- data paths

CHAIN = {
    "peer__a": """
        class Maker:
            def make(self):
                return self.desk.put(Parcel(1))
        """,
    "network__b": """
        class Parcel: ...
        class Desk:
            def put(self, parcel):
                self.check(parcel)
                self.on_parcel(parcel)
            def check(self, parcel): ...
        """,
    "algorithm__c": "def weigh(parcel): ...",
    "peer__d": """
        class Taker:
            def take(self, parcel):
                return weigh(parcel)
        """,
}


def test_a_path_counts_files_crossings_and_what_no_name_joins(structure: ModuleType) -> None:
    trip = structure.follow(
        sources(structure, **CHAIN),
        """
        peer/a.py Maker.make
        network/b.py Parcel
        network/b.py Desk.put
        + network/b.py Desk.check
        algorithm/c.py weigh
        peer/d.py Taker.take
        """,
    )
    assert trip.files == trip.payload_files == ["peer/a.py", "network/b.py", "algorithm/c.py", "peer/d.py"]
    assert trip.crossings == [
        ("network", "peer/a.py Maker.make -> network/b.py Parcel"),
        ("peer", "network/b.py Desk.put -> peer/d.py Taker.take"),  # by way of algorithm/
    ]
    # a callable leads on from `put`; `make` names both the parcel and who takes it, so that these two are joined
    assert trip.gaps == ["network/b.py Desk.put -> algorithm/c.py weigh"]
    assert trip.lost == []


def test_what_goes_with_a_payload_is_a_file_and_no_crossing(structure: ModuleType) -> None:
    path = "peer/a.py Maker.make\n+ network/b.py Desk.check\nalgorithm/c.py weigh\npeer/d.py Taker.take"
    trip = structure.follow(sources(structure, **CHAIN), path)
    assert len(trip.files) == 4 and trip.payload_files == ["peer/a.py", "algorithm/c.py", "peer/d.py"]
    assert trip.crossings == []


def test_a_path_takes_the_first_name_that_there_is_and_tells_what_is_gone(structure: ModuleType) -> None:
    modules = sources(structure, **CHAIN)
    path = "peer/a.py Maker.made | Maker.make\nnetwork/z.py Parcel | network/b.py Parcel\npeer/d.py Taker.gone"
    trip = structure.follow(modules, path)
    assert list(map(str, trip.steps)) == ["peer/a.py Maker.make", "network/b.py Parcel"]
    assert trip.lost == ["peer/d.py Taker.gone"]


# ---------------------------------------------------------------- who orchestrates


def test_who_uses_the_deciding_function_orchestrates(structure: ModuleType) -> None:
    modules = sources(
        structure,
        membership__pulls="""
            def plan_pulls(): ...
            def helper():
                return plan_pulls()
            class Engine:
                def receive(self):
                    return plan_pulls()
            """,
        network__real="""
            from swarmtrain.membership.pulls import plan_pulls as plan
            class Real:
                def fill(self):
                    return plan()
            class Other: ...
            """,
        simulate__own="""
            class Peer:
                def plan_pulls(self):  # its own
                    return self.plan_pulls()
            """,
    )
    places = structure.orchestrators(modules, ["pulls:plan_pulls"])
    assert found(places) == ["membership/pulls.py:4 Engine", "network/real.py:2 Real"]
    assert structure.orchestrators(modules, ["rosters:decide"]) is None  # it is gone: nobody can be found by it


def test_a_method_marks_who_imports_its_class(structure: ModuleType) -> None:
    modules = sources(
        structure,
        protocol__routing="class Router:\n    def choose(self): ...",
        peer__driver="""
            from swarmtrain.protocol.routing import Router
            class Driver:
                def ask(self):
                    return self.routers[0].choose()
            class Waits:
                routers: list[Router]
            """,
        network__hosts="class Hosts:\n    def look(self):\n        return self.choice.choose()",
    )
    assert found(structure.orchestrators(modules, ["routing:Router.choose"])) == ["peer/driver.py:2 Driver"]


# ---------------------------------------------------------------- who asks for the method

ASKS = """
    _LATE = ("gossip", "server")
    EXCHANGES = {"gossip": 1, "diloco": 2}
    KEYS = {"pacing": _LATE + ("diloco",), "fragments": ("gossip",)}
    OTHER = {"gossip": 1, "stages": 2}
    class Swarm:
        @property
        def asynchronous(self):
            return self.run.merge.method != "diloco"
        def go(self, run, method, world, mode):
            a = run.merge.method == "gossip" or method in _LATE
            b = world == "gossip" or mode == "server" or run.merge.method == "none"
            match run.merge.method:
                case "gossip" | "server":
                    return self.asynchronous
                case _:
                    return isinstance(a, (Averaged, int)) or isinstance(b, str)
    """


def test_comparisons_tables_flags_and_types_are_counted_apart(structure: ModuleType) -> None:
    use = structure.method_use(sources(structure, peer__asks=ASKS))
    assert sorted(found(use.comparisons)) == [
        "peer/asks.py:10 method in _LATE",
        'peer/asks.py:10 run.merge.method == "gossip"',
        'peer/asks.py:13 "gossip" | "server"',
        'peer/asks.py:8 self.run.merge.method != "diloco"',
    ]
    assert [place.where for place in use.tables] == ["swarmtrain/peer/asks.py:2", "swarmtrain/peer/asks.py:3"]
    assert found(use.flags) == ["peer/asks.py:14 self.asynchronous"]
    assert found(use.types) == ["peer/asks.py:16 isinstance(a, (Averaged, int))"]


def test_a_method_may_say_its_own_name(structure: ModuleType) -> None:
    use = structure.method_use(sources(structure, methods__gossip=ASKS))
    assert not (use.comparisons or use.tables or use.flags or use.types)


# ---------------------------------------------------------------- cycles


def test_cycles_by_imports_that_run_and_by_those_for_types(structure: ModuleType) -> None:
    modules = sources(
        structure,
        a="from swarmtrain.b import B",
        b="def late():\n    import swarmtrain.a",
        peer__c="""
            from typing import TYPE_CHECKING
            if TYPE_CHECKING:
                from swarmtrain.peer import d
            """,
        peer__d="from swarmtrain.peer.c import C\nfrom swarmtrain.a import A",
        peer__e="""
            from typing import TYPE_CHECKING
            if TYPE_CHECKING:
                from swarmtrain.a import A
            """,
    )
    running, typed, closing = structure.cycles(modules)
    assert running == [("swarmtrain.a", "swarmtrain.b")]
    assert typed == [("swarmtrain.peer.c", "swarmtrain.peer.d")]
    assert found(closing) == ["peer/c.py imports swarmtrain.peer.d for its types"]


# ---------------------------------------------------------------- classes


def test_constructor_fields_are_those_that_a_constructor_takes(structure: ModuleType) -> None:
    classes = structure.Classes(
        sources(
            structure,
            peer__base="""
                @dataclass
                class Base:
                    a: int
                    b: int = 0
                    kind: ClassVar[str] = ""
                    found: list = field(init=False)
                    def go(self): ...
                """,
            peer__more="""
                from swarmtrain.peer.base import Base
                @dataclass
                class More(Base):
                    b: int = 1
                    c: int = 2
                    @property
                    def d(self): ...
                    @d.setter
                    def d(self, value): ...
                class Plain:
                    x: int
                    def __init__(self, x, *, y=1): ...
                class Child(Plain):
                    pass
                """,
        )
    )
    numbers = {one.name: (len(one.functions), classes.constructor_fields(one)) for one in classes.all}
    assert numbers == {"Base": (1, 2), "More": (2, 3), "Plain": (1, 2), "Child": (0, 2)}


def test_large_records_are_listed_apart(structure: ModuleType) -> None:
    fields = "".join(f"    f{number}: int = 0\n" for number in range(11))
    methods = "".join(f"    def m{number}(self): ...\n" for number in range(26))
    classes = structure.Classes(
        sources(
            structure,
            a=f"@dataclass\nclass Acts:\n{fields}    def go(self): ...\n",
            b=f"@dataclass(frozen=True)\nclass Says:\n{fields}    def go(self): ...\n",
            c=f"class Many:\n{methods}",
            d=f"class Few:\n{methods.split('    def m25')[0]}",
        )
    )
    acts, says = classes.large()
    assert [(one.name, *numbers) for one, *numbers in acts] == [("Many", 26, 0), ("Acts", 1, 11)]
    assert [(one.name, *numbers) for one, *numbers in says] == [("Says", 1, 11)]


def test_public_names_in_two_modules_and_any(structure: ModuleType) -> None:
    modules = sources(
        structure,
        a="from typing import Any\nclass Peer:\n    class Inner: ...\nclass _Own: ...\nx: Any = 0",
        b="class Peer: ...\nclass Inner: ...\nclass _Own: ...\ndef f(of: dict[str, typing.Any]): ...",
    )
    assert structure.Classes(modules).twice() == {"Peer": ["swarmtrain/a.py", "swarmtrain/b.py"]}
    assert found(structure.anys(modules)) == ["a.py:5 Any", "b.py:4 Any"]


# ---------------------------------------------------------------- what is set from outside


def test_what_is_set_on_another_object(structure: ModuleType) -> None:
    modules = sources(
        structure,
        network__swarm="""
            class Gossip:
                def begin(self): ...
            class Swarm:
                gossip: Gossip | None
                called: Callable[[str], None]
                round: int
                def __init__(self):
                    self.reply = pb.Reply()
                    self.size = 0
            def reset(swarm: Swarm):
                swarm.round = 0
            """,
        peer__exchange="""
            from swarmtrain.network.swarm import Gossip, Swarm
            from swarmtrain.v1 import reply_pb2 as pb
            class Exchange:
                def __init__(self, swarm: Swarm):
                    self.swarm, self.size = swarm, 1
                    swarm.gossip, swarm.round = Gossip(), 1
                    self.swarm.called = lambda peer: None
                def told(self, whom, message: pb.Reply):
                    message.round = 1
                    answer = pb.Reply()
                    answer.round = 2
                    whom.round = 3
                    whom.nobodys = 4
                    whom.size = self.told
            """,
    )
    outside = structure.set_from_outside(modules, structure.Classes(modules))
    assert found(outside.near) == ["network/swarm.py:11 swarm.round = …", "peer/exchange.py:14 whom.size = …"]
    assert found(outside.far) == [
        "peer/exchange.py:6 swarm.gossip = …",
        "peer/exchange.py:6 swarm.round = …",
        "peer/exchange.py:7 self.swarm.called = …",
        "peer/exchange.py:12 whom.round = …",  # nothing says what it is, and a class of ours has it
    ]
    assert found(outside.wiring) == ["peer/exchange.py:6 swarm.gossip = …", "peer/exchange.py:7 self.swarm.called = …"]


def test_a_bound_method_that_is_set_wires(structure: ModuleType) -> None:
    modules = sources(
        structure,
        network__a="class Store:\n    limit = None\n    def __init__(self, most=0):\n        self.most = most",
        peer__b="""
            from swarmtrain.network.a import Store
            class User:
                size = 0
                def use(self):
                    store = Store()
                    store.most = self.use
                    store.most = self.size
                @property
                def now(self):
                    Store().most = self.now
            """,
    )
    outside = structure.set_from_outside(modules, structure.Classes(modules))
    assert len(outside.far) == 3 and found(outside.wiring) == ["peer/b.py:6 store.most = …"]


# ---------------------------------------------------------------- the table


def test_a_table_has_a_column_for_each_source(structure: ModuleType) -> None:
    columns = {
        "before": structure.measure(sources(structure, protocol__a="x: Any = 1\n")),
        "after": structure.measure(sources(structure, membership__a="x = 1\ny = 2\n")),
    }
    table = structure.as_table(columns).splitlines()
    assert table[:3] == ["| | before | after |", "|---|---|---|", "| lines of the package | 1 | 2 |"]
    assert "| `Any` in the protocol's folder | 1 | 0 |" in table
    assert "| implementations: gossip | pulls:plan_pulls is gone | pulls:plan_pulls is gone |" in table
    assert "`Any` in the protocol's folder: 1\n  swarmtrain/protocol/a.py:1  Any" in structure.as_list(
        columns["before"]
    )


def test_a_commit_is_read_without_a_checkout(structure: ModuleType, tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True)

    for name in ("peer/a.py", "v1/a_pb2.py", "notes.txt"):
        path = tmp_path / "swarmtrain" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    (tmp_path / "swarmtrain" / "peer" / "a.py").write_text("x = 1\ny = 2\n")
    assert [(each.path, each.text) for each in structure.of_commit(tmp_path, "HEAD")] == [
        ("swarmtrain/peer/a.py", "x = 1\n")
    ]
    assert [each.text for each in structure.of_folder(tmp_path)] == ["x = 1\ny = 2\n"]
    with pytest.raises(SystemExit, match="no-such-commit cannot be read"):
        structure.of_commit(tmp_path, "no-such-commit")


# ---------------------------------------------------------------- this checkout


def test_what_is_followed_by_name_is_there(structure: ModuleType) -> None:
    """Who replaces a function that a path passes, or by which a protocol is known, names its successor there."""
    modules = structure.of_folder(ROOT)
    assert {name: structure.follow(modules, path).lost for name, path in structure.PATHS.items()} == {
        name: [] for name in structure.PATHS
    }
    named = {marker.split(":")[0] for markers in structure.MARKERS.values() for marker in markers}
    homes = [module for module in modules if module.path.split("/")[-1].removesuffix(".py") in named]
    for markers in structure.MARKERS.values():
        assert structure.orchestrators(homes, markers) is not None, f"none of {markers}"


# ---------------------------------------------------------------- prose and names


def test_docstrings_comments_and_names_are_counted(structure: ModuleType) -> None:
    modules = sources(
        structure,
        protocol__merging='''
            """What is merged."""
            # a reason
            WAIT_S = 1.0
            """Seconds between two looks."""
            def merge():
                """Theirs, and ours."""
            class Merge:
                """The merge."""
            ''',
        peer__alone="x = 1\n",
        peer__training__loop="x = 1  # beside code, not a line of its own\n",
    )
    rows = {row.name: row for row in structure.prose(modules)}
    assert [row.value for row in rows.values()] == ["2 of 4", "10.0 %", "12.5 %", "1", "1"]
