"""A micro-batch on its way through the layers, with the sequences whose rows it carries."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from router.attention_plan import SequenceChunk
from router.decoder import Launched
from router.expert_rows import ExpertRows
from router.micro_batch import MicroBatch
from router.missing import hopeless, leave_out
from router.scheduler import Batch, ScheduledChunk
from router.sequence import Sequence as Request

FEW_ROWS = 48
"""Below this many rows one thread is enough: a second one takes the core from the expert servers of the machine."""


class Flight:
    """Rows of the chunks `items`, in their order. The exchange sees it as `router.exchange.Rows`.

    `decoder` is a `router.decoder.Decoder` or of the same interface.
    """

    def __init__(self, decoder: Any, items: Sequence[ScheduledChunk], threads: int, started_s: float) -> None:
        self._decoder, self._threads = decoder, threads
        self.items, self.started_s = list(items), started_s
        self.was_parked = False
        self.waits_since_s: float | None = None  # for a replica of an expert of this layer
        self.missing = np.empty(0, np.int64)  # slots that wait for a replica, while parked
        self.missing_deaths = np.empty(0, np.int64)  # of each: at how many deaths of servers its row was outstanding
        chunks = [SequenceChunk(i.sequence.block_table, i.start, i.length) for i in items]
        token_ids = [t for i in items for t in i.sequence.tokens(i.start, i.length)]
        self._lengths = np.array([i.length for i in items])
        self._row_ends = self._lengths.cumsum()
        self._renormalized = np.zeros(len(token_ids), bool)  # rows that went on without some of their experts
        self.prefill = len(token_ids) > len(items)
        self.micro_batch: MicroBatch = decoder.start(token_ids, chunks)
        self._rewire()

    # --- what the exchange sees ---

    @property
    def layer(self) -> int:
        """The layer whose experts are computed."""
        return self.micro_batch.layer

    @property
    def topk_ids(self) -> np.ndarray:
        """The experts of each row: int64 [n, k]."""
        return self._topk_ids

    @property
    def expert_rows(self) -> ExpertRows:
        """Their inputs and outputs."""
        return self._expert_rows

    # --- through the layers ---

    def launch(self) -> Launched | None:
        """Begin to compute what leads up to the gate of the current layer. None: it is done."""
        torch.set_num_threads(1 if self.micro_batch.rows < FEW_ROWS else self._threads)
        return self._decoder.launch(self.micro_batch)

    def after_experts(self) -> bool:
        """Take in the experts' outputs; True after the last layer."""
        self.waits_since_s = None
        self._decoder.after_experts(self.micro_batch)
        return self.micro_batch.layer == self._decoder.config.num_layers

    def last_rows(self, chunks: Sequence[ScheduledChunk]) -> list[int]:
        """The last row of each of these chunks, all of them items of this flight."""
        return [int(end) - 1 for item, end in zip(self.items, self._row_ends, strict=True) if item in chunks]

    @property
    def first_rows(self) -> list[int]:
        """The first row of each item."""
        return (self._row_ends - self._lengths).tolist()

    def logits(self, rows: list[int]) -> torch.Tensor:
        """The logits of these rows, after the last layer."""
        torch.set_num_threads(self._threads)
        return self._decoder.logits(self.micro_batch, rows)

    # --- sequences and rows ---

    @property
    def sequences(self) -> list[Request]:
        """The sequences, in the order of their rows."""
        return [item.sequence for item in self.items]

    def sequences_of(self, rows: np.ndarray) -> list[Request]:
        """The sequences that these rows belong to."""
        return [self.items[i].sequence for i in np.unique(self._row_ends.searchsorted(rows, side="right"))]

    @property
    def missing_rows(self) -> np.ndarray:
        """The row of each missing slot: int64, ascending."""
        return self.missing // self._topk_ids.shape[1]

    def hopeless_rows(self) -> np.ndarray:
        """The rows that would have no expert left."""
        return hopeless(self.micro_batch.topk_weights, torch.from_numpy(self.missing)).numpy()

    def leave_out(self, sequences: Collection[Request]) -> None:
        """Go on with the rows of these sequences without their missing experts. None of them may be hopeless."""
        chosen = np.array([s in sequences for s in self.sequences])
        mine = chosen[self._row_ends.searchsorted(self.missing_rows, side="right")]
        leave_out(self.micro_batch.topk_weights, torch.from_numpy(self.missing[mine]))
        self._expert_rows.clear(self.missing[mine])
        self._renormalized[self.missing_rows[mine]] = True
        self.missing, self.missing_deaths = self.missing[~mine], self.missing_deaths[~mine]

    def renormalized_rows(self) -> list[int]:
        """Of each item, in their order, the rows that were computed without some of their experts."""
        return np.add.reduceat(self._renormalized.astype(np.int64), self._row_ends - self._lengths).tolist()

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.micro_batch.rows

    @property
    def batch(self) -> Batch:
        """The shape of the step, for its cost."""
        return Batch(self.items)

    def split(self, sequences: Collection[Request], missing: np.ndarray) -> Flight:
        """A flight of some of the sequences, at the same point of the same layer. `missing` slots are renumbered."""
        chosen = [n for n, item in enumerate(self.items) if item.sequence in sequences]
        part = Flight(self._decoder, [self.items[n] for n in chosen], self._threads, self.started_s)
        starts = self._row_ends - self._lengths
        rows = np.concatenate([np.arange(starts[n], self._row_ends[n]) for n in chosen])
        part.micro_batch.take_rows(self.micro_batch, torch.from_numpy(rows))
        part._rewire()
        top_k = self.micro_batch.topk_ids.shape[1]
        part.missing = np.searchsorted(rows, missing // top_k) * top_k + missing % top_k
        part.missing_deaths = self.missing_deaths if len(missing) else missing
        part.was_parked, part.waits_since_s = True, self.waits_since_s
        part._renormalized = self._renormalized[rows]
        return part

    def _rewire(self) -> None:
        self._topk_ids, self._expert_rows = self.micro_batch.topk_ids.numpy(), self.micro_batch.expert_rows()
