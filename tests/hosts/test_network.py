"""Where there are no network namespaces, `make hosts-test` fails and says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts.network import NoNamespaces, network


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "there is no `ip`: install iproute2"),
        (
            "#!/bin/sh\necho Operation not permitted >&2\nexit 1\n",
            "(Operation not permitted): network namespaces",
        ),
    ],
)
def test_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None, said: str
) -> None:
    if script is not None:
        (tmp_path / "ip").write_text(script)
        (tmp_path / "ip").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoNamespaces) as e, network("a"):
        pass
    assert said in str(e.value)
