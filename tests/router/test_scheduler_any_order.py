from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.router.fake_engine import Engine, expected_output, make


class AnyOrder(RuleBasedStateMachine):
    """Few blocks, several batches in flight, cancellations at any moment; nothing is lost and no token changes."""

    def __init__(self):
        super().__init__()
        self.engine = Engine(blocks=7, seqs=4, batched=8, max_len=24)
        self.wanted = []  # (sequence, its tokens without disturbance)

    @rule(
        prompt=st.integers(1, 20), kind=st.sampled_from((0, 0, 1, None)), emitted=st.integers(0, 3),
        more=st.integers(1, 12),
    )  # fmt: skip
    def add(self, prompt, kind, emitted, more):
        """`kind`: prompts of the same one begin alike; None: like no other one."""
        s = make(prompt=prompt if kind is None else [kind + i % 7 for i in range(prompt)], max_tokens=emitted + more)
        whole = expected_output(s, max_len=24)
        s.output = whole[:emitted]
        if len(whole) > emitted:
            assert self.engine.scheduler.add(s) is None
            self.wanted.append((s, whole))

    @rule()
    def start(self):
        self.engine.start()

    @rule(pick=st.integers(0, 9))
    def end(self, pick):
        if self.engine.flying:
            self.engine.end(pick % len(self.engine.flying))

    @rule(pick=st.integers(0, 9))
    def abort(self, pick):
        if self.wanted:
            s, _ = self.wanted.pop(pick % len(self.wanted))
            found = self.engine.scheduler.abort(s.request_id, s.attempt)
            assert (found is s) == (s.finish_reason is None)

    @rule(pick=st.integers(0, 9))
    def renormalize(self, pick):
        """From here on its keys and values are not those of its tokens; its own tokens are nobody's business."""
        if self.wanted:
            s, _ = self.wanted.pop(pick % len(self.wanted))
            s.shareable = False

    @invariant()
    def books_add_up(self):
        self.engine.scheduler.check_integrity()
        self.engine.prefixes.check_integrity()

    def teardown(self):
        while self.engine.flying:
            self.engine.end()
        self.engine.run()
        assert self.engine.blocks.free_blocks == 7
        for s, whole in self.wanted:
            assert (s.output, s.finish_reason) == (whole, "length")


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
