"""Where the keys of a micro-batch's rows lie, as integers on the GPU: worked out once per step, used by every layer.

All integers of a step lie in one buffer and travel in one copy. Their places are fixed, so that CUDA graphs can hold
their addresses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kernels.triton_attention import PAGE_KEYS, SPLIT_KEYS, PagedRows
from router.attention_plan import SequenceChunk

_PER_ROW = ("token_ids", "positions", "slots", "sequences", "decode_rows")
_ALIGN = 16  # integers: 64 bytes


class RowTables:
    """The integers of one micro-batch at a time, on the host (pinned) and on the device.

    Named views on the device, int32: token_ids, positions, slots, sequences, decode_rows [capacity] each; live [1], how
    many rows are no padding.
    """

    def __init__(self, capacity: int, max_pages: int, tile_rows: int, device: torch.device) -> None:
        """For `capacity` rows, of sequences of up to `max_pages` pages; `tile_rows` rows in a prefill tile."""
        self._tile_rows, self._max_pages = tile_rows, max_pages
        at = {"live": (0, 1)}
        offset = _ALIGN
        for name, size in (*((n, capacity) for n in _PER_ROW), ("tiles", 2 * capacity)):
            at[name] = (offset, size)
            offset += size + -size % _ALIGN
        at["tables"] = (offset, (capacity + 1) * max_pages)
        self._tables_at = offset
        size = offset + (capacity + 1) * max_pages
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        host = self._host.numpy()
        self._on_host = {name: host[start : start + length] for name, (start, length) in at.items()}
        self._on_host["tables"] = self._on_host["tables"].reshape(-1, max_pages)
        self._on_device = {name: self._device[start : start + length] for name, (start, length) in at.items()}

    def __getattr__(self, name: str) -> torch.Tensor:
        try:
            return self._on_device[name]
        except KeyError:
            raise AttributeError(name) from None

    def fill(self, token_ids: Sequence[int], chunks: Sequence[SequenceChunk], padded: int, spare_page: int) -> None:
        """Put in the integers of these chunks and start their copy. Rows up to `padded` see one key of `spare_page`."""
        h, rows = self._on_host, len(token_ids)
        h["live"][0] = rows
        h["token_ids"][:rows], h["token_ids"][rows:padded] = token_ids, 0
        decodes, tiles, row = [], [], 0
        for number, chunk in enumerate(chunks):
            end = row + chunk.length
            pages = -(-(chunk.start + chunk.length) // PAGE_KEYS)
            h["tables"][number, :pages] = chunk.block_table[:pages]
            h["sequences"][row:end] = number
            h["positions"][row:end] = np.arange(chunk.start, chunk.start + chunk.length)
            if chunk.length == 1:
                decodes.append(row)
            else:
                tiles += [
                    (row + t, min(self._tile_rows, chunk.length - t)) for t in range(0, chunk.length, self._tile_rows)
                ]
            row = end
        h["tables"][len(chunks), 0] = spare_page
        h["sequences"][rows:padded], h["positions"][rows:padded] = len(chunks), 0
        decodes += range(rows, padded)
        positions = h["positions"][:padded]
        pages_of_rows = h["tables"][h["sequences"][:padded], positions // PAGE_KEYS]
        h["slots"][:padded] = pages_of_rows * PAGE_KEYS + positions % PAGE_KEYS
        h["decode_rows"][: len(decodes)] = decodes
        h["tiles"][: 2 * len(tiles)] = np.array(tiles, np.int32).reshape(-1)
        self._counts = (len(decodes), len(tiles))
        self._longest = int(positions[decodes].max()) + 1 if decodes else 1
        used = self._tables_at + (len(chunks) + 1) * self._max_pages
        self._device[:used].copy_(self._host[:used], non_blocking=True)

    @property
    def splits(self) -> int:
        """Splits of the longest sequence of a decode row."""
        return -(-self._longest // SPLIT_KEYS)

    def paged_rows(self, padded: int, splits: int) -> PagedRows:
        """What attention needs to know of the rows that were filled in, with room for `splits`."""
        decodes, tiles = self._counts
        return PagedRows(
            tables=self.tables.view(-1, self._max_pages),
            sequences=self.sequences[:padded],
            positions=self.positions[:padded],
            decode_rows=self.decode_rows[:decodes],
            tiles=self.tiles[: 2 * tiles].view(-1, 2),
            tile_rows=self._tile_rows,
            splits=splits,
        )
