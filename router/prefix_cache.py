"""Which KV blocks hold which prefix, so that tokens that several requests begin with are computed once.

Keys and values of a full block depend on the tokens up to its end alone, so a copy of the block has the bits that
computing it would give. It is copied rather than shared: attention reads consecutive blocks in place, and a block from
elsewhere makes every later step gather all keys of its sequence. For the default model and 1,024 keys that is 8 ms per
sequence and step; copying two blocks is 4 ms once. So each block in use has one holder, and nothing is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moering.prefix import prefix_keys
from router.sequence import Sequence


@dataclass(slots=True)
class _Entry:
    key: bytes
    last_use: int


class PrefixCache:
    """The books; the content of blocks is moved by `copy(source, destination)`.

    A block keeps its content after its sequence has let go of it, until the block manager hands it out again: those
    used longest ago first.
    """

    def __init__(self, block_size: int, copy: Callable[[int, int], None], enabled: bool = True) -> None:
        self.tokens_reused = 0
        self._block_size, self._copy, self._enabled = block_size, copy, enabled
        self._block_of: dict[bytes, int] = {}
        self._entries: dict[int, _Entry] = {}
        self._uses = 0

    def __len__(self) -> int:
        """Blocks that hold a prefix."""
        return len(self._entries)

    # --- the scheduler's side ---

    def find(self, sequence: Sequence) -> list[int]:
        """The blocks that hold what it begins with, now of use. At least one token is left to be computed."""
        blocks: list[int] = []
        for key in self._keys(sequence, (sequence.num_tokens - 1) // self._block_size):
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        for block in reversed(blocks):
            self.touch(block)
        return blocks

    def fetch(self, sequence: Sequence) -> None:
        """Fill the new blocks of a sequence with what is held of its tokens."""
        blocks = self.find(sequence)
        for source, destination in zip(blocks, sequence.block_table, strict=False):
            self._copy(source, destination)
        sequence.num_computed = len(blocks) * self._block_size
        self.tokens_reused += sequence.num_computed

    def offer(self, sequence: Sequence) -> None:
        """Remember the full blocks of a sequence whose prefixes no other block holds."""
        if not self._enabled or not sequence.shareable:
            return
        keys = self._keys(sequence, sequence.num_computed // self._block_size)
        for key, block in zip(keys, sequence.block_table, strict=False):
            if key not in self._block_of:
                self._block_of[key] = block
                self._entries[block] = _Entry(key, self._next_use())

    def _keys(self, sequence: Sequence, blocks: int) -> list[bytes]:
        if len(sequence.block_keys) < blocks:
            tokens = sequence.tokens(0, blocks * self._block_size)
            sequence.block_keys = prefix_keys(tokens, self._block_size, sequence.block_keys)
        return sequence.block_keys[:blocks]

    # --- the block manager's side ---

    def last_use(self, block: int) -> int:
        """0 where the block holds no prefix, else a number that is larger the later it was of use."""
        entry = self._entries.get(block)
        return entry.last_use if entry else 0

    def touch(self, block: int) -> None:
        """The block was of use now. Deeper blocks of a prefix first: without those before it a block is of none."""
        if entry := self._entries.get(block):
            entry.last_use = self._next_use()

    def forget(self, block: int) -> None:
        """The block is about to be overwritten."""
        if entry := self._entries.pop(block, None):
            del self._block_of[entry.key]

    def check_integrity(self) -> None:
        """Assert that both tables say the same."""
        assert self._block_of == {entry.key: block for block, entry in self._entries.items()}, "prefixes are mixed up"

    def _next_use(self) -> int:
        self._uses += 1
        return self._uses
