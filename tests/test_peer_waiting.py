"""Waiting that a signal interrupts: nothing is lost, nothing hangs."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import Future

import pytest

from swarmtrain.cli.stopping import stop_on_signals
from swarmtrain.errors import RunTimeError
from swarmtrain.peer.common import Interrupted, StopFlag, wait_for


def test_a_result_is_returned_also_when_the_end_was_asked_for() -> None:
    stop, future = StopFlag(), Future[int]()
    stop.stop()
    future.set_result(7)
    assert wait_for(future, stop) == 7


def test_a_time_limit_of_the_work_itself_is_not_taken_for_ours() -> None:
    future = Future[int]()
    future.set_exception(TimeoutError("the work's own"))
    with pytest.raises(TimeoutError, match="the work's own"):
        wait_for(future, StopFlag())


def test_an_end_cancels_what_is_waited_for() -> None:
    stop, future = StopFlag(), Future[int]()
    threading.Timer(0.05, stop.stop).start()
    with pytest.raises(Interrupted):
        wait_for(future, stop)
    assert future.cancelled()


def test_a_failure_ends_the_wait_with_its_reason() -> None:
    stop = StopFlag()
    stop.fail("the network daemon ended")
    with pytest.raises(RunTimeError, match="daemon ended"):
        stop.sleep(10)


def test_ctrl_c_while_sleeping_wakes_up() -> None:
    with stop_on_signals() as stop:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(Interrupted):
            stop.sleep(30)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigusr1_explains() -> None:
    explained = threading.Event()
    with stop_on_signals() as stop:
        stop.explain = explained.set
        os.kill(os.getpid(), signal.SIGUSR1)
        assert explained.wait(5)
        assert not stop.is_set()
