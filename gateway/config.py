"""The options of a gateway process."""

from __future__ import annotations

import math
import socket
from dataclasses import dataclass

from moering.cluster_key import KEY_HELP
from moering.config import check_numbers, option
from moering.errors import ConfigError
from moering.leader import EMBEDDED, MEMBERSHIP_HELP


@dataclass(frozen=True)
class Config:
    """moering gateway: the OpenAI-compatible HTTP front end."""

    checkpoint: str = option("", "directory of the checkpoint: tokenizer and configuration are read, weights are not")
    served_model_name: str = option("", "name that clients use for the model (default: the directory's name)")
    join: str = option("tcp://127.0.0.1:7000", "address of the coordinator")
    membership: str = option(EMBEDDED, MEMBERSHIP_HELP)
    id: str = option("", "name that stays over restarts; default: gateway- and the host name")
    key: str = option("", KEY_HELP)
    zone: str = option("", "failure domain of this process")
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "TCP port to listen on; 0 lets the system choose")
    max_model_len_tokens: int = option(0, "context length, prompt and answer together (0: the model's)")
    max_requests: int = option(256, "choices generated or queued at once; beyond it 429 with Retry-After")
    max_queue_wait_s: float = option(30.0, "429 also while many wait and the first of them longer than this")
    max_choices: int = option(64, "limit of prompts times n in one HTTP request")
    max_body_bytes: int = option(32 << 20, "limit of a request body")
    request_timeout_s: float = option(600.0, "a request that takes longer ends with an error")
    stall_timeout_s: float = option(30.0, "a client that reads nothing for this long is cut off")
    drain_timeout_s: float = option(30.0, "time that running requests get after SIGTERM")
    listen_fd: int = option(-1, "listening socket inherited from the launcher, instead of --host and --port")
    admin_key: str = option("", "key of /admin and of scaling; without one only this machine may use them")
    admin_key_file: str = option("", "file with such keys, one a line")
    log_interval_s: float = option(10.0, "one log line with the load this often while there is load")

    def __post_init__(self) -> None:
        """Raises `ConfigError` for what a gateway cannot work with."""
        check_numbers(
            self,
            positive=(
                "max_requests", "max_choices", "max_body_bytes", "request_timeout_s", "stall_timeout_s",
                "log_interval_s",
            ),
            not_negative=("max_model_len_tokens", "max_queue_wait_s", "drain_timeout_s"),
        )  # fmt: skip
        if math.isinf(self.request_timeout_s):
            raise ConfigError("request_timeout_s must be finite: a router is told how much of it is left")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, not {self.port}")

    @property
    def server_id(self) -> str:
        """`id`, or its default."""
        return self.id or f"gateway-{socket.gethostname()}"
