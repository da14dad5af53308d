"""docs/http-api.md names every route, and every field that is refused."""

import re
from pathlib import Path

from gateway import app, request
from gateway.config import Config

PAGE = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text()
NAMED = set(re.findall(r"`([^`]+)`", PAGE))


def test_every_route_is_named():
    source = Path(app.__file__).read_text()
    routes = re.findall(r'web\.(get|post)\("(/[^"]*)"', source)
    assert len(routes) > 10
    for method, path in routes:
        plain = path.replace("{id:.+}", "{id}")
        assert plain.startswith("/admin/") or plain in NAMED or f"{method.upper()} {plain}" in NAMED, plain


def test_every_refused_field_is_named_as_such():
    refused = PAGE.split("## Fields that are refused")[1].split("\n## ")[0]
    assert set(request._UNIMPLEMENTED) <= set(re.findall(r"`([a-z_]+)`", refused))


def test_every_field_that_is_read_is_named():
    sources = [*Path(request.__file__).parent.glob("api/c*.py"), Path(request.__file__)]
    read = {f for s in sources for f in re.findall(r'\(body, "([a-z_]+)"|body\.get\("([a-z_]+)"\)', s.read_text())}
    names = {a or b for a, b in read}
    assert len(names) > 20
    assert names <= NAMED, names - NAMED


def test_its_limits_are_those_of_the_code():
    config = Config()
    assert f"{config.max_body_bytes >> 20} MiB" in PAGE
    assert f"up to {config.max_choices} prompts" in PAGE
    assert f"up to {request.MAX_STOP_STRINGS} strings" in PAGE and f"up to {request.MAX_LOGPROBS} |" in PAGE
    low, high = request.REPETITION_PENALTY
    assert f"from {low:g} to {high:g}" in PAGE
