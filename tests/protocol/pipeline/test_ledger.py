"""Ledger of a stage: each microbatch's gradient enters one step, once."""

from __future__ import annotations

from swarmtrain.protocol.pipeline.ledger import (
    Add,
    Discard,
    Due,
    Forget,
    Key,
    Kind,
    LedgerLimits,
    Settlement,
    StageLedger,
    Subtract,
    TakeStep,
    Work,
)

LIMITS = LedgerLimits(batch_tokens=4, ack_wait_s=10.0, hold_s=100.0, max_open=6, max_open_of_driver=5)


def _ledger() -> StageLedger:
    return StageLedger(LIMITS)


def _key(sequence: int, attempt: int = 0, driver: str = "d") -> Key:
    return Key(driver, sequence, attempt)


def _compute(ledger: StageLedger, key: Key, kind: Kind, now: float = 0.0, tokens: int = 2) -> None:
    assert ledger.ask(key, kind, tokens, now).answer == "work"
    assert ledger.begin(key, kind) is not None
    ledger.computed(key, kind, now)


def _there_and_back(ledger: StageLedger, key: Key, now: float = 0.0) -> None:
    _compute(ledger, key, "forward", now)
    _compute(ledger, key, "backward", now)


def _all_due(ledger: StageLedger, now: float = 0.0) -> list[Due]:
    return list(iter(lambda: ledger.due(now), None))


def _steps(due: list[Due]) -> list[TakeStep]:
    return [each for each in due if isinstance(each, TakeStep)]


def test_a_step_is_taken_when_all_of_a_full_batch_is_acknowledged() -> None:
    ledger = _ledger()
    for sequence in (0, 1):
        _there_and_back(ledger, _key(sequence))
    assert not _all_due(ledger)
    assert ledger.acknowledge(_key(0), 2.5, 0.0)
    assert _all_due(ledger) == [Forget(_key(0))]
    assert ledger.acknowledge(_key(1), 2.5, 0.0)
    assert _all_due(ledger) == [Forget(_key(1)), TakeStep(0, 4, 2.5, (_key(0), _key(1)))]
    assert (ledger.version, ledger.counted_tokens, ledger.num_open) == (1, 4, 0)


def test_the_next_batch_is_filled_while_a_closed_one_waits() -> None:
    ledger = _ledger()
    for sequence in (0, 1, 2):
        _there_and_back(ledger, _key(sequence))
        assert not _all_due(ledger)
    ledger.acknowledge(_key(0), 2.5, 0.0)
    ledger.acknowledge(_key(2), 2.5, 0.0)
    assert not _steps(_all_due(ledger))
    ledger.acknowledge(_key(1), 2.5, 0.0)
    assert _steps(_all_due(ledger)) == [TakeStep(0, 4, 2.5, (_key(0), _key(1)))]
    _there_and_back(ledger, _key(3))
    ledger.acknowledge(_key(3), 2.5, 0.0)
    assert _steps(_all_due(ledger)) == [TakeStep(1, 4, 2.5, (_key(2), _key(3)))]


def test_what_is_not_acknowledged_in_time_is_taken_out_and_comes_back_with_its_acknowledgement() -> None:
    ledger = _ledger()
    for sequence in (0, 1):
        _there_and_back(ledger, _key(sequence))
    ledger.acknowledge(_key(0), 2.5, 0.0)
    assert _all_due(ledger) == [Forget(_key(0))]
    assert ledger.next_s() == 10.0
    due = _all_due(ledger, 10.0)
    assert due[:2] == [Subtract(_key(1), 0, "not acknowledged in time"), TakeStep(0, 2, 2.5, (_key(0),))]
    assert Forget(_key(1)) not in due
    assert ledger.acknowledge(_key(1), 2.5, 11.0)
    assert _all_due(ledger, 11.0) == [Add(_key(1), 1), Forget(_key(1))]
    _there_and_back(ledger, _key(2), 12.0)
    ledger.acknowledge(_key(2), 2.5, 12.0)
    assert _steps(_all_due(ledger, 12.0)) == [TakeStep(1, 4, 2.5, (_key(1), _key(2)))]
    assert ledger.acknowledge(_key(1), 2.5, 13.0), "an acknowledgement may be repeated"
    assert not _all_due(ledger, 13.0)
    assert ledger.counted_tokens == 6


def test_a_batch_of_which_nothing_is_acknowledged_is_no_step() -> None:
    ledger = _ledger()
    for sequence in (0, 1):
        _there_and_back(ledger, _key(sequence))
    _all_due(ledger)
    assert not _steps(_all_due(ledger, 10.0))
    assert ledger.version == 0


