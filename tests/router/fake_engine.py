"""The engine's loop around a scheduler, with a model of the KV cache: a token is a function of what the sequence's
block table really holds, so a block that is shared, lost or stale changes tokens.
"""

import zlib

from moering.protocol import Sampling
from router.prefix_cache import PrefixCache
from router.scheduler import Scheduler
from router.sequence import Sequence
from router.step_cost import StepCost

BLOCK, VOCAB = 4, 50


class FakeBlocks:
    def __init__(self, n, prefixes):
        self._free, self._n, self._prefixes = set(range(n)), n, prefixes

    @property
    def free_blocks(self):
        return len(self._free)

    def allocate(self, n, after=None):
        assert 0 < n <= len(self._free)
        assert after is None or after not in self._free
        blocks = sorted(self._free, key=self._prefixes.last_use)[:n]
        self._free -= set(blocks)
        for block in blocks:
            self._prefixes.forget(block)
        return blocks

    def free(self, blocks):
        assert not self._free & set(blocks)
        self._free |= set(blocks)
        for block in reversed(blocks):
            self._prefixes.touch(block)


def next_token(tokens):
    return zlib.crc32(bytes(tokens)) % VOCAB


class Engine:
    """The engine's loop around a scheduler; its forward writes and reads a cache by block table."""

    def __init__(self, blocks=100, seqs=8, batched=16, max_len=60, cost=None, micro_batches=1):
        self.cache = {}  # (block, offset) -> token
        self.prefixes = PrefixCache(BLOCK, self._copy)
        self.blocks = FakeBlocks(blocks, self.prefixes)
        limits = (seqs, batched, BLOCK, max_len)
        if cost is None:
            cost = StepCost()
            cost.record(1, 0, 1.0)  # nothing here takes time: else no step beside decodes would have prefill
        self.scheduler = Scheduler(self.blocks, self.prefixes, *limits, cost, VOCAB, micro_batches)
        self.computed = 0  # rows of all forwards
        self.flying = []  # (batch, tokens) whose forward has not ended

    def start(self):
        batch = self.scheduler.schedule()
        if batch is not None:
            self.flying.append((batch, [self._forward(item) for item in batch.items]))
        return batch

    def _copy(self, source, destination):
        for offset in range(BLOCK):
            self.cache[destination, offset] = self.cache[source, offset]

    def _forward(self, item):
        s = item.sequence
        self.computed += item.length
        for position, token in enumerate(s.tokens(item.start, item.length), item.start):
            # What is not shareable is not what the tokens say.
            self.cache[s.block_table[position // BLOCK], position % BLOCK] = token if s.shareable else VOCAB + token
        end = item.start + item.length
        return next_token([self.cache[s.block_table[p // BLOCK], p % BLOCK] for p in range(end)])

    def end(self, index=0):
        """End a batch in flight. Returns the sequences that finished."""
        batch, tokens = self.flying.pop(index)
        token_of = {item.sequence: token for item, token in zip(batch.items, tokens, strict=True)}
        to_sample = self.scheduler.complete(batch.items)
        return [i.sequence for i in to_sample if self.scheduler.update(i.sequence, token_of[i.sequence])]

    def step(self):
        batch = self.start()
        return batch, self.end() if batch else []

    def run(self, most=2000):
        for _ in range(most):
            if self.start() is None:
                return
            self.end()
            self.scheduler.check_integrity()
        raise AssertionError("still running")

    def add(self, *args, **kw):
        s = make(*args, **kw)
        assert self.scheduler.add(s) is None
        return s


_names = iter(range(10**9))


def make(prompt=3, output=(), max_tokens=5, deadline=1e9, **sampling):
    name = next(_names)
    prompt = [(name * 7 + i) % VOCAB for i in range(prompt)] if isinstance(prompt, int) else prompt
    return Sequence(str(name), 0, b"", prompt, list(output), Sampling(max_tokens, **sampling), deadline)


def expected_output(s, resumed=(), max_len=60):
    output = list(resumed)
    while len(output) < s.sampling.max_tokens and len(s.prompt) + len(output) < max_len:
        output.append(next_token(s.prompt + output))
        if output[-1] in s.sampling.stop_token_ids and len(output) > s.sampling.min_tokens:
            break
    return output


def shape(batch):
    return [(item.start, item.length, item.samples) for item in batch.items]
