import pytest

from moering.config import parse
from moering.errors import ConfigError
from router.config import Config


@pytest.mark.parametrize("flag", ["--micro-batches=-1", "--max-num-seqs=-1", "--threads=0", "--drain-timeout-s=nan"])
def test_what_a_router_cannot_work_with_is_refused_by_name(flag):
    with pytest.raises(ConfigError, match=flag[2:].partition("=")[0].replace("-", "_")):
        parse(Config, [flag])
