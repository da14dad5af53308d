"""The GPU's backend: interpreted without a GPU, on tiny experts."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import expert_server.backend_cuda as module
from expert_server import host_replicas_cuda, slots_cuda
from expert_server.backend import NoRoom
from expert_server.backend_cuda import CudaBackend, warm_up_calls
from expert_server.formats_cuda import Bf16, Fp8, format_of
from kernels import expert_ffn, reference
from kernels.quantized_weight import pack_fp8
from kernels.tensors import as_tensor, stored_tensor
from kernels.triton_pack import pack_fp8_into
from kernels.triton_quantized_ffn import choose_quantized_tiling
from kernels.triton_small_tiles import MAX_PAIRS
from kernels.triton_tiling import choose_tiling
from moering.checkpoint import Checkpoint
from moering.errors import ConfigError
from moering.protocol import MAX_FRAME_BYTES
from tests.fp8 import quantize
from tests.interpreter import DEVICE
from tests.tiny import write_checkpoint

TOLERANCE = 1.2e-2 if DEVICE == "cpu" else 6e-3  # the interpreter truncates to bf16 where a GPU rounds
SIZES = {"bf16": (64, 96), "fp8": (128, 256)}


@pytest.fixture(scope="module", params=SIZES)
def checkpoint(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("c")
    hidden, intermediate = SIZES[request.param]
    path = write_checkpoint(directory / "bf16", hidden=hidden, intermediate=intermediate, layers=1, dtype="BF16")
    return Checkpoint(path if request.param == "bf16" else quantize(path, directory / "fp8"))


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fp8")
    path = write_checkpoint(directory / "bf16", hidden=256, intermediate=128, layers=1, dtype="BF16")
    return Checkpoint(quantize(path, directory / "fp8"))


@pytest.fixture
def fp8_backend(fp8, monkeypatch):
    monkeypatch.setattr(slots_cuda, "COPY_BYTES", 4000)
    slots = slots_cuda.Slots(format_of(fp8), 2, torch.device(DEVICE))
    return SimpleNamespace(slots=slots, host_replicas=host_replicas_cuda.PinnedReplicas(slots, 1))


@pytest.fixture(scope="module")
def backend(checkpoint):
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "CALL_PAIRS", 64)
    patch.setattr(slots_cuda, "COPY_BYTES", 4000)
    patch.setattr(slots_cuda, "WAIT_S", 0.2)
    yield CudaBackend(format_of(checkpoint), 4, host_replicas=3, device=DEVICE)
    patch.undo()


def expected(checkpoint, hidden, rows, counts, experts):
    weights = [checkpoint.expert(0, e) for e in experts]
    parts = [[as_tensor(part) for part in w.parts] for w in weights]
    w13, w2 = torch.stack([torch.cat(p[:2]) for p in parts]), torch.stack([p[2] for p in parts])
    ids = torch.arange(len(experts)).repeat_interleave(torch.tensor(counts))
    return reference.expert_ffn(torch.from_numpy(hidden).bfloat16(), w13, w2, ids, torch.from_numpy(rows))


@pytest.mark.parametrize("counts", [[1], [2, 3, 1], [20, 5], [100, 29, 2]])
def test_results_are_those_of_the_reference(backend, checkpoint, counts):
    """Also of more pairs than a call takes, where one expert's pairs are cut."""
    rng = np.random.default_rng(1)
    experts = list(range(2, 2 + len(counts)))
    hidden = rng.standard_normal((7, checkpoint.hidden_size), np.float32)
    rows = rng.integers(0, 7, sum(counts))
    loaded = [backend.load(checkpoint.expert(0, e)) for e in experts]
    out = np.full((sum(counts), checkpoint.hidden_size), np.nan, np.float32)
    backend.compute(hidden, rows, counts, loaded, out)
    wanted = expected(checkpoint, hidden, rows, counts, experts)
    errors = (torch.from_numpy(out).double() - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert float(errors.max()) < TOLERANCE
    assert bool((out == torch.from_numpy(out).bfloat16().float().numpy()).all())


@pytest.mark.parametrize("counts", [[1], [20, 5], [100, 29, 2]])
def test_rows_in_bf16_give_the_bits_that_float32_frames_carry(backend, checkpoint, counts):
    rng = np.random.default_rng(1)
    half = torch.from_numpy(rng.standard_normal((7, checkpoint.hidden_size), np.float32)).bfloat16()
    rows = rng.integers(0, 7, sum(counts))
    loaded = [backend.load(checkpoint.expert(0, e)) for e in range(len(counts))]
    wide, bits = (np.full((sum(counts), checkpoint.hidden_size), -1, dtype) for dtype in (np.float32, np.int16))
    backend.compute(half.float().numpy(), rows, counts, loaded, wide)
    backend.compute(half.view(torch.int16).numpy(), rows, counts, loaded, bits)
    assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16).float(), torch.from_numpy(wide))


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_a_call_returns_when_the_gpu_has_done_with_its_rows(backend, checkpoint, monkeypatch, dtype):
    """The answer is sent then, and the slot that held the rows is used again."""
    loaded, waits, current = [backend.load(checkpoint.expert(0, 0))], [], torch.cuda.current_stream
    x, out = (np.zeros((1, checkpoint.hidden_size), dtype) for _ in range(2))
    backend.compute(x, None, [1], loaded, out)  # compiled and captured, if it was not before

    def synchronize():
        waits.append(1)
        if DEVICE == "cuda":
            current().synchronize()

    monkeypatch.setattr(backend._workspace, "_cuda", True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *args: SimpleNamespace(synchronize=synchronize))
    backend.compute(x, None, [1], loaded, out)
    assert waits == [1]


