import pytest

from gateway.config import Config
from moering.config import parse
from moering.errors import ConfigError


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_what_is_no_port_is_refused(port):
    with pytest.raises(ConfigError, match="port must be from 0 to 65535"):
        parse(Config, ["--port", port])


WRONG = (
    "--max-requests=0", "--max-choices=-1", "--max-body-bytes=0", "--request-timeout-s=0", "--request-timeout-s=inf",
    "--stall-timeout-s=nan", "--log-interval-s=0", "--max-model-len-tokens=-1", "--max-queue-wait-s=nan",
    "--drain-timeout-s=-1",
)  # fmt: skip


@pytest.mark.parametrize("flag", WRONG)
def test_what_a_gateway_cannot_work_with_is_refused_by_name(flag):
    with pytest.raises(ConfigError, match=flag[2:].partition("=")[0].replace("-", "_")):
        parse(Config, [flag])
