"""The compose file against the processes that it starts, and the compose test where there is no engine."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.cluster import Process, Status
from compose import test as compose_test
from moering.config import parse
from moering.process import MODULES

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "compose/docker-compose.yml").read_text())["services"]


def config_class(kind: str) -> Any:
    """The options of a kind of process."""
    module = MODULES[kind]
    return importlib.import_module(module if "." in module else f"{module}.config").Config


def flags(service: str) -> tuple[str, list[str]]:
    """(kind, flags) that a service hands to `moering`, with the defaults of its variables."""
    filled = [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", word) for word in SERVICES[service]["command"]]
    extra = ["--advertise=host"] if "--advertise" in str(SERVICES[service].get("entrypoint")) else []
    return filled[0], filled[1:] + extra


@pytest.mark.parametrize("service", ["coordinator", "expert-server", "router", "gateway"])
def test_processes_understand_the_flags_they_are_given(service: str) -> None:
    kind, argv = flags(service)
    config = parse(config_class(kind), argv, environ={})
    assert kind == service and config.key == "/key/cluster.key"
    if hasattr(config, "bind"):
        assert "0.0.0.0" in config.bind and not config.insecure


def test_members_find_the_coordinator_and_all_read_one_checkpoint() -> None:
    members = [flags(name)[1] for name in ("expert-server", "router", "gateway")]
    assert {arg for argv in members for arg in argv if arg.startswith("--join")} == {"--join=tcp://coordinator:7000"}
    assert len({arg for argv in members for arg in argv if arg.startswith("--checkpoint")}) == 1
    assert "--bind=tcp://0.0.0.0:7000" in flags("coordinator")[1]


def test_servers_cannot_write_the_checkpoint_and_come_back_when_they_die() -> None:
    for name, service in SERVICES.items():
        if name not in ("model", "key"):
            assert service["volumes"] == ["model:/model:ro", "key:/key:ro"] and service["restart"] == "unless-stopped"
            assert service["init"] is True and service["healthcheck"]["test"]


def test_the_http_port_is_published_on_loopback_only() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(published) == 1 and published[0].startswith("127.0.0.1:")


def test_the_image_holds_every_package_of_the_project() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = [pattern.rstrip("*") for pattern in settings["include"]]
    dockerfile = (ROOT / "compose/Dockerfile").read_text()
    ignored = (ROOT / "compose/Dockerfile.dockerignore").read_text().splitlines()
    assert len(packages) >= 5
    for package in packages:
        assert f"COPY {package} {package}" in dockerfile and f"!{package}" in ignored


def test_without_an_engine_the_test_fails_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["compose.test"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compose_test.main() == 1
    assert "FAILED: there is no `docker` command" in capsys.readouterr().err
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\necho nobody is there >&2\nexit 1\n")
    docker.chmod(0o755)
    assert compose_test.main() == 1
    assert "no container engine answers `docker version`: nobody is there" in capsys.readouterr().err


def test_whole_is_all_servers_and_one_failure_survived() -> None:
    def status(survivable: int, *states: str) -> Status:
        processes = {str(i): Process(str(i), "expert-server", i, state, 1) for i, state in enumerate(states)}
        return Status(0.0, 1, survivable, processes)

    assert compose_test.whole(status(1, "ONLINE", "ONLINE"), 2)
    assert compose_test.whole(status(0, "ONLINE", "ONLINE"), 2) is None
    assert compose_test.whole(status(1, "ONLINE", "JOINING"), 2) is None
    assert compose_test.container_of(Process("expert-0a1b2c", "expert-server", 7, "ONLINE", 1)) == "0a1b2c"
