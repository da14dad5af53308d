import os
import threading

import pytest

from moering.priority import at_low_priority


def test_low_priority_is_that_of_the_work_alone():
    here = threading.get_ident()
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def work():
        return threading.get_ident(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    thread, nice = at_low_priority(work)
    assert thread != here and nice == 19
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before < 19


def test_an_error_at_low_priority_reaches_who_waits():
    with pytest.raises(ZeroDivisionError):
        at_low_priority(lambda: 1 // 0)
