"""How far tokens are from the choice of transformers in float32, which reads the same text.

``python -m bench.transformers_scores CHECKPOINT DEVICE < sequences.json``: a list of [prompt, output] on stdin, equally
long prompts and outputs. Prints {"gaps": [[float, …], …], "spread": float}: for each token of each output, by how much
the largest logit exceeds its own (0: it is the choice), and the standard deviation of all logits.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

BATCH = 4


def score(checkpoint: str, device: str, sequences: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """See above."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    model = model.eval().to(device)
    gaps: list[list[float]] = []
    spread = 0.0
    with torch.inference_mode():
        for start in range(0, len(sequences), BATCH):
            batch = sequences[start : start + BATCH]
            ids = torch.tensor([prompt + output for prompt, output in batch], device=device)
            new = len(batch[0][1])
            logits = model(ids, logits_to_keep=new + 1).logits[:, :-1]
            own = logits.gather(-1, ids[:, -new:, None]).squeeze(-1)
            gaps += (logits.amax(-1) - own).tolist()
            spread = float(logits.std())
    return {"gaps": gaps, "spread": spread}


def main() -> None:
    """Entry point."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    answer.write(json.dumps(score(sys.argv[1], sys.argv[2], json.load(sys.stdin))))
    answer.flush()


if __name__ == "__main__":
    main()
