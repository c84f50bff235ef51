"""Habits of this code base that a machine can check cheaply; each message says what to do instead."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

from own_sources import modules, nodes, sources

# The places that may wait by the real clock, each with its reason.
MAY_SLEEP: dict[str, str] = {}


@functools.cache
def functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function as (where it is, node)."""
    return [
        (f"{name}:{node.lineno} {node.name}", node)
        for name, node in nodes()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


@functools.cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """Every call as (module, dotted name as written, node)."""
    return [(name, ast.unparse(node.func), node) for name, node in nodes() if isinstance(node, ast.Call)]


def test_context_managers_rather_than_finalizers() -> None:
    assert not [where for where, node in functions() if node.name == "__del__"]


def test_every_module_says_what_it_is_and_public_functions_say_what_they_do() -> None:
    for name, tree in modules().items():
        assert ast.get_docstring(tree) or not sources()[name], f"{name} has no docstring"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith(
                "_"
            ):
                assert ast.get_docstring(node), f"{name}:{node.lineno} {node.name} has no docstring"


def test_real_sleeps_only_where_named() -> None:
    sleepers = {module for module, called, _ in calls() if called == "time.sleep"}
    assert sleepers <= set(MAY_SLEEP), "wait for an event with a time limit, or take the clock as an argument"


def test_nothing_is_unpickled() -> None:
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
    for name, node in nodes():
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not forbidden & {found.split(".")[0] for found in names}, f"{name} imports a pickler"


def test_torch_loads_weights_only() -> None:
    for module, called, node in calls():
        if called == "torch.load":
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.get("weights_only") == "True", f"{module}:{node.lineno} weights_only=True is missing"


def test_nothing_prints_or_evaluates() -> None:
    for module, called, node in calls():
        assert called not in ("print", "eval", "exec", "os.system", "os.fork"), f"{module}:{node.lineno} calls {called}"


def test_what_is_written_to_the_terminal_cannot_control_it() -> None:
    for module, called, node in calls():
        may_write = ("cli/output.py", "cli/doctor.py", "search/__main__.py")  # a moving line; no text of others
        assert called not in ("click.echo", "click.secho", "Console") or module.endswith(may_write), (
            f"{module}:{node.lineno} calls {called}; use echo of cli/output.py or TerminalConsole of cli/terminal.py"
        )


def test_no_child_process_gets_the_whole_environment() -> None:
    for module, called, node in calls():
        if called.startswith("subprocess.") and called != "subprocess.Popen[bytes]":
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert "nvironment" in given.get("env", ""), (
                f"{module}:{node.lineno} {called}: give it a minimal_environment"
            )


def test_broad_excepts_log_what_they_caught() -> None:
    for name, node in nodes():
        if not isinstance(node, ast.ExceptHandler):
            continue
        broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
        said = any(isinstance(child, ast.Raise) or "log" in ast.unparse(child).lower() for child in node.body)
        assert not broad or said, f"{name}:{node.lineno} swallows every error: name the error, log it or raise it"


def test_no_two_test_modules_have_one_name() -> None:
    """Pytest imports them by their names alone, and then refuses all of them."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}
