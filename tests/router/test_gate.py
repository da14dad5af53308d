import pytest
import torch

from moering.checkpoint import Checkpoint
from router.gate import Gate
from router.model_config import MoEModelConfig
from tests.backends import BACKENDS
from tests.tiny import write_checkpoint


def config_of(tmp_path, **options) -> MoEModelConfig:
    return MoEModelConfig.from_checkpoint(Checkpoint(write_checkpoint(tmp_path, layers=1, hidden=32, **options)))


def route(gate: Gate, x: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, weights = torch.empty(len(x), top_k, dtype=torch.int64), torch.empty(len(x), top_k)
    gate(x, ids, weights)
    return ids, weights


@pytest.mark.parametrize("normalize", [True, False])
def test_the_heaviest_experts_and_their_softmax(tmp_path, normalize):
    config = config_of(tmp_path, family="qwen3_moe", top_k=3, config={"norm_topk_prob": normalize})
    weight, x = torch.randn(8, 32), torch.randn(20, 32)
    ids, weights = route(Gate(weight, config, "portable"), x, 3)
    expected, expected_ids = (x @ weight.T).softmax(-1).topk(3)
    if normalize:
        expected = expected / expected.sum(-1, keepdim=True)
    assert torch.equal(ids, expected_ids)
    assert (weights - expected).abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_ties_are_settled_alike_whatever_the_batch(tmp_path, top_k, backend):
    """Equal gate rows, as every expert pair of the default model has them."""
    config = config_of(tmp_path, family="qwen3_moe", top_k=top_k)
    weight = torch.randn(4, 32).half().repeat_interleave(2, 0)
    gate, x = Gate(weight, config, backend), torch.randn(64, 32)
    alone = [route(gate, row[None], top_k) for row in x]
    all_ids, all_weights = torch.cat([ids for ids, _ in alone]), torch.cat([weights for _, weights in alone])
    for n in range(1, 65):
        ids, weights = route(gate, x[:n], top_k)
        assert torch.equal(ids, all_ids[:n])
        assert torch.equal(weights, all_weights[:n])
    if top_k == 2:
        assert torch.equal(all_ids.sort().values[:, 0] ^ 1, all_ids.sort().values[:, 1])  # a pair: 2i and 2i + 1
        assert torch.equal(all_weights, torch.full((64, 2), 0.5))
