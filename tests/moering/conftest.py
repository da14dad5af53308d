from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.moering.stubs import Mailbox


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    with tempfile.TemporaryDirectory(prefix="moering-") as directory:  # short: the path of a Unix socket is limited
        mailbox = Mailbox(Path(directory))
        yield mailbox
        mailbox.close()


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A `main` called in the test sets logging up for its process, which is ours."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