def test_a_question_again_is_answered_as_before() -> None:
    ledger = _ledger()
    for kind in ("forward", "backward"):
        _compute(ledger, _key(0), kind)
        assert ledger.ask(_key(0), kind, 2, 0.0).answer == "repeat"
    _compute(ledger, _key(1), "tail")
    assert ledger.ask(_key(1), "tail", 2, 0.0).answer == "repeat"
    for key in (_key(0), _key(1)):
        ledger.acknowledge(key, 2.5, 0.0)
    _all_due(ledger)
    assert ledger.ask(_key(0), "forward", 2, 1.0).answer == "gone", "it is counted"
    assert ledger.ask(_key(1), "tail", 2, 1.0).answer == "gone"


def test_a_newer_attempt_takes_the_place_of_an_older_one() -> None:
    ledger = _ledger()
    _there_and_back(ledger, _key(0))
    _there_and_back(ledger, _key(0, attempt=1))
    assert _all_due(ledger)[:2] == [
        Subtract(_key(0), 0, "another attempt takes its place"),
        Forget(_key(0)),
    ]
    assert not ledger.acknowledge(_key(0), 2.5, 0.0)
    assert ledger.ask(_key(0), "backward", 2, 0.0).answer == "gone"
    assert ledger.acknowledge(_key(0, attempt=1), 2.5, 0.0)


def test_an_older_attempt_that_comes_late_is_refused() -> None:
    ledger = _ledger()
    _compute(ledger, _key(0, attempt=1), "forward")
    assert ledger.ask(_key(0), "forward", 2, 0.0).answer == "gone"


def test_an_attempt_that_is_acknowledged_is_not_replaced() -> None:
    ledger = _ledger()
    _there_and_back(ledger, _key(0))
    ledger.acknowledge(_key(0), 2.5, 0.0)
    assert ledger.ask(_key(0, attempt=1), "forward", 2, 0.0).answer == "gone"


def test_a_backward_without_its_forward_is_gone() -> None:
    ledger = _ledger()
    assert ledger.ask(_key(0), "backward", 2, 0.0).answer == "gone"
    assert ledger.ask(_key(1), "forward", 2, 0.0).answer == "work"
    assert ledger.ask(_key(1), "backward", 2, 0.0).answer == "gone", "its forward is not computed yet"


def test_a_backward_comes_a_step_late_at_most() -> None:
    ledger = _ledger()
    late, later = _key(7), _key(8)
    _compute(ledger, late, "forward")
    _compute(ledger, later, "forward")
    for step in (0, 1):
        for sequence in (2 * step, 2 * step + 1):
            _there_and_back(ledger, _key(sequence))
            ledger.acknowledge(_key(sequence), 2.5, 0.0)
        assert len(_steps(_all_due(ledger))) == 1
        if step == 0:
            assert ledger.ask(late, "backward", 2, 0.0).answer == "work"
            work = ledger.begin(late, "backward")
            assert work is not None and work.version == 0
            ledger.computed(late, "backward", 0.0)
            ledger.acknowledge(late, 2.5, 0.0)
    assert ledger.ask(later, "backward", 2, 0.0).answer == "gone"
    assert ledger.num_open == 0, "what comes too late is not kept"


def test_a_forward_has_the_weights_of_when_it_is_computed() -> None:
    ledger = _ledger()
    assert ledger.ask(_key(9), "forward", 2, 0.0).answer == "work"
    for sequence in (0, 1):
        _there_and_back(ledger, _key(sequence))
        ledger.acknowledge(_key(sequence), 2.5, 0.0)
    _all_due(ledger)
    assert ledger.begin(_key(9), "forward") == Work(version=1, batch=1)


def test_what_is_dropped_does_not_count() -> None:
    ledger = _ledger()
    for sequence in (0, 1, 2):
        _there_and_back(ledger, _key(sequence))
    ledger.drop(_key(0))
    assert _all_due(ledger)[0] == Subtract(_key(0), 0, "dropped by its driver")
    assert not ledger.acknowledge(_key(0), 2.5, 0.0)
    ledger.acknowledge(_key(1), 2.5, 0.0)
    ledger.drop(_key(1))
    assert ledger.acknowledge(_key(1), 2.5, 0.0), "what is acknowledged is not dropped"
    ledger.acknowledge(_key(2), 2.5, 0.0)
    assert _steps(_all_due(ledger)) == [TakeStep(0, 4, 2.5, (_key(1), _key(2)))]


