"""The decoder against transformers, and the bits of a row whatever is computed with it."""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from moering.checkpoint import Checkpoint
from router.attention_plan import SequenceChunk
from router.decoder import Decoder
from router.kv_cache import KVCache
from tests.backends import BACKENDS
from tests.router.decoding import Model, random_tokens
from tests.tiny import write_checkpoint

VARIANTS = {
    "mixtral": dict(family="mixtral"),
    "mixtral-fused": dict(family="mixtral", fused=True, dtype="BF16"),
    "mixtral-fp32": dict(family="mixtral", dtype="F32", heads=6, kv_heads=2, top_k=3),
    "mixtral-one-head": dict(family="mixtral", heads=1, kv_heads=1, head_dim=16, experts=4),
    "mixtral-tied": dict(family="mixtral", shards=1, config={"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": dict(family="qwen3_moe", heads=8, kv_heads=1, top_k=4),
    "qwen3-wide": dict(family="qwen3_moe", heads=6, kv_heads=2, head_dim=80),
    "qwen3-fused": dict(family="qwen3_moe", fused=True),
    "qwen3-unnormalized": dict(family="qwen3_moe", config={"norm_topk_prob": False}),
}


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=VARIANTS, scope="module")
def checkpoint(request, tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp(request.param), **VARIANTS[request.param])
    if request.param == "mixtral-tied":
        file = path / "model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if k != "lm_head.weight"}, file, {"format": "pt"})
    return path


@pytest.fixture(params=["mixtral-fp32", "qwen3"], scope="module")
def invariant_checkpoint(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp(request.param), **(VARIANTS[request.param] | {"dtype": "F16"}))


def reference(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def test_logits_and_greedy_tokens_are_those_of_transformers(checkpoint):
    oracle = reference(checkpoint)
    for backend in BACKENDS:
        model = Model.open(checkpoint, backend=backend)
        tokens = random_tokens(90, seed=1)
        with torch.no_grad():
            expected = oracle(torch.tensor([tokens])).logits[0]
        logits = model.prefill(tokens, [3], chunk_tokens=40)
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        for seed in (2, 3):
            prompt = torch.tensor([random_tokens(9, seed)])
            whole = oracle.generate(prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None)
            assert model.greedy(prompt[0].tolist(), 64, [5]) == whole[0, 9:].tolist()


def test_the_experts_of_the_checkpoints_matter(checkpoint, monkeypatch):
    model = Model.open(checkpoint)
    tokens = random_tokens(40, seed=1)
    logits = model.prefill(tokens, [0])
    monkeypatch.setattr(model.experts, "run", lambda mb: mb.expert_output.zero_())
    assert (model.prefill(tokens, [0]) - logits).abs().max() >= 0.1 * logits.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_gives_the_bits_of_prefill_at_every_position(invariant_checkpoint, backend):
    model = Model.open(invariant_checkpoint, backend=backend)
    tokens = random_tokens(1100, seed=4)  # every position modulo 512, after 0, 1 and 2 whole blocks
    prefilled = model.prefill(tokens, [0, 1, 2])
    decoded = [
        model.forward([(tokens, SequenceChunk([4, 5, 6], position, 1))])[0][0] for position in range(len(tokens))
    ]
    assert [p for p, row in enumerate(decoded) if not torch.equal(row, prefilled[p])] == []


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_do_not_depend_on_batch_chunks_blocks_or_threads(invariant_checkpoint, backend, threads):
    """Eight sequences go through in random chunks and company, their blocks in order and scattered."""
    rng = random.Random(threads)
    model = Model.open(invariant_checkpoint, num_blocks=24, backend=backend)
    sequences = [random_tokens(length, seed) for seed, length in enumerate((1090, 530, 515, 300, 200, 130, 70, 5))]
    alone = [model.prefill(tokens, [0, 1, 2]) for tokens in sequences]
    torch.set_num_threads(threads)
    different = []
    for blocks in (list(range(24)), rng.sample(range(24), 24)):
        tables = [blocks[3 * i : 3 * i + 3] for i in range(8)]
        for batch in _random_schedule(rng, [len(tokens) for tokens in sequences]):
            chunks = [(sequences[i], SequenceChunk(tables[i], start, length)) for i, start, length in batch]
            for (i, start, length), logits in zip(batch, model.forward(chunks), strict=True):
                if not torch.equal(logits, alone[i][start : start + length]):
                    different.append((i, start, length))
    assert different == []


def _random_schedule(rng: random.Random, lengths: list[int]):
    """Batches of (sequence, start, length) that compute each sequence once, mostly decode rows and small chunks."""
    done = [0] * len(lengths)
    while unfinished := [i for i, length in enumerate(lengths) if done[i] < length]:
        batch = []
        for i in rng.sample(unfinished, rng.randint(1, len(unfinished))):
            length = min(rng.choice((1, 1, 1, 2, 3, 5, 7, 16, 33, 130, 400)), lengths[i] - done[i])
            batch.append((i, done[i], length))
            done[i] += length
        yield batch


def test_stale_contents_of_a_block_change_nothing(invariant_checkpoint):
    model, tokens = Model.open(invariant_checkpoint, num_blocks=1), random_tokens(20, seed=6)
    fresh = model.prefill(tokens, [0])
    model.prefill(random_tokens(512, seed=7), [0])
    assert torch.equal(model.prefill(tokens, [0]), fresh)


def test_a_micro_batch_says_where_it_is(invariant_checkpoint):
    decoder = Model.open(invariant_checkpoint).decoder
    mb = decoder.start([5, 6, 7], [SequenceChunk([0], 0, 2), SequenceChunk([1], 0, 1)])
    assert (mb.rows, mb.layer, mb.positions.tolist()) == (3, 0, [0, 1, 0])
    decoder.until_experts(mb)
    assert mb.topk_ids.shape == mb.topk_weights.shape == (3, decoder.config.top_k)
    mb.expert_output.zero_()
    decoder.after_experts(mb)
    assert mb.layer == 1


def test_tokens_that_do_not_match_the_chunks_are_refused(invariant_checkpoint):
    decoder = Model.open(invariant_checkpoint).decoder
    with pytest.raises(ValueError, match=r"2 tokens do not match chunks of \[3\]"):
        decoder.start([5, 6], [SequenceChunk([0], 0, 3)])


def test_no_expert_tensor_is_read(invariant_checkpoint):
    checkpoint = Checkpoint(invariant_checkpoint)
    layout = checkpoint.layout
    Decoder(checkpoint, KVCache(layout.num_layers, layout.num_kv_heads, layout.head_dim, 1))
    payload = sum(f.stat().st_size for f in checkpoint.path.glob("*.safetensors"))
    experts = checkpoint.num_layers * checkpoint.num_experts * checkpoint.expert_bytes
    assert 0 < checkpoint.bytes_read < payload - experts
