import pytest
import torch

from kernels.rms_norm import RMSNorm, new_stream

EPS = 1e-2  # large, so that losing it shows


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def expected(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.mark.parametrize("size", [576, 100, 64])
def test_both_forms_are_the_norm(size):
    x, weight = torch.randn(7, size) * 0.1, torch.rand(size)
    norm = RMSNorm(weight, EPS)
    assert (norm(x, out=torch.empty_like(x)) - expected(x, weight)).abs().max() < 2e-6
    assert (norm.of_stream(new_stream(x, EPS), out=torch.empty_like(x)) - expected(x, weight)).abs().max() < 2e-6


def test_heads_are_normed_one_by_one_in_place():
    x, weight = torch.randn(5, 3, 16), torch.rand(3, 16)
    reference = expected(x, weight)
    assert (RMSNorm(weight, EPS)(x, out=x) - reference).abs().max() < 2e-6


@pytest.mark.parametrize("size", [576, 2048, 100])
def test_a_rows_bits_do_not_depend_on_the_batch_or_the_threads(size):
    x, norm = torch.randn(130, size), RMSNorm(torch.rand(size), EPS)
    forms = (
        lambda rows: norm(rows, out=torch.empty_like(rows)),
        lambda rows: norm.of_stream(new_stream(rows, EPS), out=torch.empty_like(rows)),
    )
    for form in forms:
        torch.set_num_threads(1)
        alone = torch.cat([form(row[None]) for row in x])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert [n for n in range(1, 131) if not torch.equal(form(x[:n]), alone[:n])] == []


def test_adding_to_the_first_columns_keeps_a_stream_normable():
    x, gain, weight = torch.randn(3, 64), torch.randn(3, 64), torch.rand(64)
    stream = new_stream(x, EPS)
    stream[:, :64].add_(gain)
    normed = RMSNorm(weight, EPS).of_stream(stream, out=torch.empty(3, 64))
    assert (normed - expected(x + gain, weight)).abs().max() < 2e-6
