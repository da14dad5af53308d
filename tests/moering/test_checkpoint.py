import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import deserialize

from moering.checkpoint import Checkpoint, ExpertWeights
from moering.errors import CheckpointError
from moering.safetensors_shard import ITEM_BYTES, RawTensor
from tests.tiny import write_checkpoint, write_safetensors

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX = "model.safetensors.index.json"


def to_torch(tensor: RawTensor) -> torch.Tensor:
    return torch.from_numpy(tensor.data).view(TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)


def library_payloads(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes by name, as the safetensors library reads them."""
    return {n: bytes(t["data"]) for file in path.glob("*.safetensors") for n, t in deserialize(file.read_bytes())}


def payload(expert: ExpertWeights) -> bytes:
    return b"".join(part.data.tobytes() for part in (expert.gate_proj, expert.up_proj, expert.down_proj))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_the_safetensors_library_reads(tmp_path: Path, family: str, dtype: str, shards: int) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path, family, dtype=dtype, shards=shards))
    expected = library_payloads(tmp_path)
    prefix, names = ("block_sparse_moe", ("w1", "w3", "w2")) if family == "mixtral" else ("mlp", None)
    for layer in range(2):
        for expert in range(8):
            parts = [
                expected[f"model.layers.{layer}.{prefix}.experts.{expert}.{name}.weight"]
                for name in names or ("gate_proj", "up_proj", "down_proj")
            ]
            assert payload(checkpoint.expert(layer, expert)) == b"".join(parts)
    for name in checkpoint.names():
        assert checkpoint.tensor(name).data.tobytes() == expected[name]
    assert {*checkpoint.names()} == {n for n in expected if ".experts." not in n}
    assert checkpoint.expert_bytes == 3 * 64 * 96 * ITEM_BYTES[dtype]
    assert (checkpoint.num_layers, checkpoint.num_experts, checkpoint.top_k) == (2, 8, 2)
    assert (checkpoint.hidden_size, checkpoint.moe_intermediate_size) == (64, 96)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_an_expert_is_the_same_in_the_fused_layout(tmp_path: Path, family: str) -> None:
    separate = Checkpoint(write_checkpoint(tmp_path / "separate", family))
    fused = Checkpoint(write_checkpoint(tmp_path / "fused", family, fused=True))
    digests = set()
    for layer in range(2):
        for expert in range(8):
            a, b = separate.expert(layer, expert), fused.expert(layer, expert)
            assert payload(a) == payload(b)
            assert a.digest == b.digest
            assert b.gate_proj.shape == (96, 64) and b.down_proj.shape == (64, 96)
            digests.add(a.digest)
    assert len(digests) == 16
    assert fused.gate_name(1) in fused.names() and separate.gate_name(1) in separate.names()


@pytest.mark.parametrize("original_format", [True, False])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_reads_what_transformers_writes(tmp_path: Path, family: str, original_format: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path / "tiny", family), dtype=torch.float16)
    model.save_pretrained(tmp_path / "saved", save_original_format=original_format)
    checkpoint = Checkpoint(tmp_path / "saved")
    fused = any("gate_up_proj" in name for name in library_payloads(tmp_path / "saved"))
    assert fused is not original_format
    for layer in range(2):
        block = model.model.layers[layer].mlp
        assert torch.equal(to_torch(checkpoint.tensor(checkpoint.gate_name(layer))), block.gate.weight)
        for expert in range(8):
            weights = checkpoint.expert(layer, expert)
            gate_up = torch.cat([to_torch(weights.gate_proj), to_torch(weights.up_proj)])
            assert torch.equal(gate_up, block.experts.gate_up_proj[expert])
            assert torch.equal(to_torch(weights.down_proj), block.experts.down_proj[expert])


@pytest.mark.parametrize("fused", [False, True])
def test_reads_only_the_bytes_asked_for(tmp_path: Path, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path, fused=fused))
    assert checkpoint.bytes_read == 0
    from_kernel = []
    preadv = os.preadv

    def counting_preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        from_kernel.append(preadv(fd, buffers, offset))
        return from_kernel[-1]

    monkeypatch.setattr(os, "preadv", counting_preadv)
    checkpoint.expert(1, 5)
    assert sum(from_kernel) == checkpoint.bytes_read == checkpoint.expert_bytes
    dense_bytes = sum(checkpoint.tensor(name).data.nbytes for name in checkpoint.names())
    assert sum(from_kernel) == checkpoint.bytes_read == checkpoint.expert_bytes + dense_bytes
    whole = sum(len(data) for data in library_payloads(tmp_path).values())
    assert dense_bytes + 16 * checkpoint.expert_bytes == whole


def test_threads_read_at_the_same_time(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path))
    expected = [checkpoint.expert(layer, expert).digest for layer in range(2) for expert in range(8)]
    found: dict[int, list[bytes]] = {}
    start = threading.Barrier(8)

    def read(thread: int) -> None:
        start.wait()
        found[thread] = [checkpoint.expert(layer, expert).digest for layer in range(2) for expert in range(8)]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(8), expected)
    assert checkpoint.bytes_read == 9 * 16 * checkpoint.expert_bytes


def test_data_is_writable_and_its_own(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path))
    before = checkpoint.expert(0, 0)
    checkpoint.expert(0, 0).gate_proj.data[:] = 0
    assert before.gate_proj.data.any()
    assert checkpoint.expert(0, 0).digest == before.digest


def test_fine_tunes_differ_in_their_experts_digests(tmp_path: Path) -> None:
    one, other = (Checkpoint(write_checkpoint(tmp_path / str(seed), seed=seed)) for seed in (1, 2))
    assert one.digest == other.digest
    assert one.expert(0, 0).digest != other.expert(0, 0).digest


def test_the_digest_covers_config_index_and_headers(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base")
    digests = {Checkpoint(base).digest, Checkpoint(write_checkpoint(tmp_path / "shards", shards=3)).digest}
    digests.add(Checkpoint(write_checkpoint(tmp_path / "config", config={"rms_norm_eps": 1e-6})).digest)
    digests.add(
        Checkpoint(write_checkpoint(tmp_path / "dtype", dtype="BF16", config={"torch_dtype": "float16"})).digest
    )
    longer = shutil.copytree(base, tmp_path / "longer")
    with next(longer.glob("*.safetensors")).open("ab") as f:
        f.write(b"\0")
    digests.add(Checkpoint(longer).digest)
    assert len(digests) == 5
    assert Checkpoint(shutil.copytree(base, tmp_path / "copy")).digest == Checkpoint(base).digest


def test_links_are_followed(tmp_path: Path) -> None:
    store = write_checkpoint(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in store.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert Checkpoint(snapshot).expert(0, 0).digest == Checkpoint(store).expert(0, 0).digest


def shard_of(path: Path, name: str) -> Path:
    return path / json.loads((path / INDEX).read_text())["weight_map"][name]


def edit_json(file: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def edit_header(file: Path, edit: Callable[[dict], object]) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def drop(name: str) -> Callable[[Path], None]:
    return lambda path: edit_json(path / INDEX, lambda c: c["weight_map"].pop(name))


def truncate(path: Path) -> None:
    os.truncate(path / SHARD_2, (path / SHARD_2).stat().st_size - 1)


def truncate_header(path: Path) -> None:
    os.truncate(path / SHARD_1, 100)


def set_index(file: object) -> Callable[[Path], None]:
    return lambda path: edit_json(path / INDEX, lambda c: c["weight_map"].update({EXPERT: file}))


def set_config(**values: object) -> Callable[[Path], None]:
    return lambda path: edit_json(path / "config.json", lambda c: c.update(values))


def set_entry(**values: object) -> Callable[[Path], None]:
    return lambda path: edit_header(shard_of(path, EXPERT), lambda h: h[EXPERT].update(values))


def fifo(path: Path) -> None:
    (path / SHARD_1).unlink()
    os.mkfifo(path / SHARD_1)


def to_float64(path: Path) -> None:
    data = np.zeros((64, 96)).tobytes()
    write_safetensors(path / "other.safetensors", {EXPERT: ("F64", (64, 96), data)})
    set_index("other.safetensors")(path)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (shutil.rmtree, ["no such checkpoint directory"]),
        (lambda path: (path / "config.json").unlink(), ["config.json", "No such file"]),
        (lambda path: (path / "config.json").write_text("{"), ["config.json", "not JSON"]),
        (lambda path: (path / "config.json").write_text("[" * 100_000), ["config.json", "not JSON"]),
        (lambda path: (path / "config.json").write_text("[]"), ["config.json", "not a JSON object"]),
        (lambda path: (path / INDEX).unlink(), [INDEX, "model.safetensors"]),
        (lambda path: (path / INDEX).write_text("{}"), [INDEX, "weight_map"]),
        (lambda path: (path / SHARD_1).unlink(), [SHARD_1, "No such file"]),
        (lambda path: (path / SHARD_1).write_bytes(b""), [SHARD_1, "truncated"]),
        (lambda path: (path / SHARD_1).write_bytes(b"\xff" * 64), [SHARD_1, "not a safetensors file"]),
        (lambda path: (path / SHARD_1).write_bytes(b"\x02" + b"\0" * 7 + b"{]"), [SHARD_1, "not JSON"]),
        (lambda path: (path / SHARD_1).write_bytes(b"\x02" + b"\0" * 7 + b"[]"), [SHARD_1, "not a JSON object"]),
        (truncate, [SHARD_2, "truncated", "tensor "]),
        (truncate_header, [SHARD_1, "truncated", "header"]),
        (fifo, [SHARD_1, "not a regular file"]),
        (drop(EXPERT), [EXPERT, "missing"]),
        (
            lambda path: edit_json(path / INDEX, lambda c: c["weight_map"].pop("model.norm.weight")),
            ["model.norm.weight"],
        ),
        (lambda path: edit_header(shard_of(path, EXPERT), lambda h: h.pop(EXPERT)), [SHARD_2, EXPERT, "missing"]),
        (set_index("../elsewhere.safetensors"), [INDEX, EXPERT, "leaves the directory"]),
        (set_index("a/../../b.safetensors"), [INDEX, EXPERT, "leaves the directory"]),
        (set_index("/etc/passwd"), [INDEX, EXPERT, "leaves the directory"]),
        (set_index(7), [INDEX, EXPERT, "not a file name"]),
        (set_index("a\0b"), [INDEX, EXPERT, "not a file name"]),
        (set_index("\ud800"), [INDEX, EXPERT, "not a file name"]),
        (set_entry(dtype="F7"), [SHARD_2, EXPERT, "unknown dtype 'F7'"]),
        (set_entry(dtype=["F16"]), [SHARD_2, EXPERT, "unknown dtype"]),
        (set_entry(shape=[96, 64]), [SHARD_2, EXPERT, "[96, 64]", "[64, 96]"]),
        (set_entry(shape=[64, -96]), [SHARD_2, EXPERT, "not a shape"]),
        (set_entry(shape=[64, 95]), [SHARD_2, EXPERT, "bytes"]),
        (set_entry(data_offsets=[10**9, 10**9 + 12288]), [SHARD_2, EXPERT, "truncated"]),
        (set_entry(data_offsets=[12288, 0]), [SHARD_2, EXPERT, "not data offsets"]),
        (to_float64, ["other.safetensors", EXPERT, "F64"]),
        (set_config(num_local_experts=9), ["model.layers.0.block_sparse_moe.gate.weight", "[8, 64]", "[9, 64]"]),
        (set_config(num_hidden_layers=3), ["model.layers.2", "missing"]),
        (set_config(num_hidden_layers=True), ["config.json", "num_hidden_layers"]),
        (set_config(hidden_size=0), ["config.json", "hidden_size"]),
        (set_config(num_experts_per_tok=9), ["config.json", "num_experts_per_tok"]),
        (set_config(vocab_size="many"), ["config.json", "vocab_size"]),
        (set_config(architectures=["LlamaForCausalLM"]), ["config.json", "LlamaForCausalLM", "MixtralForCausalLM"]),
        (set_config(architectures=None), ["config.json", "unsupported architecture"]),
        (set_config(architectures=[["MixtralForCausalLM"]]), ["config.json", "unsupported architecture"]),
        (set_config(hidden_act="gelu"), ["config.json", "gelu"]),
        (set_config(quantization_config={"bits": 4}), ["config.json", "quantization_config"]),
    ],
)
def test_a_broken_checkpoint_is_one_error_at_open(
    tmp_path: Path, damage: Callable[[Path], object], expected: list[str]
) -> None:
    path = write_checkpoint(tmp_path / "model")
    assert shard_of(path, EXPERT).name == SHARD_2
    Checkpoint(path).close()
    open_files = len(os.listdir("/proc/self/fd"))
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    assert [part for part in expected if part not in str(caught.value)] == []
    assert len(os.listdir("/proc/self/fd")) == open_files


@pytest.mark.parametrize("values", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}])
def test_dense_layers_are_refused(tmp_path: Path, values: dict[str, object]) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", config=values)
    with pytest.raises(CheckpointError, match=r"config\.json.*dense layers"):
        Checkpoint(tmp_path)


def test_a_fused_tensor_of_the_other_orientation_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, fused=True, shards=1)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    edit_header(tmp_path / "model.safetensors", lambda h: h[name].update(shape=[8, 64, 192]))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{name}.*\[8, 64, 192\].*\[8, 192, 64\]"):
        Checkpoint(tmp_path)


def test_a_file_truncated_after_opening_is_an_error_of_the_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path, shards=1))
    os.truncate(tmp_path / "model.safetensors", 50_000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated: model\.layers\.1.*experts\.7"):
        checkpoint.expert(1, 7)


def test_expert_tensors_are_not_read_as_others(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path))
    with pytest.raises(CheckpointError, match=EXPERT):
        checkpoint.tensor(EXPERT)
    with pytest.raises(CheckpointError, match="no expert 8 in layer 0"):
        checkpoint.expert(0, 8)
    assert checkpoint.bytes_read == 0


def test_tied_embeddings_need_no_head(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=1)
    edit_header(tmp_path / "model.safetensors", lambda h: h.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match="lm_head"):
        Checkpoint(tmp_path)
    set_config(tie_word_embeddings=True)(tmp_path)
    assert "lm_head.weight" not in Checkpoint(tmp_path).names()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_experts_of_tiny_checkpoints_matter(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path, family), dtype=torch.float32)
    ids = torch.arange(40, 104)[None]
    with torch.no_grad():
        logits = model(ids).logits
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.zero_()
        without = model(ids).logits
    assert (logits - without).abs().max() > 0.1 * logits.abs().max()
