"""Codes of errors and warnings: each is registered, used and explained, and none changes its name."""

from __future__ import annotations

import ast
import copy
import re

import pytest
from click.testing import CliRunner
from codes import codes_in, codes_of, raises_code
from own_sources import ROOT, nodes
from test_troubleshooting import GAP, RAISED, SHORTEST, literal, says

from swarmtrain import errors
from swarmtrain.cli.main import cli, run
from swarmtrain.cli.peers import NoAnswerError
from swarmtrain.error_codes import CODES
from swarmtrain.errors import BadBytesError, Problem, StalledError, UserError, with_code
from swarmtrain.events import ErrorEvent, Event, RefusedEvent, WarningEvent, parse_event, to_json_line, to_plain_line
from swarmtrain.network.refusals import RULES, Refusals, rule_of

FROZEN = """
address-elsewhere address-not-an-ip against-own all-volunteers-run another-run archive-not-written background-ended
bootstrap-left-alone
bad-address bad-assignment bad-bytes bad-chain bad-device bad-format bad-hash bad-limit bad-name bad-number
bad-plot-name bad-presence bad-publication bad-round bad-sender bad-shape bad-signature bad-size bad-stages bad-stream
bad-time bad-tokens bad-trace bad-value broken-off bug busy card-not-watched checkpoint-mismatch checkpoint-not-finite
checkpoint-not-written checkpoint-partly-used checkpoint-unusable checkpoints-again clock-differs clock-outlier
clock-skew crowded-machine daemon-died daemon-not-started data-folder-needed dataset-foreign-file dataset-format
dataset-name dataset-not-loaded device-not-there device-unusable dht-not-joined empty-prompt far-from-usual
bad-chat-template bad-tokenizer chat-refused no-chat-template no-tokenizer-file not-a-sample nothing-to-learn
samples-left-out tokenizer-misfit tokenizer-not-loaded
field-not-text file-exists file-not-written file-too-long file-unreadable folder-altered folder-in-use
bad-model-file disk-full files-not-delivered hub-failed hub-file-damaged hub-not-limited model-files-differ
folder-not-empty folder-not-writable folder-of-another-run going-on-alone gone gpu-share-on-processor
heat-not-measured invite-garbled invite-local-only invite-not-written invite-too-long kept-option
key-not-changeable keys-disagree last-state-lost last-volunteer limits-fixed loss-not-measured merge-package-broken
merge-package-missing merge-package-version metrics-address missing-key model-family model-not-delivered
model-not-saved network-broke nice-not-lowered no-bootstrap no-checkpoint no-control no-curves no-final-model no-log
no-model no-run-file no-such-code no-such-command no-such-data no-such-field no-such-folder no-such-method
no-such-peer no-such-split no-such-volunteer no-text nobody-answers nobody-at-address nobody-can-dial nobody-known
not-a-config not-a-model not-a-number not-a-regular-file not-a-volunteer not-an-identity not-an-invite not-asked-for
not-decompressed not-a-time
not-for-a-service
bad-repository hub-login hub-upload tasks-not-scored unknown-task
adapter-differs adapter-on-one-device adapter-targets base-bits rank-count rank-not-possible
not-finite not-healthy not-held not-json-lines not-parquet not-safetensors not-toml not-utf8 nothing-announced
nothing-to-resume only-held-out-text options-conflict other-user out-of-memory out-of-range
package-missing path-is-folder path-outside peer-failed peer-needs-newer peer-not-running peer-of-another-version
peer-refused peer-silent peer-starting port-forbidden port-taken precision-demanded published-section question-refused
rank-lost rehearsal rounds-not-archived run-had-ended run-needs-newer run-not-delivered seed-used-twice server-silent
several-peers slowdown-count smaller-microbatch stage-not-taken stages-in-fp16 stages-on-one-device
stages-only stalled state-not-delivered stdlib-missing still-ending takes-much tied-embeddings too-busy
too-few-peers too-little-bandwidth too-little-memory too-little-text too-many-devices too-many-threads too-much-churn
too-often too-slow-for-run training-diverged unknown-key unreachable update-too-old wrong-type
bad-tracker tracker-failed tracker-offline
gradient-not-counted
model-files-needed model-has-code model-quantised model-refused no-such-base
bad-report-name nothing-to-report
"""
"""Codes as people have them in their notes and programs. A new one is added here; none is taken away or renamed."""

KINDS = [kind for name, kind in vars(errors).items() if name.endswith("Error") and kind.__module__ == errors.__name__]
ERRORS = RAISED | {kind.__name__ for kind in KINDS} | {"OptionError", "OptionsError"}
DEFAULTS = {kind.__name__: kind.code for kind in (*KINDS, NoAnswerError) if kind.code}
"""Codes of classes whose errors all mean the same."""
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def raised() -> list[tuple[str, ast.Call, str]]:
    """List where errors and warnings are made: the place, the call, and the code given there or by the class.

    The code is empty if it comes with what is passed on.
    """
    found = []
    for name, node in nodes():
        if isinstance(node, ast.Call) and (kind := ast.unparse(node.func).split(".")[-1]) in ERRORS | {"Problem"}:
            given = [item.value for item in node.keywords if item.arg == "code"]
            given += node.args[1:2] if kind == "Problem" else []
            constant = next((each.value for each in given if isinstance(each, ast.Constant)), None)
            code = constant if isinstance(constant, str) else DEFAULTS.get(kind, "") if not given else ""
            found.append((f"{name}:{node.lineno}", node, code))
    return found


def test_codes_are_the_frozen_ones() -> None:
    assert set(CODES) == set(FROZEN.split())


def test_a_code_is_a_few_words_in_small_letters() -> None:
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code) and len(code) <= 24 for code in CODES)
    assert len(CODES) == len(set(CODES))


