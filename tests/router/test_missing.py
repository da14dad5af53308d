"""Going on without an expert: the others' weights grow to the same sum, and nothing depends on the batch."""

import pytest
import torch

from router.missing import hopeless, leave_out

ROWS, TOP_K, HIDDEN = 37, 4, 8


def a_layer(seed=0):
    g = torch.Generator().manual_seed(seed)
    weights = torch.softmax(torch.randn(ROWS, TOP_K, generator=g), 1).sort(descending=True).values
    return weights, torch.randn(ROWS, TOP_K, HIDDEN, generator=g)


def some_missing(seed=1):
    """About a third of all slots, never all of a row."""
    g = torch.Generator().manual_seed(seed)
    gone = torch.rand(ROWS, TOP_K, generator=g) < 0.4
    gone[gone.all(1), 0] = False
    return gone


def test_the_others_grow_to_the_same_sum():
    weights, outputs = a_layer()
    scaled = weights * 0.7  # a gate that does not normalise
    gone, before = some_missing(), outputs.clone()
    outputs[gone] = float("nan")  # never written
    leave_out(scaled, outputs, gone.flatten().nonzero().flatten())
    assert (scaled[gone] == 0).all() and (outputs[gone] == 0).all()
    torch.testing.assert_close(scaled.sum(1), torch.full((ROWS,), 0.7))
    kept = torch.where(gone, 0, weights)
    torch.testing.assert_close(scaled / 0.7, kept / kept.sum(1, keepdim=True))
    assert torch.equal(outputs[~gone], before[~gone])
    whole = ~gone.any(1)
    assert torch.equal(scaled[whole], weights[whole] * 0.7)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 16])
def test_a_row_has_the_same_bits_alone(rows):
    weights, outputs = a_layer()
    gone = some_missing()
    whole = weights.clone()
    leave_out(whole, outputs.clone(), gone.flatten().nonzero().flatten())
    for start in range(0, ROWS - rows, rows):
        part, mine = weights[start : start + rows].clone(), gone[start : start + rows]
        leave_out(part, outputs[start : start + rows].clone(), mine.flatten().nonzero().flatten())
        assert torch.equal(part, whole[start : start + rows])


def test_rows_of_which_nothing_is_left_are_hopeless():
    weights, _ = a_layer()
    weights[5] = torch.tensor([1.0, 0, 0, 0])  # a softmax may give its whole weight to one
    missing = torch.tensor([4, 8, 9, 10, 11, 20])
    assert hopeless(weights, missing).tolist() == [2, 5]
    assert hopeless(weights, torch.tensor([4, 21])).tolist() == []