def test_what_is_dropped_before_it_is_computed_is_not_computed() -> None:
    ledger = _ledger()
    ledger.ask(_key(0), "forward", 2, 0.0)
    ledger.drop(_key(0))
    assert ledger.begin(_key(0), "forward") is None
    assert _all_due(ledger) == [Forget(_key(0))]


def test_what_is_dropped_while_it_is_computed_is_taken_out() -> None:
    ledger = _ledger()
    ledger.ask(_key(0), "tail", 2, 0.0)
    ledger.begin(_key(0), "tail")
    ledger.drop(_key(0))
    ledger.computed(_key(0), "tail", 0.0)
    due = _all_due(ledger)
    assert [type(each) for each in due] == [Subtract, Forget]
    assert ledger.num_open == 0


def test_a_driver_that_goes_on_lets_go_of_what_is_behind_it() -> None:
    ledger = _ledger()
    _there_and_back(ledger, _key(0))
    _compute(ledger, _key(1), "forward")
    _compute(ledger, _key(5), "forward")
    ledger.oldest_open("d", 5, 1.0)
    due = _all_due(ledger, 1.0)
    assert {each.key for each in due if isinstance(each, Forget)} == {_key(0), _key(1)}
    assert ledger.ask(_key(1), "backward", 2, 1.0).answer == "gone"
    assert ledger.ask(_key(4, attempt=9), "forward", 2, 1.0).answer == "gone", "behind it nothing begins again"
    assert ledger.ask(_key(5), "backward", 2, 1.0).answer == "work"


def test_of_a_driver_that_never_goes_on_so_much_is_remembered_and_no_more() -> None:
    ledger, known = _ledger(), []
    for sequence in range(10_000):
        _compute(ledger, _key(sequence), "forward")
        ledger.drop(_key(sequence))
        ledger.oldest_open("d", 0, 0.0)
        known.append(len(ledger._drivers["d"].finished))
    _all_due(ledger)
    assert max(known) == 4096 and min(known[4096:]) >= 2048
    for sequence in (0, 5000, 9_999):
        assert ledger.ask(_key(sequence), "forward", 2, 0.0).answer == "gone", "none of them begins again"
    assert ledger.ask(_key(9_999, attempt=1), "forward", 2, 0.0).answer == "work"
    _there_and_back(ledger, _key(10_000))
    assert ledger.acknowledge(_key(10_000), 1.0, 0.0)


def test_a_driver_that_dies_leaves_nothing() -> None:
    ledger = _ledger()
    _there_and_back(ledger, _key(0))
    _compute(ledger, _key(1), "forward")
    _there_and_back(ledger, _key(0, driver="alive"), 99.0)
    ledger.acknowledge(_key(0, driver="alive"), 2.5, 99.0)
    _all_due(ledger, 99.0)
    assert ledger.counted_tokens == 0
    due = _all_due(ledger, 109.0)
    assert isinstance(due[0], Subtract) and due[0].key == _key(0)
    assert _steps(due) == [TakeStep(0, 2, 2.5, (_key(0, driver="alive"),))]
    _all_due(ledger, 300.0)
    assert ledger.num_open == 0


def test_one_driver_does_not_take_all_places() -> None:
    ledger = _ledger()
    for sequence in range(5):
        assert ledger.ask(_key(sequence), "forward", 2, 0.0).answer == "work"
    assert ledger.ask(_key(5), "forward", 2, 0.0).answer == "busy"
    assert ledger.ask(_key(0, driver="other"), "forward", 2, 0.0).answer == "work"
    assert ledger.ask(_key(1, driver="other"), "forward", 2, 0.0).answer == "busy"


def test_memory_is_bounded_when_a_driver_never_acknowledges() -> None:
    ledger = _ledger()
    now = 0.0
    for sequence in range(1000):
        now += 1.0
        key = _key(sequence)
        if ledger.ask(key, "tail", 2, now).answer == "work":
            ledger.begin(key, "tail")
            ledger.computed(key, "tail", now)
        _all_due(ledger, now)
        assert ledger.num_open <= LIMITS.max_open_of_driver
    assert ledger.counted_tokens == 0
    ledger.oldest_open("d", 1000, now)
    _all_due(ledger, now)
    assert not ledger._drivers["d"].finished
    _all_due(ledger, now + 1001.0)
    assert not ledger._drivers


def test_a_batch_is_closed_early_when_places_run_out() -> None:
    ledger = StageLedger(LedgerLimits(batch_tokens=100, ack_wait_s=10.0, max_open=3, max_open_of_driver=3))
    for sequence in range(3):
        _there_and_back(ledger, _key(sequence))
    assert not _all_due(ledger)
    assert ledger.ask(_key(3), "forward", 2, 0.0).answer == "busy"
    for sequence in range(3):
        ledger.acknowledge(_key(sequence), 2.5, 0.0)
    assert [step.tokens for step in _steps(_all_due(ledger))] == [6]
    assert ledger.ask(_key(3), "forward", 2, 0.0).answer == "work"


