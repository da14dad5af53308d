"""The GPU's decoder against transformers, and the bits of its rows; interpreted without a GPU, on a tiny model."""

from __future__ import annotations

import random

import pytest
import torch

from moering.checkpoint import Checkpoint
from router.attention_plan import SequenceChunk
from router.decoder_cuda import Decoder
from router.kv_cache_cuda import KVCache
from router.sampler import Sampler
from router.sampler_cuda import Sampler as CudaSampler
from tests.fp8 import quantize, widen
from tests.interpreter import DEVICE
from tests.local_experts_cuda import LocalExperts
from tests.router.decoding import Model, random_tokens
from tests.router.test_sampler import make
from tests.tiny import write_checkpoint

GPU = DEVICE == "cuda"
MAX_ROWS = 512
# enough that transformers in bf16 differs from itself in fp32 by about as much
TOLERANCE = 0.05


class CudaModel(Model):
    @classmethod
    def open(cls, path, num_blocks=96, graph_rows=(1, 2, 4, 8)):
        checkpoint = Checkpoint(path)
        layout = checkpoint.layout
        cache = KVCache(layout.num_layers, layout.num_kv_heads, layout.head_dim, num_blocks, DEVICE)
        decoder = Decoder(checkpoint, cache, MAX_ROWS, 16, 2048, DEVICE, graph_rows)
        return cls(decoder, LocalExperts(checkpoint, DEVICE))


VARIANTS = {
    "mixtral": dict(family="mixtral", dtype="BF16"),
    "qwen3": dict(family="qwen3_moe", heads=8, kv_heads=1, top_k=4, dtype="BF16"),
    "qwen3-unnormalized": dict(family="qwen3_moe", config={"norm_topk_prob": False}, dtype="BF16"),
}


@pytest.fixture(params=VARIANTS, scope="module")
def checkpoint(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp(request.param), **VARIANTS[request.param])


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("qwen3"), **VARIANTS["qwen3"])


def test_logits_are_those_of_transformers(checkpoint):
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokens = random_tokens(70 if GPU else 9, seed=1)
    with torch.no_grad():
        expected = oracle(torch.tensor([tokens])).logits[0]
    logits = CudaModel.open(checkpoint).prefill(tokens, [3, 1], chunk_tokens=40 if GPU else 5).cpu()
    # a gate that rounds to another choice of experts moves a whole row: the median row is what arithmetic makes of it
    errors = (logits - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(errors.median()) < TOLERANCE and float(errors.mean()) < 3 * TOLERANCE


def test_logits_of_fp8_weights_are_those_of_what_they_stand_for(tmp_path):
    from transformers import AutoModelForCausalLM

    plain = write_checkpoint(tmp_path / "plain", "qwen3_moe", hidden=128, intermediate=128)
    fp8 = quantize(plain, tmp_path / "fp8")
    oracle = AutoModelForCausalLM.from_pretrained(widen(fp8, tmp_path / "wide", torch.float32), dtype=torch.float32)
    tokens = random_tokens(70 if GPU else 9, seed=1)
    with torch.no_grad():
        expected = oracle.eval()(torch.tensor([tokens])).logits[0]
    logits = CudaModel.open(fp8).prefill(tokens, [3, 1]).cpu()
    errors = (logits - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(errors.median()) < TOLERANCE


def test_decode_continues_prefill(qwen3):
    """On a GPU bit by bit; interpreted, up to rounding."""
    length = 700 if GPU else 12
    tokens, table = random_tokens(length, seed=4), list(range(11))
    model = CudaModel.open(qwen3)
    prefilled = model.prefill(tokens, table)
    different = []
    for position in range(0 if GPU else length - 2, length):
        logits = model.forward([(tokens, SequenceChunk(table, position, 1))])[0][0]
        same = torch.equal(logits, prefilled[position]) if GPU else close(logits, prefilled[position])
        different += [] if same else [position]
    assert different == []


def test_logits_of_one_step_may_be_asked_for_in_parts(qwen3):
    """The experts' outputs of the last layer are added to the residual once."""
    tokens, model = random_tokens(6, seed=5), CudaModel.open(qwen3)
    with torch.inference_mode():
        mb = model.decoder.start(tokens, [SequenceChunk([0], 0, len(tokens))])
        for _ in range(model.decoder.config.num_layers):
            model.decoder.until_experts(mb)
            model.experts.run(mb)
            model.decoder.after_experts(mb)
        first, second = model.decoder.logits(mb, [0, 1, 2]), model.decoder.logits(mb, [0, 1, 2])
    assert torch.equal(first, second)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).norm() / b.norm()) < 0.05


