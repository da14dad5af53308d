import pytest
import torch

from kernels.linear import MAX_PACK_ERROR, PackedLinear, rounded_to_fp16
from tests.backends import BACKENDS

ROWS = 300
SHAPES = [(576, 576), (960, 576), (576, 1536), (256, 2048), (8, 576), (40, 24)]  # out, in


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def weight_of(out_features: int, in_features: int, dtype=torch.float16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out_features + in_features)
    return (torch.randn(out_features, in_features, generator=generator) * 0.02).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_rows_bits_do_not_depend_on_the_row_count_or_the_threads(shape, backend):
    linear = PackedLinear(weight_of(*shape), backend)
    x = torch.randn(ROWS, shape[1], generator=torch.Generator().manual_seed(1))
    torch.set_num_threads(1)
    alone = torch.cat([linear(row[None]) for row in x])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        counts = range(1, ROWS + 1) if shape[0] * shape[1] < 10_000 else [*range(1, 70), 100, 127, 128, 129, 255, 300]
        different = [n for n in counts if not torch.equal(linear(x[:n]), alone[:n])]
        assert different == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rows_bits_do_not_depend_on_its_place(backend):
    linear = PackedLinear(weight_of(96, 64), backend)
    x = torch.randn(64, 64)
    whole = linear(x)
    for start in range(1, 64):
        assert torch.equal(linear(x[start:]), whole[start:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_product_is_exact_in_the_weights(backend, dtype):
    weight, x = weight_of(192, 128, dtype), torch.randn(5, 128)
    expected = x.double() @ weight.double().T
    assert (PackedLinear(weight, backend)(x).double() - expected).abs().max() < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_weights_that_fp16_holds_are_kept_as_fp16(backend):
    exact = weight_of(64, 16)
    halved = 4 if backend == "portable" else 2
    for weight in (exact, exact.float(), exact.bfloat16()):
        assert PackedLinear(weight, backend).nbytes == halved * weight.numel()
    assert PackedLinear(exact.float() + 1e-6, backend).nbytes == 4 * exact.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_beyond_fp16_are_kept_as_they_are(backend):
    too_large = torch.full((4, 4), 1e5, dtype=torch.bfloat16)
    linear = PackedLinear(too_large, backend)
    assert torch.equal(linear(torch.ones(1, 4)), torch.full((1, 4), 4 * float(too_large[0, 0])))


def test_rounding_to_fp16_has_a_bound():
    on_grid = torch.tensor([[1.0]])
    assert torch.equal(rounded_to_fp16(on_grid).float(), on_grid)
    near = torch.tensor([[1e-5 + MAX_PACK_ERROR / 1024]])
    assert torch.equal(rounded_to_fp16(near), near.half())
    assert rounded_to_fp16(on_grid + 4 * MAX_PACK_ERROR) is None
    assert rounded_to_fp16(torch.tensor([[float("nan")]], dtype=torch.float16)) is None


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'int8'"):
        PackedLinear(weight_of(4, 4), "int8")  # type: ignore[arg-type]


def test_the_portable_backend_leaves_the_thread_count_alone():
    torch.set_num_threads(2)
    PackedLinear(weight_of(4, 4), "portable")(torch.ones(3, 4))
    assert torch.get_num_threads() == 2
