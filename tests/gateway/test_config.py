import pytest

from gateway.config import Config
from moering.config import parse
from moering.errors import ConfigError


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_what_is_no_port_is_refused(port):
    with pytest.raises(ConfigError, match="port must be from 0 to 65535"):
        parse(Config, ["--port", port])
