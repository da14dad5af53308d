"""The kill matrix as data: who × how × when, and what of it cannot occur and why.

`docs/fault-matrix.md` is generated from this table, `subset.txt` is the part that `make test` runs.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple


class Cell(NamedTuple):
    """One failure. Its name is what pytest shows and what `subset.txt` lists."""

    who: str
    how: str
    when: str

    @property
    def name(self) -> str:
        """The cell in one line."""
        return f"{self.who}: {self.how}: {self.when}"


WHO = ("expert server", "router", "gateway", "coordinator", "launcher", "etcd")
HOW = {
    "SIGKILL": "the process is gone at once",
    "SIGTERM": "the process is told to stop; the launcher starts it again",
    "SIGSTOP, SIGCONT": "the process stands still while the streams go on, then runs again",
    "exit": "the process ends itself with an error",
    "out of memory": "an allocation of the process fails",
    "garbage": "it answers with bytes that are no message",
    "wrong shape": "it answers with a tensor (or tables) of another shape than was asked for",
    "twice": "it sends an answer twice",
    "late": "it sends an answer when all streams have ended without it",
    "slow": "it takes ten times as long for everything",
    "truncated shard": "the file that it is reading becomes shorter",
    "full disk": "nothing can be written any more",
    "same address": "it is killed, and its successor binds the same address at once",
    "cut one way": "what it sends does not arrive any more; then the network heals",
    "cut both ways": "nothing arrives in either direction any more; then the network heals",
}
WHEN = {
    "joining": "it has started and has not registered; where it is not on the data path: an expert server has",
    "loading": "it is reading its weights",
    "idle": "no request is there",
    "prefill": "a prompt is being computed",
    "decode": "streams are being decoded, a dispatch is in its hands",
    "reply": "between receive and reply: the answer is computed and not sent",
    "draining": "it is being drained; where it is not on the data path: an expert server is",
    "recovery": "during another recovery: an expert server is dead and its successor not up",
}
ANY = "*"
SIGNALS = ("SIGKILL", "SIGTERM", "SIGSTOP, SIGCONT")
REPLIES = ("garbage", "wrong shape", "twice", "late")
LOADS = ("truncated shard", "full disk")
OF_ETCD = ("SIGKILL", "SIGSTOP, SIGCONT", "cut one way", "cut both ways")
CUTS = ("cut one way", "cut both ways")

Rule = tuple[str | tuple[str, ...], str | tuple[str, ...], str | tuple[str, ...], str]

IMPOSSIBLE: tuple[Rule, ...] = (
    (ANY, "exit", ("joining", "idle", "prefill", "decode", "reply", "draining"), "an exit while loading is meant"),
    (ANY, LOADS, ("joining", "idle", "prefill", "decode", "reply"), "the shard is not being read"),
    (("expert server", "router"), LOADS, "draining", "who is being drained reads no weights any more"),
    (ANY, REPLIES, ("joining", "loading", "idle"), "nobody waits for an answer then"),
    (ANY, REPLIES, ("decode",), "that is the row *reply* of the same fault: the answer is what is wrong"),
    (ANY, "slow", ("joining", "idle", "reply"), "nothing is computed then that could be slow"),
    (ANY, "out of memory", ("idle", "joining"), "nothing is allocated then"),
    (ANY, "same address", ("joining", "loading"), "nobody has used its address yet"),
    ("router", "wrong shape", ANY, "only expert servers answer with tensors, and coordinators with tables"),
    ("gateway", ANY, "loading", "a gateway reads a tokenizer, no weights"),
    ("gateway", ("exit", *LOADS), ANY, "it loads nothing; see *SIGKILL*"),
    ("gateway", "out of memory", ("reply", "draining"), "that stream ends with an error: see test_internal_errors.py"),
    ("expert server", "slow", "draining", "who drains gets no new rows; see *late*"),
    ("gateway", REPLIES, ANY, "its answers go to the client, who is the judge here"),
    ("gateway", "slow", ANY, "what it does per token is too little to be seen; see *SIGSTOP*"),
    ("gateway", "same address", ANY, "it always comes back at its HTTP port; see *SIGKILL*"),
    ("gateway", CUTS, ANY, "its links are those of the routers and of the coordinator; see there"),
    ("coordinator", ("exit", "out of memory", *LOADS), ANY, "it loads nothing and holds nothing large; see *SIGKILL*"),
    ("coordinator", "slow", ANY, "it is not on the data path; see *late*"),
    ("coordinator", "same address", ANY, "it always comes back at its address; see *SIGKILL*"),
    ("launcher", tuple(h for h in HOW if h not in SIGNALS), ANY, "it answers nobody, reads nothing and has no network"),
    ("etcd", tuple(h for h in HOW if h not in OF_ETCD), ANY, "etcd is not ours: it ends, hangs or is cut off"),
    ("etcd", ANY, ("loading", "reply"), "etcd loads nothing of ours and answers nobody on the data path"),
)  # fmt: skip


def reason(cell: Cell) -> str | None:
    """Why a cell cannot occur, by the first rule that it falls under; None if it can."""
    for who, how, when, why in IMPOSSIBLE:
        if all(_matches(value, wanted) for value, wanted in zip(cell, (who, how, when), strict=True)):
            return why
    return None


def _matches(value: str, wanted: str | tuple[str, ...]) -> bool:
    return wanted == ANY or value == wanted or (isinstance(wanted, tuple) and value in wanted)


ALL = tuple(Cell(*c) for c in product(WHO, HOW, WHEN))
POSSIBLE = tuple(c for c in ALL if reason(c) is None)