def test_what_is_acknowledged_takes_no_place() -> None:
    """A batch may have any number of microbatches, all of one driver."""
    ledger = StageLedger(LedgerLimits(batch_tokens=100, ack_wait_s=10.0, max_open=3, max_open_of_driver=3))
    for sequence in range(50):
        _there_and_back(ledger, _key(sequence))
        assert ledger.acknowledge(_key(sequence), 2.5, 0.0)
        due = _all_due(ledger)
        assert due[0] == Forget(_key(sequence)), "nothing is kept for it"
        assert ledger.ask(_key(sequence), "backward", 2, 0.0).answer == "gone", "its driver has it"
        assert [step.tokens for step in _steps(due)] == ([100] if sequence == 49 else [])


def test_a_step_has_two_batches_at_most_and_what_is_under_way_counts() -> None:
    """While a closed batch waits, what has its forward only is no reason to take more."""
    ledger = StageLedger(LedgerLimits(batch_tokens=4, ack_wait_s=10.0, max_open=50, max_open_of_driver=50))
    for sequence in range(2):
        _there_and_back(ledger, _key(sequence, driver="silent"))
    assert not _all_due(ledger), "it is closed and waits"
    for sequence in range(4):
        _compute(ledger, _key(sequence), "forward")
    assert ledger.ask(_key(4), "forward", 2, 0.0).answer == "busy"
    for sequence in range(4):
        _compute(ledger, _key(sequence), "backward")
        ledger.acknowledge(_key(sequence), 2.5, 0.0)
    assert ledger.ask(_key(4), "forward", 2, 0.0).answer == "busy"
    assert [step.tokens for step in _steps(_all_due(ledger, 10.0))] == [8]
    assert ledger.ask(_key(4), "forward", 2, 10.0).answer == "work"


def test_busy_does_not_make_batches_small() -> None:
    ledger = StageLedger(LedgerLimits(batch_tokens=100, ack_wait_s=10.0, max_open=3, max_open_of_driver=3))
    _there_and_back(ledger, _key(0))
    ledger.acknowledge(_key(0), 2.5, 0.0)
    for sequence in range(1, 4):
        _compute(ledger, _key(sequence), "forward")
    assert ledger.ask(_key(4), "forward", 2, 0.0).answer == "busy"
    assert not _steps(_all_due(ledger)), "places come free by themselves"


def test_one_that_does_not_acknowledge_is_given_fewer_places() -> None:
    ledger = _ledger()
    for sequence in (0, 1):
        _there_and_back(ledger, _key(sequence, driver="bad"))
    _all_due(ledger)
    _all_due(ledger, 10.0)
    for driver, places in (("bad", 1), ("good", 4)):
        verdicts = [ledger.ask(_key(10 + n, driver=driver), "forward", 2, 10.0).answer for n in range(5)]
        assert verdicts.count("work") <= places, driver
    assert ledger.ask(_key(30, driver="good"), "forward", 2, 10.0).answer == "busy"


def test_what_cannot_be_computed_is_given_up() -> None:
    ledger = _ledger()
    assert ledger.ask(_key(0), "tail", 2, 0.0).answer == "work"
    assert ledger.begin(_key(0), "tail") is not None
    ledger.failed(_key(0))
    assert _all_due(ledger) == [Forget(_key(0))]
    assert not ledger.acknowledge(_key(0), 2.5, 0.0)


def test_nothing_of_a_batch_that_came_to_nothing_is_kept() -> None:
    ledger = _ledger()
    for sequence in (0, 1):
        _there_and_back(ledger, _key(sequence))
    _all_due(ledger)
    assert Discard(0) in _all_due(ledger, 10.0)


def test_what_a_driver_that_is_heard_has_asked_is_kept_however_long_it_takes() -> None:
    """Where a stage takes seconds, minutes pass between a forward and its backward."""
    ledger = _ledger()
    for driver in ("d", "silent"):
        _compute(ledger, _key(0, driver=driver), "forward")
    for minute in range(10):
        ledger.settle("d", Settlement(0, (), (), 0), 60.0 * minute)
        _all_due(ledger, 60.0 * minute)
    assert not ledger.has_forward(_key(0, driver="silent"))
    assert ledger.ask(_key(0), "backward", 2, 600.0).answer == "work"
