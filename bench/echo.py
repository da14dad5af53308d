"""The raw zmq peer of `bench.round_trip`: answers each message with frames of fixed sizes, and does nothing else.

``python -m bench.echo ENDPOINT``. A message of three frames is (any, header bytes, tensor bytes as decimal numbers): it
sets the sizes of later answers and gets the first such answer.
"""

from __future__ import annotations

import sys
from typing import Any

import zmq


def main() -> None:
    """Serve until killed: blocking receive, blocking send."""
    socket: Any = zmq.Context().socket(zmq.ROUTER)
    socket.bind(sys.argv[1])
    print(socket.last_endpoint.rstrip(b"\0").decode(), flush=True)
    answer: list[bytes] = []
    while True:
        identity, *frames = socket.recv_multipart()
        if len(frames) == 3:
            answer = [bytes(int(size)) for size in frames[1:]]
        socket.send_multipart([identity, *answer])


if __name__ == "__main__":
    main()
