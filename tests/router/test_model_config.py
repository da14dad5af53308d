import pytest

from moering.checkpoint import Checkpoint
from moering.errors import CheckpointError
from router.model_config import MoEModelConfig
from tests.tiny import write_checkpoint


def read(tmp_path, family="mixtral", **config) -> MoEModelConfig:
    return MoEModelConfig.from_checkpoint(Checkpoint(write_checkpoint(tmp_path, family, layers=1, config=config)))


def test_mixtral(tmp_path):
    config = read(tmp_path)
    assert (config.num_layers, config.num_experts, config.top_k, config.moe_intermediate_size) == (1, 8, 2, 96)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (4, 2, 32, 320)
    assert (config.rms_norm_eps, config.rope_theta, config.max_positions) == (1e-5, 1e4, 4096)
    assert config.normalize_topk
    assert not config.head_norms


def test_qwen3(tmp_path):
    config = read(tmp_path, "qwen3_moe", norm_topk_prob=False, sliding_window=4096, use_sliding_window=False)
    assert config.head_norms
    assert not config.normalize_topk


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
    ],
)
def test_rope_theta_is_found_where_any_version_writes_it(tmp_path, rope):
    assert read(tmp_path, **rope).rope_theta == 5e5


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("mixtral", {"sliding_window": 4096}, "sliding_window 4096 is not supported"),
        ("qwen3_moe", {"sliding_window": 64, "use_sliding_window": True}, "sliding_window 64 is not supported"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias is not supported"),
        ("mixtral", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn.*only the default kind"),
        ("mixtral", {"rope_parameters": "fast"}, "'fast', not an object"),
        ("mixtral", {"rms_norm_eps": 0}, "rms_norm_eps is 0, not a positive number"),
        ("mixtral", {"rope_theta": "1e4"}, "rope_theta is '1e4', not a positive number"),
        ("mixtral", {"max_position_embeddings": None}, "max_position_embeddings is None"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(tmp_path, family, config, message):
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, family, **config)
