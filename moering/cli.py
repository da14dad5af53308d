"""The command ``moering``: one word says what to do, the rest are that command's flags."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from moering import __version__
from moering.process import command_line

PROCESSES = {
    "coordinator": "leases of all processes and the placement of experts",
    "gateway": "HTTP: the OpenAI API",
    "router": "attention, KV cache, batching, sampling",
    "expert-server": "holds and computes experts",
}
COMMANDS = {
    "serve": ("moering.launcher", "serve a model on this machine, with all processes"),
    "status": ("moering.status", "show the processes of a cluster"),
    "scale": ("moering.operate", "change the number of expert servers or routers, under load"),
    "drain": ("moering.operate", "empty a process, which then exits, under load"),
    "restart": ("moering.operate", "restart every process, one after the other, under load"),
    "keygen": ("moering.keygen", "make the key that protects a cluster of several machines"),
    "chat": ("moering.chat", "talk to a model in the terminal"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named by the first word of `argv`. Returns the exit status, 2 where there is no such command."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in COMMANDS:
        module = importlib.import_module(COMMANDS[command][0])
        return int(module.main(rest) if hasattr(module, "main") else getattr(module, command)(rest))
    if command in PROCESSES:
        os.execv(sys.executable, [*command_line(command), *rest])
    if command in ("-V", "--version"):
        print(f"moering {__version__}")
        return 0
    if command in ("-h", "--help"):
        print(_usage())
        return 0
    print(f"moering: there is no command {command!r}\n\n{_usage()}", file=sys.stderr)
    return 2


def _usage() -> str:
    commands = [f"  {name:<14} {text}" for name, (_, text) in COMMANDS.items()]
    processes = [f"  {name:<14} {text}" for name, text in PROCESSES.items()]
    head = "usage: moering COMMAND [flags]; moering COMMAND --help lists them"
    return "\n".join([head, "", *commands, "", "one process by itself:", *processes])
