"""What /proc says of a process of this machine: its memory, and how much it has read. Linux only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moering.errors import MoeringError

MB = 1_000_000


@dataclass(frozen=True)
class Memory:
    """`rss_bytes` counts pages of files too (libraries, shared with others); `anon_bytes` only what it allocated;
    `peak_bytes` is the most that `rss_bytes` has been."""

    rss_bytes: int
    anon_bytes: int
    peak_bytes: int


def parse_status(text: str) -> Memory:
    """Read the text of /proc/<pid>/status. Raises `MoeringError`: a process that has ended shows no memory."""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    try:
        rss, anon, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon", "VmHWM"))
    except (KeyError, ValueError, IndexError) as e:
        raise MoeringError(f"/proc shows no memory of the process: {e}") from e
    return Memory(rss, anon, peak)


def parse_io(text: str) -> int:
    """Bytes that a process got from read calls so far, by the text of /proc/<pid>/io; mapped files are not in it."""
    try:
        return int(dict(line.split(":", 1) for line in text.splitlines())["rchar"])
    except (KeyError, ValueError) as e:
        raise MoeringError(f"/proc shows no count of bytes read: {e}") from e


def memory_of(pid: int) -> Memory:
    """The memory of process `pid` now."""
    return parse_status(_read(pid, "status"))


def bytes_read_by(pid: int) -> int:
    """See `parse_io`."""
    return parse_io(_read(pid, "io"))


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError as e:
        raise MoeringError(f"cannot look at process {pid}: {e}") from e
