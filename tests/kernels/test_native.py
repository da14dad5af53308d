"""The C kernels by themselves. Bits by rows, chunks, blocks and threads are tested for every backend: test_linear,
test_expert_ffn, tests/router/test_decoder.

Where they were not built there is nothing to test, and `BACKENDS` is without them.
"""

import json
import shutil
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
import torch

from kernels.expert_ffn import ExpertFFN
from kernels.linear import PackedLinear
from kernels.native_decoder import supported
from kernels.native_linear import NativeLinear, available
from moering.checkpoint import Checkpoint
from router import decoder, decoder_native
from router.attention_plan import SequenceChunk
from router.device import cpu_decoder
from router.kv_cache import BLOCK_SIZE, KVCache
from tests.backends import INSTRUCTIONS, computing_with
from tests.router.decoding import Model, random_tokens
from tests.tiny import write_checkpoint

if available():
    from kernels import _native

ROOT = Path(__file__).parents[2]
SIZES = [(64, 96), (70, 100), (16, 1), (200, 65)]  # hidden, intermediate: multiples of a vector and of a panel, and not


def cpu_flags() -> set[str]:
    with open("/proc/cpuinfo") as file:
        return set(next((line for line in file if line.startswith("flags")), "").split())


def installed_from_here() -> bool:
    """Whether this tree was installed, and not another one or none."""
    urls = [d.read_text("direct_url.json") for d in metadata.distributions(name="moering")]
    return any(json.loads(url)["url"] == ROOT.as_uri() for url in urls if url)


