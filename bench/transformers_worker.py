"""transformers' `generate` in a process of its own, loaded once and idle between requests.

``python -m bench.transformers_worker CHECKPOINT DEVICE DTYPE…``. Requests and answers are lines of JSON on stdin and
stdout: the fields of `Request`, and `{"error": str}` or ``{"seconds": float, "outputs": [[token id, …], …]}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Any, TextIO


@dataclass(frozen=True)
class Request:
    """Greedy generation of exactly `tokens` new tokens for each of `prompts`, which are equally long."""

    prompts: list[list[int]]
    tokens: int
    batched: bool  # all prompts in one call; else one call after the other
    dtype: str
    experts: str  # transformers' name of a way to compute the experts
    threads: int


class Models:
    """The checkpoint, once per dtype ("auto": as the weights are stored)."""

    def __init__(self, checkpoint: str, device: str, dtypes: list[str]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch, self._device, self._by_dtype = torch, device, {}
        for dtype in dtypes:
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, local_files_only=True)
            model = model.eval().to(device)
            model.generation_config.eos_token_id = None  # like `ignore_eos`
            model.generation_config.pad_token_id = 0
            self._by_dtype[dtype] = model

    def generate(self, request: Request) -> dict[str, Any]:
        """Serve one request; the time is that of the `generate` calls alone."""
        torch = self._torch
        torch.set_num_threads(request.threads)
        model = self._by_dtype[request.dtype]
        model.set_experts_implementation(request.experts)
        batches = [request.prompts] if request.batched else [[prompt] for prompt in request.prompts]
        outputs: list[list[int]] = []
        started_s = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                ids = torch.tensor(batch, device=self._device)
                new = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=request.tokens
                )  # fmt: skip
                outputs += new[:, ids.shape[1] :].tolist()
        return {"seconds": time.perf_counter() - started_s, "outputs": outputs}


def main() -> None:
    """Serve until stdin ends."""
    answers: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    models = Models(sys.argv[1], sys.argv[2], sys.argv[3:])
    answers.write("{}\n")
    for line in sys.stdin:
        try:
            answer = models.generate(Request(**json.loads(line)))
        except RuntimeError as e:  # out of memory, or a way to compute experts that does not work here
            answer = {"error": str(e)[:500]}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
