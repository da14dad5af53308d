import pytest

from expert_server.config import Config
from moering.config import parse
from moering.errors import ConfigError

WRONG = ("--threads=0", "--credit-rows=0", "--load-threads=-1", "--capacity=-1", "--drain-timeout-s=nan")


@pytest.mark.parametrize("flag", WRONG)
def test_what_an_expert_server_cannot_work_with_is_refused_by_name(flag: str) -> None:
    with pytest.raises(ConfigError, match=flag[2:].partition("=")[0].replace("-", "_")):
        parse(Config, [flag])
