"""A stand-in for a process under the launcher: ``python -m tests.moering.stub_process ID START DIRECTORY [BEHAVIOUR]``.

It reports to the datagram socket ``mailbox`` in the directory (one socket, so that the order of reports over all
processes is the order in which they were sent) and holds the FIFO ``alive`` open for writing until it dies.

Behaviours: ``serve`` ends at SIGTERM; ``stubborn`` only reports it; ``fail`` and ``refuse`` complain and exit with
status 3 and 2; ``wedged`` stays in native code and holds the interpreter lock; ``http:PORT`` serves as
``serve`` does, and answers as a ready gateway.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from moering.process import watch_launcher

ANSWERS = {
    "/ready": {},
    "/v1/models": {"data": [{"id": "stub"}]},
    "/admin/status": {"epoch": 1, "processes": [], "failures_survivable": 0, "under_target": 5},
}


class Gateway(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps(ANSWERS[self.path]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def main(server_id: str, start: str, directory: str, behaviour: str = "serve") -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # before threads start, which inherit it
    watch_launcher()
    os.open(Path(directory) / "alive", os.O_WRONLY)
    mailbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    mailbox.connect(str(Path(directory) / "mailbox"))

    def report(event: str) -> None:
        mailbox.send(json.dumps([server_id, event, int(start), os.getpid()]).encode())

    if behaviour in ("fail", "refuse"):
        report("started")
        print(f"{server_id} cannot work like this", file=sys.stderr)
        sys.exit(3 if behaviour == "fail" else 2)
    if behaviour.startswith("http:"):
        server = ThreadingHTTPServer(("127.0.0.1", int(behaviour[5:])), Gateway)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    report("started")
    if behaviour == "wedged":
        ctypes.PyDLL(None).pause()
    while True:
        signal.sigwait([signal.SIGTERM])
        report("told to stop")
        if behaviour != "stubborn":
            report("ends")
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
