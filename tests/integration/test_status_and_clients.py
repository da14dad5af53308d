"""The command line and OpenAI's own client against a real cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from typing import Any

from openai import OpenAI

from tests.integration.cluster import DEADLINE_S, REPO, SERVERS, Cluster

IDS = {"coordinator", "gateway-0", "router-0", *SERVERS}
FIELDS = {"id", "kind", "pid", "state", "incarnation", "address", "experts"}


def moering_status(cluster: Cluster, *flags: str) -> str:
    argv = [sys.executable, "-m", "moering", "status", "--url", cluster.url, *flags]
    return subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE_S, cwd=REPO, check=True).stdout


def test_status_as_json(cluster: Cluster) -> None:
    status = json.loads(moering_status(cluster, "--json"))
    processes = {p["id"]: p for p in status["processes"] if p["state"] != "OFFLINE"}
    assert set(processes) == IDS
    assert all(set(p) >= FIELDS and p["state"] == "ONLINE" for p in processes.values())
    assert len({p["pid"] for p in processes.values()}) == len(IDS)
    assert {p["kind"] for p in processes.values()} == {"coordinator", "gateway", "router", "expert-server"}
    assert sum(p["experts"] for p in processes.values()) == 2 * 3 * 8
    assert status["failures_survivable"] == 1 and status["epoch"] > 0


def test_status_for_people(cluster: Cluster) -> None:
    head, restorable, blank, columns, *rows = moering_status(cluster).splitlines()
    assert "48 expert replicas on 3 expert servers; 1 failure of an expert server is survived" in head
    assert "full redundancy can be restored" in restorable
    assert not blank and columns.split()[:3] == ["id", "kind", "state"]
    assert {row.split()[0] for row in rows} >= IDS


def test_openai_sdk_streams_a_chat(cluster: Cluster) -> None:
    client = OpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=DEADLINE_S, max_retries=0)
    assert [m.id for m in client.models.list()] == ["tiny"]
    create = partial(
        client.chat.completions.create,
        model="tiny",
        messages=[{"role": "user", "content": "What is a ring?"}],
        max_tokens=24,
        temperature=0.0,
    )
    whole: Any = create()
    chunks: list[Any] = list(create(stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text and text == whole.choices[0].message.content
    ends = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert ends == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens > 0
