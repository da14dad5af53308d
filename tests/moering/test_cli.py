from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import pytest

from moering import __version__, cli
from moering.chat import pieces
from moering.http_client import HttpError, get_json, request
from moering.process import command_line

SERVER = {"kind": "expert-server", "pid": 7, "state": "ONLINE", "incarnation": 5, "address": "ipc:///x", "experts": 160}
STATUS = {
    "epoch": 4,
    "failures_survivable": 1,
    "processes": [{"id": "expert-0", **SERVER}, {"id": "expert-1", **SERVER, "state": "JOINING", "experts": 3}],
}


def chunk(text: str) -> str:
    return f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n"


class Gateway(ThreadingHTTPServer):
    """A gateway that answers what the test says and remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.pages: dict[str, tuple[int, str]] = {
            "/admin/status": (200, json.dumps(STATUS)),
            "/v1/models": (200, json.dumps({"data": [{"id": "small"}]})),
        }
        self.stream = ""
        self.asked: list[Any] = []
        self.keys: list[str | None] = []


class Handler(BaseHTTPRequestHandler):
    server: Gateway

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        self.answer(*self.server.pages.get(self.path, (404, "no such page")))

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer(200, self.server.stream)

    def answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    server = Gateway()
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# --- the command line itself -----------------------------------------------------------------------------------------


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"]):
        assert cli.main(argv) == 0
        assert {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")} == {
            "serve", "status", "scale", "drain", "restart", "chat", "keygen",
            "coordinator", "gateway", "router", "expert-server",
        }  # fmt: skip


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"moering {__version__}\n"


def test_an_unknown_command_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["server"]) == 2
    assert "there is no command 'server'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["coordinator", "gateway", "router", "expert-server"])
def test_a_process_takes_the_place_of_the_command(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    executed: list[tuple[str, list[str]]] = []

    def execv(path: str, argv: list[str]) -> None:
        executed.append((path, argv))
        raise SystemExit

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(SystemExit):
        cli.main([kind, "--join", "ipc:///x"])
    assert executed == [(sys.executable, [*command_line(kind), "--join", "ipc:///x"])]


# --- status ----------------------------------------------------------------------------------------------------------


def test_status_as_json_is_what_the_gateway_says(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--url", gateway.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS


def test_status_as_a_table(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--url", gateway.url + "/"]) == 0
    head, _, columns, *rows = capsys.readouterr().out.splitlines()
    assert head == "epoch 4; 160 expert replicas on 1 expert servers; 1 failure of an expert server is survived"
    assert columns.split() == ["id", "kind", "state", "pid", "experts", "incarnation", "address"]
    assert [row.split() for row in rows] == [
        ["expert-0", "expert-server", "ONLINE", "7", "160", "5", "ipc:///x"],
        ["expert-1", "expert-server", "JOINING", "7", "3", "5", "ipc:///x"],
    ]


def test_status_says_what_is_missing_and_how_far_memory_reaches(
    gateway: Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    zoned = [p | {"zone": "a"} for p in cast(list[dict[str, object]], STATUS["processes"])]
    for more, lines in (
        (
            {"failures_restorable": 2, "under_target": 0, "orphans": 0},
            ["further failures after which full redundancy can be restored: 2"],
        ),
        (
            {"failures_restorable": -1, "under_target": 7, "orphans": 3},
            ["3 experts have no replica, 7 fewer than wanted", "these servers do NOT suffice"],
        ),
    ):
        gateway.pages["/admin/status"] = (200, json.dumps(STATUS | more | {"processes": zoned}))
        assert cli.main(["status", "--url", gateway.url]) == 0
        _, *said, empty, columns, _, _ = capsys.readouterr().out.splitlines()
        assert empty == "" and "zone" in columns.split()
        assert len(said) == len(lines) and all(s.startswith(wanted) for s, wanted in zip(said, lines, strict=True))


@pytest.mark.parametrize(("survivable", "text"), [(-1, "NO live replica"), (0, "NO failure"), (2, "2 failures")])
def test_status_says_what_may_fail(
    gateway: Gateway, capsys: pytest.CaptureFixture[str], survivable: int, text: str
) -> None:
    gateway.pages["/admin/status"] = (200, json.dumps(STATUS | {"failures_survivable": survivable}))
    assert cli.main(["status", "--url", gateway.url]) == 0
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ((401, '{"error": {"message": "a key is needed"}}'), "a key is needed"),
        ((500, "oops"), "answers 500"),
        ((200, "oops"), "does not answer with JSON"),
        ((200, "{}"), "is not as expected"),
    ],
)
def test_a_bad_answer_is_one_line(
    gateway: Gateway, capsys: pytest.CaptureFixture[str], page: tuple[int, str], text: str
) -> None:
    gateway.pages["/admin/status"] = page
    assert cli.main(["status", "--url", gateway.url]) == 1
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_no_gateway_is_one_line(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.shutdown()
    gateway.server_close()
    assert cli.main(["status", "--url", gateway.url]) == 1
    assert "does not answer: " in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["/", "/v1", "/v1/"])
def test_the_address_may_be_that_of_the_ready_line(gateway: Gateway, suffix: str) -> None:
    assert cli.main(["status", "--url", gateway.url + suffix]) == 0


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_that_has_seen_enough_is_no_bug(gateway: Gateway, flags: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "moering", "status", "--url", gateway.url, *flags]
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_key_is_sent_as_bearer(gateway: Gateway) -> None:
    get_json(gateway.url + "/v1/models", key="secret")
    assert gateway.keys == ["Bearer secret"]


def test_the_environments_proxy_is_not_asked(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert get_json(gateway.url + "/admin/status") == STATUS


def test_other_schemes_are_refused() -> None:
    with pytest.raises(HttpError, match="is not an http"):
        request("file:///etc/passwd")


# --- chat ------------------------------------------------------------------------------------------------------------


def chat(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, typed: str, *flags: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return cli.main(["chat", "--url", gateway.url, *flags])


def test_chat_keeps_the_history(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = 'data: {"choices": [], "usage": {}}\n\n'
    gateway.stream = chunk("Hello") + ": a comment\n\n" + chunk(" you") + usage + "data: [DONE]\n\n"
    assert chat(gateway, monkeypatch, "Hi\n\nMore\n", "--system", "Be kind", "--max-tokens", "9") == 0
    assert capsys.readouterr().out == "Hello you\nHello you\n"
    first, second = gateway.asked  # the empty line is no question
    assert first["model"] == "small"
    assert (first["max_tokens"], first["stream"]) == (9, True)
    turns = [("system", "Be kind"), ("user", "Hi"), ("assistant", "Hello you"), ("user", "More")]
    assert [(m["role"], m["content"]) for m in second["messages"]] == turns


def test_a_question_that_fails_is_forgotten(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.stream = chunk("Hel") + 'data: {"error": {"message": "no expert"}}\n\n'
    assert chat(gateway, monkeypatch, "Hi\nMore\n", "--model", "m") == 1
    printed = capsys.readouterr()
    assert printed.out == "Hel\nHel\n"
    assert printed.err == "moering chat: no expert\n" * 2
    assert [len(asked["messages"]) for asked in gateway.asked] == [1, 1]


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(stream: object) -> Iterator[str]:
        yield "Hel"
        raise KeyboardInterrupt

    monkeypatch.setattr("moering.chat.pieces", interrupted)
    assert chat(gateway, monkeypatch, "Hi\nMore\n") == 0
    assert capsys.readouterr().out == "Hel [stopped]\nHel [stopped]\n"
    assert gateway.asked[1]["messages"][1] == {"role": "assistant", "content": "Hel"}


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (b"", "broke off"),
        (b'data: {"choices": []}\n\n', "broke off"),
        (b'data: {"choi', "broke off"),
        (b'data: {"error": {"message": "bad"}}\n\ndata: [DONE]\n\n', "bad"),
        (b'data: {"error": "bad"}\n\ndata: [DONE]\n\n', "broke off"),
        (b"data: 7\n\n", "broke off"),
    ],
)
def test_an_answer_without_its_end_is_an_error(stream: bytes, text: str) -> None:
    with pytest.raises(HttpError, match=text):
        list(pieces(io.BytesIO(stream)))


def test_a_server_without_models_is_one_line(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.pages["/v1/models"] = (200, '{"data": []}')
    assert chat(gateway, monkeypatch, "Hi\n") == 1
    assert "lists no model" in capsys.readouterr().err
