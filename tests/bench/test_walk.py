"""docs/walk.md: that its generator tells of a real run what happened, and that what the page names is there."""

from __future__ import annotations

import asyncio
import importlib
import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import pytest

from bench import walk
from bench.traced_cluster import KILLED, POINTS
from bench.walk import Event, Recording, name, of_death, of_request
from moering.errors import MoeringError

REPO = Path(__file__).resolve().parents[2]
PAGE = REPO / "docs/walk.md"
LINK = re.compile(r"\[(\S+\.py):(\S+)\]\(\.\./(\S+)\)")
IN = ["exchange", "Generation.start", "RouterPool._route", "Engine._submit"]
LAYER = ["Exchange.submit", "Connection.send", "Service._answer", "Exchange._put", "Flight.after_experts"]
OUT = ["Engine._emit", "Journal.take", "exchange"]
AGAIN = ["Exchange._lose", "Dispatcher._again", "Connection.send", "Service._answer", "Exchange._put", "exchange"]
EVICTED = ["ExitReports.send", "Membership._proven_exit", "Membership._bury", "Membership._publish"]
BACK = ["Supervisor._spawn", "Membership._register", "Loader._load_all", "Membership._state_changed"]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return asyncio.run(walk.record(tmp_path_factory.mktemp("walk")))


@pytest.fixture(scope="module")
def death(recording: Recording) -> list[Event]:
    return of_death(recording.death)


def in_order(events: list[Event], *names: str) -> bool:
    """Whether calls of these functions are among the events, in this order."""
    rest = iter(map(name, events))
    return all(step in rest for step in names)


def only(events: list[Event], function: str) -> list[Event]:
    return [e for e in events if name(e) == function]


def test_a_request_goes_all_the_way_and_back(recording: Recording) -> None:
    shown = of_request(recording.calm)
    step = ["Scheduler.schedule", "Flight.launch", *LAYER]
    assert in_order(shown, *IN, *step, *OUT[:1], *step, *OUT)
    (chunk, _, decode) = only(shown, "Scheduler.schedule")
    assert (chunk["prefill"], chunk["decode"], decode["prefill"], decode["decode"]) == (walk.CHUNK, 0, 0, 1)
    row, layer = 4 * walk.SHAPE["hidden"], only(shown, "Exchange.submit")
    assert [(e["rows"], e["pairs"]) for e in layer] == [(walk.CHUNK, 2 * walk.CHUNK), (1, 2)]
    sends = [e for e in only(shown, "Connection.send") if e["role"] == "owner"]  # a late row is sent twice
    owners = {e["seq"]: e["pairs"] for e in sends}
    assert sum(owners.values()) == sum(e["pairs"] for e in layer)
    answers = {seq for e in only(shown, "Service._answer") for seq in e["seqs"]}
    assert owners.keys() <= answers
    assert owners.items() <= {e["seq"]: e["pairs"] for e in only(shown, "Exchange._put")}.items()
    for answer in only(shown, "Service._answer"):
        assert answer["bytes_in"] == answer["bytes_out"] == row * answer["pairs"]
    token = only(shown, "Engine._emit")[-1]
    assert only(shown, "Journal.take")[-1]["token"] == token["token"]
    assert shown[-1]["position"] >= token["position"] and str(token["token"]) in shown[-1]["text"]


def test_a_death_is_told_in_order(death: list[Event]) -> None:
    assert name(death[0]) == KILLED
    assert in_order(death, *AGAIN)
    assert in_order(death, *EVICTED, *BACK[1:], "Membership._publish")
    assert in_order(death, "ExitReports.send", *BACK)
    assert in_order(death, "Membership._publish", "Engine._follow_view")
    (lose,) = only(death, "Exchange._lose")
    assert lose["server"] == death[0]["process"] and set(death[0]["seqs"]) <= set(lose["seqs"])


def test_the_rows_sent_again_are_those_that_were_lost(death: list[Event]) -> None:
    again = only(death, "Dispatcher._again")
    lost = [(e["seq"], row) for e in again for row in e["rows_lost"]]
    sent = {(e["seq"], row) for e in again for _, _, rows in e["sent"] for row in rows}
    assert lost and set(lost) == sent
    new = {seq: server for e in again for seq, server, _ in e["sent"]}
    assert death[0]["process"] not in new.values() and min(new) > max(e["seq"] for e in again)
    assert {e["seq"]: e["server"] for e in only(death, "Connection.send")} == new
    assert {e["seq"]: e["server"] for e in only(death, "Exchange._put")} == new


def test_the_epoch_grows_until_redundancy_is_restored(death: list[Event]) -> None:
    published = only(death, "Membership._publish")
    epochs = [e["epoch"] for e in published]
    assert epochs == sorted(set(epochs)) and len(epochs) > 1
    assert published[0]["under_target"] > 0 == published[-1]["under_target"] and published[-1]["survivable"] == 1
    (proof,), (dead,), (back,) = (only(death, f"Membership._{step}") for step in ("proven_exit", "bury", "register"))
    assert proof["exit_code"] == -9 and proof["pid"] == death[0]["pid"] != back["pid"]
    assert back["incarnation"] > dead["incarnation"]
    assert all(e["incarnation"] == back["incarnation"] for e in only(death, "Exchange._welcome"))
    assert {e["process"] for e in only(death, "Loader._load_all")} == {death[0]["process"]}
    (online,) = (e for e in only(death, "Membership._state_changed") if e["state"] == "ONLINE")
    assert online["server"] == death[0]["process"]


def test_a_run_that_was_not_as_the_page_says_makes_no_page(recording: Recording) -> None:
    written = walk.page(recording)
    assert len(written.splitlines()) < 160 and "{" not in written and "$" not in written
    with pytest.raises(MoeringError, match="other tokens"):
        walk.page(Recording(recording.calm, recording.death, recording.tokens, equal=False))


def links() -> Iterator[tuple[str, str]]:
    for file, function, target in set(LINK.findall(PAGE.read_text(encoding="utf-8"))):
        assert file == target
        yield file, function


def test_the_page_names_functions_that_exist() -> None:
    named = dict.fromkeys(links())
    points = {tuple(point.code.split(":")) for kind in POINTS.values() for point in kind}
    assert len(named) > 20 and {f for f, _ in named} <= {f for f, _ in points} | {"bench/client.py"}
    for file, function in named:
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        assert callable(reduce(getattr, function.split("."), module))


def test_the_diagram_draws_from_lane_to_lane() -> None:
    events = [
        {"code": KILLED, "process": "expert-1", "seqs": [7]},
        {"code": "a.py:Connection.send", "process": "router-0", "server": "expert-0", "seq": 8},
        {"code": "a.py:Journal.take", "process": "gateway-0"},
        {"code": "a.py:Exchange._put", "process": "router-0", "server": "expert-0", "seq": 8},
    ]
    lanes, *lines = walk.diagram(events, width=12)
    assert lanes.split() == ["client", "gateway-0", "router-0", "expert-0", "expert-1", "launcher", "coordinator"]
    drawn = [line.split(maxsplit=7) for line in lines]
    assert [line[:7].count("|") for line in drawn] == [6, 5, 5]
    assert [re.findall(r"\|-+>|<-+\||\*", line) for line in lines] == [["*"], ["|----------->"], ["<-----------|"]]
    assert [line.rsplit("|", 1)[1].strip() for line in lines] == [
        "SIGKILL, seq [7] unanswered",
        "Dispatch seq 8",
        "Reply seq 8",
    ]