def test_bits_do_not_depend_on_batch_chunks_blocks_or_padding(qwen3):
    """Sequences go through in random chunks and company, with graphs and without, their pages scattered."""
    rng = random.Random(1)
    lengths = (700, 530, 300, 257, 130, 70, 64, 5) if GPU else (6, 3)
    sequences = [random_tokens(n, seed) for seed, n in enumerate(lengths)]
    model = CudaModel.open(qwen3)
    alone = [model.prefill(tokens, list(range(11))) for tokens in sequences]
    pages = rng.sample(range(96), 96)
    tables = [pages[11 * i : 11 * i + 11] for i in range(len(lengths))]
    done, different = [0] * len(lengths), []
    while unfinished := [i for i, n in enumerate(lengths) if done[i] < n]:
        chunks = []
        for i in rng.sample(unfinished, rng.randint(1, len(unfinished))):
            n = min(rng.choice((1, 1, 1, 1, 2, 7, 33, 130)) if GPU else rng.choice((1, 2, 3)), lengths[i] - done[i])
            chunks.append((sequences[i], SequenceChunk(tables[i], done[i], n)))
            done[i] += n
        for (tokens, chunk), logits in zip(chunks, model.forward(chunks), strict=True):
            expected = alone[sequences.index(tokens)][chunk.start : chunk.start + chunk.length]
            if not (torch.equal(logits, expected) if GPU else close(logits, expected)):
                different.append((len(tokens), chunk.start, chunk.length))
    assert different == []


def test_rows_that_are_split_off_go_on_with_the_same_bits(qwen3):
    """What the engine does when experts of some rows are missing: they wait, the others go on."""
    model = CudaModel.open(qwen3)
    decoder = model.decoder
    tokens, chunks = random_tokens(3, seed=5), [SequenceChunk([i], 0, 1) for i in range(3)]
    with torch.inference_mode():
        whole = model.forward([(tokens[i : i + 1], chunk) for i, chunk in enumerate(chunks)])
        mb = decoder.start(tokens, chunks)
        decoder.until_experts(mb)
        parts = []
        for rows in ([0, 2], [1]):
            part = decoder.start([tokens[r] for r in rows], [chunks[r] for r in rows])
            part.take_rows(mb, torch.tensor(rows))
            parts.append(part)
        del mb
        for part, rows in zip(parts, ([0, 2], [1]), strict=True):
            while True:
                model.experts.run(part)
                decoder.after_experts(part)
                if part.layer == decoder.config.num_layers:
                    break
                decoder.until_experts(part)
            for logits, row in zip(decoder.logits(part, list(range(len(rows)))), rows, strict=True):
                assert torch.equal(logits, whole[row][0]) if GPU else close(logits, whole[row][0])


def test_buffers_are_used_again_when_a_micro_batch_is_gone(qwen3):
    decoder = CudaModel.open(qwen3).decoder
    first = decoder.start([5], [SequenceChunk([0], 0, 1)])
    second = decoder.start([5], [SequenceChunk([1], 0, 1)])
    assert first.step.buffers is not second.step.buffers
    used = first.step.buffers
    del first
    assert decoder.start([6], [SequenceChunk([0], 0, 1)]).step.buffers is used


def test_what_does_not_fit_is_refused(qwen3):
    decoder = CudaModel.open(qwen3).decoder
    with pytest.raises(ValueError, match=r"2 tokens do not match chunks of \[3\]"):
        decoder.start([5, 6], [SequenceChunk([0], 0, 3)])
    with pytest.raises(ValueError, match="513 rows in one step; this decoder is built for 512"):
        decoder.start([5] * 513, [SequenceChunk(list(range(9)), 0, 513)])


def test_the_sampler_draws_what_the_one_on_the_host_draws():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    logits[1, [7, 30]] = 9.0  # two largest: the lower id
    logits[2, 4] = float("nan")
    logits[3] = float("-inf")
    sequences = [
        make(temperature=0.0), make(temperature=0.0), make(temperature=0.0), make(temperature=0.0),
        make(temperature=0.8, seed=3), make(temperature=0.0, logprobs=2, logits_digest=True),
    ]  # fmt: skip
    assert CudaSampler()(logits.to(DEVICE), sequences) == Sampler()(logits, sequences)
