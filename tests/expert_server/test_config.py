import sys
from pathlib import Path

import pytest

from expert_server.backend import make_backend
from expert_server.config import Config
from moering.checkpoint import Checkpoint
from moering.config import parse
from moering.errors import ConfigError
from tests import tiny

WRONG = ("--threads=0", "--credit-rows=0", "--load-threads=-1", "--capacity=-1", "--drain-timeout-s=nan")


@pytest.mark.parametrize("flag", WRONG)
def test_what_an_expert_server_cannot_work_with_is_refused_by_name(flag: str) -> None:
    with pytest.raises(ConfigError, match=flag[2:].partition("=")[0].replace("-", "_")):
        parse(Config, [flag])


def test_a_gpu_without_triton_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "expert_server.backend_cuda", None)
    checkpoint = Checkpoint(tiny.write_checkpoint(tmp_path, layers=1))
    with pytest.raises(ConfigError, match="needs PyTorch for CUDA and Triton"):
        make_backend("cuda", "auto", 1, checkpoint, capacity=1)
    checkpoint.close()
