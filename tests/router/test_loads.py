"""The lease's thread takes the tokens per expert while the engine's thread counts, at whatever byte code of either."""

import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np

from moering.protocol import View
from router.catch_up import CatchUp
from router.engine import Engine

SHAPE, LAYER = (2, 3), 1
CHOSEN = np.array([[0, 1], [1, 2]])
COUNTED = [1, 2, 1]


def make_engine(layers, experts):
    """One with a view of a model of this shape, without sockets and thread."""
    parts = dict.fromkeys(("decoder", "scheduler", "sampler")) | {"exchange": MagicMock(), "frontend": MagicMock()}
    limits = {"threads": 1, "micro_batches": 1, "missing_expert_timeout_s": 1.0}
    engine = Engine(**parts, poller=MagicMock(), catch_up=CatchUp(""), **limits)
    follow(engine, layers, experts)
    return engine


def follow(engine, layers, experts):
    engine.view_changed(View(1, 1, [], [], layers, experts, 0, b"", b"", 1, 0, 0, 0))
    engine._follow_view()


def count(engine):
    """A gate has chosen."""
    engine._reached(SimpleNamespace(layer=LAYER, topk_ids=CHOSEN, expert_rows=MagicMock()))


def call_with_step(function, code, at, step):
    """Call `function`, and `step` before the byte code number `at` of `code` in it: the result, and whether it came."""
    seen = [0]

    def trace(frame, event, arg):
        if frame.f_code is not code:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if seen[0] == at:
                step()
            seen[0] += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return function(), seen[0] > at
    finally:
        sys.settrace(before)


def interleavings(shape, function, code, step):
    """For each place where `step` may come: the engine, and what `function` returned."""
    at, came = 0, True
    while came:
        engine = make_engine(*shape)
        result, came = call_with_step(lambda e=engine: function(e), code, at, lambda e=engine: step(e))
        if came:
            yield engine, result
        at += 1
    assert at > 2


def test_what_is_counted_while_it_is_taken_is_taken_once():
    for engine, first in interleavings(SHAPE, Engine.take_loads, Engine.take_loads.__code__, count):
        assert (first + engine.take_loads())[LAYER].tolist() == COUNTED


def test_what_is_taken_while_it_is_counted_is_taken_once():
    taken = []
    for engine, _ in interleavings(
        SHAPE, count, Engine._reached.__code__, lambda e: taken.append(e.take_loads().copy())
    ):
        assert (taken[-1] + engine.take_loads())[LAYER].tolist() == COUNTED


def test_a_view_of_another_shape_may_come_meanwhile():
    """As the first one does; then a count."""

    def step(engine):
        follow(engine, *SHAPE)
        count(engine)

    for engine, first in interleavings((0, 0), Engine.take_loads, Engine.take_loads.__code__, step):
        later = engine.take_loads()
        assert (later + first if first.size else later)[LAYER].tolist() == COUNTED


def test_no_load_is_negative_after_a_coordinator_that_knew_no_model():
    engine = make_engine(*SHAPE)
    count(engine)
    engine.take_loads()
    follow(engine, 0, 0)
    follow(engine, *SHAPE)
    assert engine.take_loads().tolist() == np.zeros(SHAPE).tolist()
