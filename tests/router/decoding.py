"""A forward pass with the experts in process: what the router's engine does, less the sockets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels.linear import Backend
from moering.checkpoint import Checkpoint
from router.attention_plan import SequenceChunk
from router.device import cpu_decoder
from router.kv_cache import KVCache
from tests.local_experts import LocalExperts


@dataclass
class Model:
    decoder: Any
    experts: LocalExperts

    @classmethod
    def open(cls, path, num_blocks: int = 8, backend: Backend = "auto") -> "Model":
        checkpoint = Checkpoint(path)
        layout = checkpoint.layout
        cache = KVCache(layout.num_layers, layout.num_kv_heads, layout.head_dim, num_blocks)
        return cls(cpu_decoder(checkpoint, cache, backend), LocalExperts(checkpoint, backend))

    @torch.inference_mode()
    def forward(self, chunks: Sequence[tuple[list[int], SequenceChunk]]) -> list[torch.Tensor]:
        """The logits of every row of each (whole sequence, chunk of it), all in one micro-batch."""
        tokens = [t for sequence, c in chunks for t in sequence[c.start : c.start + c.length]]
        mb = self.decoder.start(tokens, [chunk for _, chunk in chunks])
        for _ in range(self.decoder.config.num_layers):
            self.decoder.until_experts(mb)
            self.experts.run(mb)
            self.decoder.after_experts(mb)
        logits = self.decoder.logits(mb, list(range(len(tokens))))
        return list(logits.split([chunk.length for _, chunk in chunks]))

    def prefill(self, tokens: list[int], table: list[int], chunk_tokens: int = 256) -> torch.Tensor:
        """The logits of every position of one sequence alone, in chunks of `chunk_tokens`."""
        parts = []
        for start in range(0, len(tokens), chunk_tokens):
            length = min(chunk_tokens, len(tokens) - start)
            parts += self.forward([(tokens, SequenceChunk(table, start, length))])
        return torch.cat(parts)

    def greedy(self, prompt: list[int], steps: int, table: list[int]) -> list[int]:
        """`steps` tokens after `prompt`."""
        tokens = list(prompt)
        last = self.prefill(tokens, table)[-1]
        for _ in range(steps):
            tokens.append(int(last.argmax()))
            last = self.forward([(tokens, SequenceChunk(table, len(tokens) - 1, 1))])[0][0]
        return tokens[len(prompt) :]


def random_tokens(count: int, seed: int, vocab: int = 320) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (count,), generator=generator).tolist()
