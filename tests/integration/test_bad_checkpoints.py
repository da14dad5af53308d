"""`moering serve` on a checkpoint that cannot be served: one error at once, and no process ever announces itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.cluster import DEADLINE_S, REPO
from tests.ports import free_port
from tests.tiny import write_checkpoint


def empty(path: Path) -> str:
    path.mkdir()
    return "config.json"


def unsupported(path: Path) -> str:
    write_checkpoint(path, config={"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    return "LlamaForCausalLM"


def truncated(path: Path) -> str:
    write_checkpoint(path)
    shard = path / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)
    return shard.name


def incomplete(path: Path) -> str:
    write_checkpoint(path)
    shard = path / "model-00001-of-00002.safetensors"
    shard.unlink()
    return shard.name


def outside(path: Path) -> str:
    write_checkpoint(path)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    content["weight_map"][name] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    return "../elsewhere.safetensors"


def serve(path: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "moering", "serve", str(path), "--port", str(free_port())]
    return subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE_S, cwd=REPO, check=False)


@pytest.mark.parametrize("spoil", [empty, unsupported, truncated, incomplete, outside])
def test_one_error_and_nothing_starts(spoil: Callable[[Path], str], tmp_path: Path) -> None:
    named = spoil(tmp_path / "model")
    ended = serve(tmp_path / "model")
    assert ended.returncode == 2
    errors = [line for line in ended.stderr.splitlines() if line.startswith("moering serve:")]
    assert len(errors) == 1 and named in errors[0], ended.stderr
    assert "Traceback" not in ended.stderr and "started" not in ended.stderr and "Ready" not in ended.stdout


@pytest.mark.parametrize("file", ["tokenizer.json", "chat_template.jinja"])
def test_the_text_side_is_refused_by_the_gateway_and_nothing_is_started_again(file: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    (tmp_path / "model" / file).write_text("{% if %}")
    ended = serve(tmp_path / "model")
    assert ended.returncode == 1
    *_, error, said = ended.stderr.splitlines()
    assert error.startswith("moering serve: gateway-0") and said.startswith("moering gateway:") and file in said, said
    assert "Traceback" not in ended.stderr and "starting it again" not in ended.stderr and "Ready" not in ended.stdout
