"""Rests between experts: by a share of the time while there is traffic, and by a limit of bytes at all times."""

import os

import pytest

from expert_server.config import Config
from expert_server.pace import Pace
from moering.errors import ConfigError


class Traffic:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        return self.calls


def test_loading_takes_its_share_of_the_time_while_there_is_traffic():
    traffic = Traffic()
    pace = Pace(0.1, 0.0, traffic)
    traffic.calls += 1
    assert pace.rest_s(0.5) == pytest.approx(4.5)  # 0.5 s of 5
    assert pace.rest_s(0.5) == 0.0  # nobody asked for anything since
    traffic.calls += 100
    assert pace.rest_s(0.5) == pytest.approx(4.5)


def test_the_limit_of_bytes_holds_without_traffic_and_the_longer_rest_counts():
    traffic = Traffic()
    pace = Pace(0.5, 2.0, traffic)
    assert pace.rest_s(0.5) == pytest.approx(1.5)
    assert pace.rest_s(3.0) == 0.0  # slower than the limit by itself
    traffic.calls += 1
    assert pace.rest_s(0.5) == pytest.approx(1.5)
    traffic.calls += 1
    assert pace.rest_s(3.0) == pytest.approx(3.0)


def test_the_share_follows_the_cores_unless_it_is_given(monkeypatch):
    for cores, share in ((2, 0.05), (4, 0.1), (64, 0.5)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert Config().share_of_core() == pytest.approx(share)
    assert Config(load_share=1.0).share_of_core() == 1.0


def test_the_limit_of_bytes_becomes_seconds_an_expert():
    assert Config(load_mb_per_s=50).expert_s(25_000_000) == pytest.approx(0.5)
    assert Config().expert_s(25_000_000) == 0.0


@pytest.mark.parametrize("wrong", [{"load_share": 1.5}, {"load_share": -0.1}, {"load_mb_per_s": -1.0}])
def test_impossible_limits_are_refused(wrong):
    with pytest.raises(ConfigError, match="load_share"):
        Config(**wrong)
