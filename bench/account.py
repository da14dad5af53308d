"""The client's own account: what a stream brought, held against the same request in a run without failure."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.client import Exchange


@dataclass(frozen=True)
class Output:
    """What one request brought: ids of its tokens, and a digest of the sampled logits for each where it was sent."""

    tokens: Sequence[int]
    digests: Sequence[str] = ()

    @classmethod
    def of(cls, exchange: Exchange) -> Output:
        """The output that a client recorded."""
        return cls(exchange.token_ids, exchange.digests)


@dataclass(frozen=True)
class Account:
    """Counts over any number of requests. All but `requests` and `tokens` are 0 when the promise is kept."""

    requests: int = 0
    tokens: int = 0
    lost: int = 0
    duplicated: int = 0
    changed: int = 0
    changed_digests: int = 0
    missing_digests: int = 0
    errors: int = 0

    def __add__(self, other: Account) -> Account:
        return Account(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)})

    @property
    def clean(self) -> bool:
        """Whether anything was served and nothing went wrong."""
        kept = dataclasses.replace(self, requests=0, tokens=0) == Account()
        return kept and self.tokens > 0


def compare(reference: Output, observed: Output, error: str | None = None) -> Account:
    """The account of one request.

    The two token lists are aligned first: a token that is left out counts as lost, one that comes in addition as
    duplicated, one in the place of another as changed. Digests are compared where the tokens are aligned and equal.
    """
    counts = {"lost": 0, "duplicated": 0, "changed": 0, "changed_digests": 0}
    for tag, a, a_end, b, b_end in _aligned(reference.tokens, observed.tokens):
        wanted, got = a_end - a, b_end - b
        if tag == "equal":
            pairs = zip(reference.digests[a:a_end], observed.digests[b:b_end], strict=False)
            counts["changed_digests"] += sum(x != y for x, y in pairs)
        else:
            counts["changed"] += min(wanted, got)
            counts["lost"] += max(0, wanted - got)
            counts["duplicated"] += max(0, got - wanted)
    missing = max(0, len(observed.tokens) - len(observed.digests)) if reference.digests else 0
    return Account(
        requests=1, tokens=len(observed.tokens), missing_digests=missing, errors=int(error is not None), **counts
    )


def _aligned(reference: Sequence[int], observed: Sequence[int]) -> list[tuple[str, int, int, int, int]]:
    """Alternating runs of both lists as `difflib` names them: equal, delete, insert, replace."""
    if list(reference) == list(observed):  # the usual case, and aligning is quadratic
        return [("equal", 0, len(reference), 0, len(observed))]
    return difflib.SequenceMatcher(a=reference, b=observed, autojunk=False).get_opcodes()  # type: ignore[return-value]


def total(accounts: Iterable[Account]) -> Account:
    """The sum of accounts."""
    return sum(accounts, Account())
