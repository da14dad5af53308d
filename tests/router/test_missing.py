"""Going on without an expert: the others' weights grow to the same sum, and nothing depends on the batch."""

import pytest
import torch

from router.attention_plan import SequenceChunk
from router.micro_batch import MicroBatch
from router.missing import hopeless, leave_out
from tests.router.decoding import Model, random_tokens
from tests.router.test_decoder_cuda import CudaModel
from tests.tiny import write_checkpoint

ROWS, TOP_K = 37, 4


def a_layer(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(ROWS, TOP_K, generator=g), 1).sort(descending=True).values


def some_missing(seed=1):
    """About a third of all slots, never all of a row."""
    g = torch.Generator().manual_seed(seed)
    gone = torch.rand(ROWS, TOP_K, generator=g) < 0.4
    gone[gone.all(1), 0] = False
    return gone


def test_the_others_grow_to_the_same_sum():
    weights, gone = a_layer(), some_missing()
    scaled = weights * 0.7  # a gate that does not normalise
    leave_out(scaled, gone.flatten().nonzero().flatten())
    assert (scaled[gone] == 0).all()
    torch.testing.assert_close(scaled.sum(1), torch.full((ROWS,), 0.7))
    kept = torch.where(gone, 0, weights)
    torch.testing.assert_close(scaled / 0.7, kept / kept.sum(1, keepdim=True))
    whole = ~gone.any(1)
    assert torch.equal(scaled[whole], weights[whole] * 0.7)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 16])
def test_a_row_has_the_same_bits_alone(rows):
    weights, gone = a_layer(), some_missing()
    whole = weights.clone()
    leave_out(whole, gone.flatten().nonzero().flatten())
    for start in range(0, ROWS - rows, rows):
        part, mine = weights[start : start + rows].clone(), gone[start : start + rows]
        leave_out(part, mine.flatten().nonzero().flatten())
        assert torch.equal(part, whole[start : start + rows])


def test_rows_of_which_nothing_is_left_are_hopeless():
    weights = a_layer()
    weights[5] = torch.tensor([1.0, 0, 0, 0])  # a softmax may give its whole weight to one
    missing = torch.tensor([4, 8, 9, 10, 11, 20])
    assert hopeless(weights, missing).tolist() == [2, 5]
    assert hopeless(weights, torch.tensor([4, 21])).tolist() == []


def logits_without_second_experts(model, tokens):
    """Logits of all positions but the last; every third row goes on with the first of its experts alone."""
    slots = torch.arange(1, 2 * len(tokens), 6)
    mb = model.decoder.start(tokens, [SequenceChunk([0], 0, len(tokens))])
    for _ in range(model.decoder.config.num_layers):
        model.decoder.until_experts(mb)
        model.experts.run(mb)
        if isinstance(mb, MicroBatch):
            mb.expert_output.view(-1, mb.expert_output.shape[-1])[slots] = float("nan")  # never written
        assert hopeless(mb.topk_weights, slots).tolist() == []
        leave_out(mb.topk_weights, slots)
        mb.expert_rows().clear(slots.numpy())
        model.decoder.after_experts(mb)
    return model.decoder.logits(mb, list(range(len(tokens) - 1))).cpu()


@torch.inference_mode()
def test_both_decoders_combine_with_what_is_left(tmp_path):
    checkpoint, tokens = write_checkpoint(tmp_path, dtype="BF16", experts=4), random_tokens(11, seed=2)
    cpu, gpu = (logits_without_second_experts(kind.open(checkpoint), tokens) for kind in (Model, CudaModel))
    whole = Model.open(checkpoint).prefill(tokens, [0])[:-1]
    assert float((gpu - cpu).norm() / cpu.norm()) < 0.05 < 0.2 < float((whole - cpu).norm() / cpu.norm())
