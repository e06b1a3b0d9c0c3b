"""What signals ask for."""

import os
import signal
import threading

import pytest

from qkvjax.training.signals import INTERRUPTED, PREEMPTED, SAVE, requests


def send(number):
    os.kill(os.getpid(), number)


def test_each_signal_has_its_meaning():
    before = signal.getsignal(signal.SIGTERM)
    with requests() as asked:
        assert asked() == 0
        send(signal.SIGUSR1)
        assert asked() == SAVE and asked() == 0  # once
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        assert asked() == PREEMPTED and asked() == PREEMPTED  # until it is obeyed
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_first_interrupt_is_noted_and_the_second_leaves_at_once():
    with pytest.raises(KeyboardInterrupt):
        with requests() as asked:
            send(signal.SIGINT)
            assert asked() == INTERRUPTED
            send(signal.SIGINT)


def test_threads_are_asked_nothing():
    found = []

    def run():
        with requests() as asked:
            found.append(asked())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [0]