def test_they_are_built_where_they_can_be():
    header = Path(sysconfig.get_path("include"), "Python.h")
    can_be = shutil.which("cc") is not None and header.exists() and {"avx2", "fma", "f16c"} <= cpu_flags()
    assert available() == can_be or not installed_from_here()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_an_expert_against_float64(sizes, dtype):
    hidden, inter = sizes
    generator = torch.Generator().manual_seed(hidden)
    shapes = ((inter, hidden), (inter, hidden), (hidden, inter))
    weights = [(torch.randn(shape, generator=generator) * 0.1).to(dtype) for shape in shapes]
    x = torch.randn(9, hidden, generator=generator)
    gate, up, down = (weight.double() for weight in weights)
    expected = (torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
    for name in INSTRUCTIONS:
        with computing_with(name):
            assert (
                ExpertFFN(weights[0], weights[1], weights[2], "native")(x) - expected
            ).abs().max() < 1e-6 * expected.abs().max()


def test_gates_far_from_zero():
    gate, up, down = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0], [0.0]])
    for value in (-1e30, -200.0, -88.5, -87.0, -1e-30, 0.0, 87.0, 88.5, 200.0, 1e30):
        expected = float(torch.nn.functional.silu(torch.tensor(value, dtype=torch.float64)))
        for name in INSTRUCTIONS:
            with computing_with(name):
                got = ExpertFFN(gate, up, down, "native")(torch.tensor([[value, 1.0]]))
            assert float(got[0, 0]) == pytest.approx(expected, rel=1e-6, abs=1e-30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("outputs", [65, 110, 200])
def test_every_tile_gives_a_row_the_same_bits_and_writes_nothing_else(outputs, dtype):
    weight, x, products = torch.randn(outputs, 65).to(dtype), torch.randn(13, 65), []
    for name in INSTRUCTIONS:
        with computing_with(name):
            linear = NativeLinear(weight)
            for rows in range(1, len(x) + 1):
                room = torch.full((rows + 1, outputs), float("nan"))
                _native.linear(linear.address, x.data_ptr(), 65, rows, room.data_ptr(), outputs, 1)
                assert room[rows].isnan().all()
                products.append(room[:rows])
    assert all(torch.equal(product, products[-1][: len(product)]) for product in products)


def test_what_is_no_row_of_the_weights_inputs_is_refused():
    expert = ExpertFFN(torch.randn(40, 25), torch.randn(40, 25), torch.randn(25, 40))
    for wrong in (torch.randn(3, 24), torch.randn(3, 25).double(), torch.randn(3, 25).half()):
        for call in (PackedLinear(torch.randn(40, 25)), expert) if available() else ():
            with pytest.raises(ValueError, match="where 25 float32 are needed"):
                call(wrong)


def test_rows_that_are_not_neighbours_in_memory():
    weight, wide = torch.randn(40, 24), torch.randn(5, 30)
    for name in INSTRUCTIONS:
        with computing_with(name):
            linear = PackedLinear(weight, "native")
            assert torch.equal(linear(wide[:, 3:27]), linear(wide[:, 3:27].contiguous()))
            expert = ExpertFFN(weight, weight, weight.T, "native")
            assert torch.equal(expert(wide[:, 3:27]), expert(wide[:, 3:27].contiguous()))
            assert torch.equal(linear(wide[:, :24].T.contiguous().T), linear(wide[:, :24].contiguous()))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_each_instruction_set_has_the_same_bits(tmp_path, family):
    model = Model.open(
        write_checkpoint(tmp_path, family=family, hidden=72, heads=6, kv_heads=2, head_dim=80, experts=20, top_k=3)
    )
    tokens, logits = random_tokens(540, seed=1), []
    for name in INSTRUCTIONS:
        with computing_with(name):
            logits.append(model.prefill(tokens, [0, 1], chunk_tokens=200))
    assert all(torch.equal(other, logits[0]) for other in logits)


def test_heads_that_they_cannot_compute_are_left_to_pytorch(tmp_path):
    for head_dim, here in ((16, available()), (24, False)):
        checkpoint = Checkpoint(write_checkpoint(tmp_path / str(head_dim), head_dim=head_dim))
        layout = checkpoint.layout
        assert supported(layout.num_heads, layout.num_kv_heads, head_dim, BLOCK_SIZE) == here
        cache = KVCache(layout.num_layers, layout.num_kv_heads, head_dim, 1)
        kind = decoder_native.Decoder if here else decoder.Decoder
        assert type(cpu_decoder(checkpoint, cache)) is kind


def until_experts(model: Model, gate_weight: torch.Tensor):
    """Two rows before the experts of the first layer, with another gate."""
    decoder, gate = model.decoder, NativeLinear(gate_weight)
    decoder._layers[0]._layer.gate = gate.weight
    mb = decoder.start(random_tokens(2, seed=1), [SequenceChunk([0], 0, 2)])
    decoder.until_experts(mb)
    return mb


def test_equal_scores_go_to_the_lower_ids_and_undefined_ones_to_different_experts(tmp_path):
    model = Model.open(write_checkpoint(tmp_path, experts=8, top_k=3))
    hidden = model.decoder.config.hidden_size
    for name in INSTRUCTIONS:
        with computing_with(name):
            equal = until_experts(model, torch.zeros(8, hidden))
            assert equal.topk_ids.tolist() == [[0, 1, 2]] * 2
            undefined = until_experts(model, torch.full((8, hidden), float("nan")))
            assert undefined.topk_ids.tolist() == [[0, 1, 2]] * 2
            assert undefined.topk_weights.isnan().all()


def test_a_key_that_is_no_number_makes_the_logits_none(tmp_path):
    model = Model.open(write_checkpoint(tmp_path), num_blocks=1)
    tokens = random_tokens(5, seed=2)
    for name in INSTRUCTIONS:
        with computing_with(name):
            assert model.prefill(tokens[:4], [0]).isfinite().all()
            for layer in model.decoder._layers:
                layer.cache[1, 0] = float("nan")
            assert model.forward([(tokens, SequenceChunk([0], 4, 1))])[0].isnan().all()


def test_blocks_that_are_not_there_are_refused(tmp_path):
    model = Model.open(write_checkpoint(tmp_path), num_blocks=2)
    for table in ([0], [0, 2], [0, -1]) if available() else ():
        with pytest.raises(ValueError, match="positions up to 520 in the blocks"):
            model.decoder.start(random_tokens(520, seed=3), [SequenceChunk(table, 0, 520)])
