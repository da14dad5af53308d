import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from kernels.expert_ffn import ExpertFFN, grouped_expert_ffn, numerics_fingerprint
from tests.backends import BACKENDS


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def weights_of(hidden: int, intermediate: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    gate, up, down = ((torch.randn(s, generator=generator) * s[1] ** -0.5).half() for s in shapes)
    return gate, up, down


def reference(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return (F.silu(x @ gate.double().T) * (x @ up.double().T)) @ down.double().T


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("intermediate", [96, 100, 1, 768])
def test_an_expert_computes_the_gated_network(intermediate, backend):
    weights, x = weights_of(64, intermediate), torch.randn(7, 64)
    assert (ExpertFFN(*weights, backend)(x) - reference(x, *weights)).abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("intermediate", [1536, 1000, 96, 97])
def test_a_rows_bits_do_not_depend_on_the_batch_or_the_threads(intermediate, backend):
    expert = ExpertFFN(*weights_of(192, intermediate), backend)
    x = torch.randn(130, 192, generator=torch.Generator().manual_seed(1))
    torch.set_num_threads(1)
    alone = torch.cat([expert(row[None]) for row in x])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        different = [n for n in (*range(1, 66), 85, 129, 130) if not torch.equal(expert(x[:n]), alone[:n])]
        assert different == []
        assert torch.equal(expert(x[61:]), alone[61:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_experts_equal_one_expert_at_a_time_bit_by_bit(backend):
    experts = [ExpertFFN(*weights_of(64, 96, seed), backend) for seed in range(5)]
    hidden, out = torch.randn(20, 64), torch.full((31, 64), float("nan"))
    counts = [3, 0, 17, 1, 10]
    rows = torch.randint(20, (31,))
    grouped_expert_ffn(hidden, rows, counts, experts, out)
    owners = [expert for expert, count in zip(experts, counts, strict=True) for _ in range(count)]
    expected = torch.cat([expert(hidden[row][None]) for expert, row in zip(owners, rows, strict=True)])
    assert torch.equal(out, expected)


def test_grouped_experts_refuse_counts_that_do_not_match():
    expert = ExpertFFN(*weights_of(8, 8))
    with pytest.raises(ValueError, match="do not match 3 rows"):
        grouped_expert_ffn(torch.ones(4, 8), torch.zeros(3, dtype=torch.int64), [2], [expert], torch.empty(3, 8))


def test_projections_that_do_not_match_are_refused():
    gate, up, down = weights_of(8, 16)
    with pytest.raises(ValueError, match="do not match"):
        ExpertFFN(gate, up, down.T)


def test_the_fingerprint_is_that_of_the_machine_not_of_the_process():
    code = (
        "import torch; torch.set_num_threads(1); from kernels.expert_ffn import numerics_fingerprint as f; print(f())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    torch.set_num_threads(2)
    torch.manual_seed(5)
    assert numerics_fingerprint() == other


def test_the_fingerprint_tells_backends_apart():
    assert len({numerics_fingerprint(backend) for backend in BACKENDS}) == len(BACKENDS)