def test_whole_messages_fit_into_a_slot_and_a_frame(backend, monkeypatch):
    monkeypatch.setattr(module, "CALL_PAIRS", 1024)
    for hidden in (2048, 4096, 7168):
        monkeypatch.setattr(backend, "_hidden", hidden)
        assert backend.slot_bytes == backend.max_tensor_bytes == 1024 * hidden * 2 <= MAX_FRAME_BYTES


def test_a_slot_is_free_again_when_nobody_uses_its_expert(backend, checkpoint):
    held = [backend.load(checkpoint.expert(0, e)) for e in range(4)]
    with pytest.raises(NoRoom, match="all 4 slots for experts are in use"):
        backend.load(checkpoint.expert(0, 4))
    in_use = held.pop()  # like the experts of a computation that a drop overtakes
    held.clear()
    gc.collect()
    again = [backend.load(checkpoint.expert(0, e)) for e in range(3)]
    assert in_use.slot not in {expert.slot for expert in again}


def test_loading_waits_for_a_slot_that_a_computation_still_uses(backend, checkpoint, monkeypatch):
    monkeypatch.setattr(slots_cuda, "WAIT_S", 30.0)
    held = [backend.load(checkpoint.expert(0, e)) for e in range(4)]
    loaded = []
    loader = threading.Thread(target=lambda: loaded.append(backend.load(checkpoint.expert(0, 5))))
    loader.start()
    slot = held[2].slot
    held[2] = None
    loader.join(30)
    assert [expert.slot for expert in loaded] == [slot]


def test_a_replica_from_host_memory_is_the_expert_itself(backend, checkpoint):
    gc.collect()
    host = backend.host_replicas
    host.put((0, 1), checkpoint.expert(0, 1))
    host.put((0, 2), checkpoint.expert(0, 2))
    assert host.promote((0, 3)) is None
    promoted, digest = host.promote((0, 2))
    assert digest == checkpoint.expert(0, 2).digest
    loaded = backend.load(checkpoint.expert(0, 2))
    hidden = np.random.default_rng(2).standard_normal((2, checkpoint.hidden_size), np.float32)
    outs = []
    for expert in (promoted, loaded):
        outs.append(np.full((2, checkpoint.hidden_size), np.nan, np.float32))
        backend.compute(hidden, np.arange(2), [2], [expert], outs[-1])
    assert np.isfinite(outs[0]).all()
    assert np.array_equal(*outs)
    host.keep({(0, 2)})
    assert host.keys() == {(0, 2)}
    for e in (4, 5):  # there is room again for what was forgotten
        host.put((0, e), checkpoint.expert(0, e))
    assert len(host.keys()) == host.capacity == 3
    host.keep(set())


def test_no_free_slot_leaves_the_replica_in_host_memory(backend, checkpoint):
    gc.collect()
    backend.host_replicas.put((0, 1), checkpoint.expert(0, 1))
    held = [backend.load(checkpoint.expert(0, e)) for e in range(4)]
    with pytest.raises(NoRoom):
        backend.host_replicas.promote((0, 1))
    held.pop()
    assert backend.host_replicas.promote((0, 1)) is not None
    backend.host_replicas.keep(set())


def test_a_slot_has_the_words_of_fp8_weights(fp8, fp8_backend):
    """Gate above up, and down, with their scales, loaded and promoted."""
    weights = fp8.expert(0, 1)
    fp8_backend.host_replicas.put((0, 1), weights)
    codes = [stored_tensor(part) for part in weights.parts]
    scales = [stored_tensor(part.scale).float() for part in weights.parts]
    w13 = pack_fp8(torch.cat(codes[:2])[None], torch.cat(scales[:2])[None])
    w2 = pack_fp8(codes[2][None], scales[2][None])
    loaded, promoted = fp8_backend.slots.load(weights), fp8_backend.host_replicas.promote((0, 1))[0]
    assert {loaded.slot, promoted.slot} == {0, 1}
    for part, wanted in zip(fp8_backend.slots.parts, (w13.data, w13.scale, w2.data, w2.scale), strict=True):
        for expert in loaded, promoted:
            assert torch.equal(part[expert.slot].cpu(), wanted[0])


class Made(TorchDispatchMode):
    """The bytes of what operations made that is not part of any known tensor."""

    def __init__(self, known):
        super().__init__()
        self._known, self.nbytes = {tensor.untyped_storage().data_ptr() for tensor in known}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.nbytes.append(tensor.untyped_storage().nbytes())
        return result


