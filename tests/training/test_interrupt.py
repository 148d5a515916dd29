import contextlib
import os
import signal
import threading

import pytest

from scaling_jax.training import interrupt

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_does_nothing_else(number):
    with interrupt.noticing() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
        assert stop.signal == number


@pytest.mark.parametrize("numbers", [SIGNALS, SIGNALS[::-1], SIGNALS[:1] * 2])
def test_a_second_signal_stops_at_once(numbers):
    with interrupt.noticing() as stop:
        os.kill(os.getpid(), numbers[0])
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), numbers[1])
        assert stop.signal == numbers[0]


def test_the_handlers_from_before_come_back_even_after_an_error():
    before = [signal.getsignal(number) for number in SIGNALS]
    with contextlib.suppress(ValueError), interrupt.noticing():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        raise ValueError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_in_another_thread_the_request_never_comes():
    found = []

    def work():
        before = signal.getsignal(signal.SIGINT)
        with interrupt.noticing() as stop:
            found.extend([stop.asked, signal.getsignal(signal.SIGINT) is before])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, True]


def test_what_another_process_was_asked_is_not_the_first_request_of_this_one(monkeypatch):
    monkeypatch.setattr(interrupt.distributed, "is_to_stop", lambda: True)
    monkeypatch.setattr(interrupt, "SECONDS_BETWEEN_LOOKS", 0)
    request = interrupt.SharedStopRequest()
    request.look()
    assert request.asked
    request.ask(signal.SIGINT)
    assert request.signal == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        request.ask(signal.SIGINT)