def test_what_is_raised_or_warned_of_has_a_registered_code() -> None:
    unknown, without = {}, {}
    for where, call, code in raised():
        if code and code not in CODES:
            unknown[where] = code
        message = next(iter([*call.args, *(item.value for item in call.keywords if item.arg == "message")]), None)
        is_written_here = isinstance(message, ast.Constant | ast.JoinedStr | ast.BinOp)  # else it may be a `Problem`
        is_given = any(item.arg == "code" for item in call.keywords) or ast.unparse(call.func) == "Problem"
        if is_written_here and not code and not is_given:
            without[where] = ast.unparse(call)
    assert not unknown, f"swarmtrain/error_codes.py does not have these: {unknown}"
    assert not without, f"give a code: {without}"


def test_each_code_is_used() -> None:
    used = {
        node.value
        for name, node in nodes()
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and name != "swarmtrain/error_codes.py"
    }
    assert not CODES.keys() - used, "nothing has these codes; a code that was given out stays: keep its error"


def test_a_message_is_explained_with_its_code() -> None:
    """The row of a code in the page lists each message that has the code, so that who has only the words finds it."""
    missing = {}
    for where, call, code in raised():
        if ast.unparse(call.func).split(".")[-1] not in RAISED | {"Problem", "OptionError", "OptionsError"} or not code:
            continue
        for message in [*call.args[:1], *(item.value for item in call.keywords if item.arg == "message")]:
            text = literal(message)
            if len(text.replace(GAP, "").strip(": ")) >= SHORTEST and not any(says(s, text) for s in CODES[code].says):
                missing[where] = f"{code}: {text}"
    assert not missing, f"swarmtrain/error_codes.py lists other messages for these codes: {missing}"


@pytest.mark.parametrize("code", CODES)
def test_the_page_explains_each_code_once(code: str) -> None:
    assert PAGE.count(f'| <a id="{code}"></a>`{code}` |') == 1
    assert CODES[code].do.endswith(".")


def test_explain_says_what_the_page_says() -> None:
    said = CliRunner().invoke(cli, ["explain", "[port-taken]"])
    assert said.exit_code == 0
    assert codes_in(said.output) == ["port-taken"] * len(CODES["port-taken"].says)
    assert "--listen :31338" in " ".join(said.output.split())
    links = CliRunner().invoke(cli, ["explain", "unknown-key"]).output
    assert "](" not in links and "The run file lists all" in " ".join(links.split())
    listed = CliRunner().invoke(cli, ["explain"]).output.splitlines()
    assert [line.split()[0] for line in listed] == list(CODES)


def test_explain_knows_what_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "port-takn"]) == 2
    told = capsys.readouterr().err
    assert "port-taken?" in told and codes_in(told) == ["no-such-code"]


def test_a_terminal_shows_each_problem_with_its_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise UserError(Problem("one", "unknown-key"), Problem("and more", ""), "two", code="missing-key")

    monkeypatch.setattr(cli, "main", fails)
    assert run([]) == 2
    assert capsys.readouterr().err == "error: one [unknown-key]\nerror: and more\nerror: two [missing-key]\n"


def test_an_error_has_the_code_given_or_its_first_problems_or_its_class() -> None:
    assert UserError("a", code="port-taken").code == "port-taken"
    assert UserError(Problem("a", "not-utf8"), Problem("b", "bad-value")).code == "not-utf8"
    assert errors.ClockError("a").code == "clock-differs" and UserError("a").code == ""
    assert codes_of(UserError("a", Problem("b", "bad-value"), code="not-utf8")) == ["not-utf8", "bad-value"]
    assert Problem("a", "not-utf8").found_in("file") == "file: a"
    assert Problem("a", "not-utf8").found_in("file").code == "not-utf8"
    assert with_code("a", "") == "a"
    for error in (UserError("a", code="port-taken"), UserError(Problem("a", "port-taken"))):
        again = copy.deepcopy(error)  # as when it comes from another process
        assert (again.code, str(again), codes_of(again)) == ("port-taken", "a", ["port-taken"])


def test_raises_code_looks_at_the_code() -> None:
    with raises_code("port-taken", UserError):
        raise UserError("a", code="port-taken")
    with pytest.raises(AssertionError), raises_code("port-taken"):
        raise UserError("a", code="port-forbidden")


@pytest.mark.parametrize(
    "event", [WarningEvent(message="m", code="clock-skew"), ErrorEvent(message="m", code="bug", exit_code=1)]
)
def test_events_carry_the_code(event: WarningEvent | ErrorEvent) -> None:
    assert codes_in(to_plain_line(event)) == [event.code]
    assert parse_event(to_json_line(event)) == event
    older = parse_event(event.model_dump_json(exclude={"code"}))
    assert isinstance(older, WarningEvent | ErrorEvent) and older.code == ""


def test_the_rules_of_refusals_are_found_by_codes_that_exist() -> None:
    assert set(RULES) <= set(CODES)
    rules = {"bad-publication": "publication", "bad-tokens": "tokens", "bad-chain": "format", "bad-sender": "format"}
    assert {code: rule_of(code) for code in rules} == rules
    assert rule_of("bad-hash") == "hash" and rule_of("bad-bytes") == rule_of("") == "format"


def test_a_refusal_is_told_by_its_code_whatever_its_words_are() -> None:
    told: list[Event] = []
    refusals = Refusals(told.append)
    refusals.tell("ben", BadBytesError("a presence that ends in another round of tokens", code="bad-shape"))
    refusals.tell("ben", StalledError("it takes nothing for 5 s"))
    assert [event.rule for event in told if isinstance(event, RefusedEvent)] == ["shape", "stall"]