def test_bringing_an_expert_to_the_gpu_allots_nothing(fp8, fp8_backend):
    slots, replicas = fp8_backend.slots, fp8_backend.host_replicas
    replicas.put((0, 1), fp8.expert(0, 1))
    with Made([*slots.parts, *slots._landing, replicas._memory]) as made:
        replicas.promote((0, 1))
    assert not any(made.nbytes)  # the interpreter makes some of no bytes


def test_what_packs_fp8_weights_is_compiled_at_the_start(monkeypatch):
    """Compiling it takes seconds, for which experts of a dead server would wait."""
    met = []

    def pack(words, codes):
        met.append(words.shape)
        pack_fp8_into(words, codes)

    monkeypatch.setattr("expert_server.formats_cuda.pack_fp8_into", pack)
    slots = slots_cuda.Slots(Fp8(128, 256), 1, torch.device(DEVICE))
    assert met == [(1, 512, 32), (2, 128, 32)]
    assert slots._free == [0]


def test_too_little_host_memory_means_fewer_replicas(monkeypatch):
    monkeypatch.setattr(host_replicas_cuda, "default_capacity", lambda expert_bytes: 2)
    slots = slots_cuda.Slots(Bf16(64, 32), 1, torch.device(DEVICE))
    assert host_replicas_cuda.PinnedReplicas(slots, 5).capacity == 2
    monkeypatch.setattr(slots, "on_gpu", True)
    runtime = SimpleNamespace(cudaHostRegister=lambda at, size, flags: 2 if size else 0)  # out of memory, every time
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    assert host_replicas_cuda.PinnedReplicas(slots, 5).capacity == 0


def test_out_of_memory_at_the_start_means_less_capacity(monkeypatch):
    real = torch.zeros

    def small(*shape, **options):
        if len(shape) > 1 and shape[0] > 5:
            raise torch.OutOfMemoryError("as if")
        return real(*shape, **options)

    monkeypatch.setattr(torch, "zeros", small)
    slots = slots_cuda.Slots(Bf16(64, 32), 10, torch.device(DEVICE))
    assert slots.capacity == 4  # 10, 8, 6: too many


def test_the_fingerprint_is_not_that_of_a_cpu_or_of_other_weights(backend, checkpoint):
    other = Fp8(128, 128) if checkpoint.expert_dtypes == {"BF16"} else Bf16(64, 96)
    assert len({backend.fingerprint, other.fingerprint(torch.device(DEVICE)), expert_ffn.numerics_fingerprint()}) == 3


def test_fp8_experts_take_a_byte_for_each_weight(tmp_path):
    """And four for each block, in GPU memory, on the way there and in host memory."""
    sizes = []
    for weight_format in (Bf16(256, 384), Fp8(256, 384)):
        slots = slots_cuda.Slots(weight_format, 3, torch.device(DEVICE))
        size = sum(part.nbytes for part in slots.parts) // 3
        assert size == slots.expert_bytes == slots._staging.nbytes
        assert sum(part.nbytes for part in slots._landing) == (size if type(weight_format) is Fp8 else 0)
        assert host_replicas_cuda.PinnedReplicas(slots, 2)._memory.shape == (2, size)
        sizes.append(size)
    weights = 3 * 256 * 384
    assert sizes == [2 * weights, weights + 4 * weights // 128**2]


def test_what_the_kernels_do_not_take_is_refused_by_name(tmp_path):
    plain = write_checkpoint(tmp_path / "plain", hidden=128, intermediate=192, layers=1)
    fp8 = quantize(plain, tmp_path / "fp8")
    with pytest.raises(
        ConfigError, match="hidden size 128 and intermediate size 192; the kernels take multiples of 128"
    ):
        format_of(Checkpoint(fp8))
    tensors = load_file(fp8 / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    save_file(tensors | {name: tensors[name].bfloat16()}, fp8 / "model.safetensors")
    with pytest.raises(ConfigError, match="experts in BF16, F8_E4M3; on a GPU either all of them are fp8 or none"):
        format_of(Checkpoint(fp8))


@pytest.mark.parametrize("capacity", [16, 128, 1024])
@pytest.mark.parametrize("hidden", [2048, 7168])
def test_the_warm_up_meets_every_tiling(hidden, capacity, monkeypatch):
    """One that is met later is compiled then, for seconds, while rows wait."""
    monkeypatch.setattr(module, "CALL_PAIRS", most := 1024)

    def tilings(calls):
        calls = list(calls)
        quantized = [
            {choose_quantized_tiling(pairs, experts, False, hidden, way) for pairs, experts in calls}
            for way in (False, True)
        ]
        several = [(pairs, experts) for pairs, experts in calls if pairs > MAX_PAIRS]
        return quantized, [
            {choose_tiling(*call, ping_pong=way, dense=way) for call in several} for way in (False, True)
        ]

    every = ((pairs, experts) for pairs in range(1, most + 1) for experts in range(1, min(pairs, capacity) + 1))
    assert tilings(warm_up_calls(capacity)) == tilings(every)
