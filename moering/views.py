"""Checks that the tables of a view fit its shape, before anybody indexes with them."""

from __future__ import annotations

from array import array

from moering.errors import ProtocolError
from moering.protocol import View


def check_view(view: View) -> None:
    """Raise `ProtocolError` for a view whose tables cannot be used."""
    if min(view.layers, view.experts, view.width, view.term, view.epoch) < 0 or len(view.servers) > 0x7FFF:
        raise ProtocolError("view: negative or impossible sizes")
    if len(view.popularity) not in (0, view.layers * view.experts):
        raise ProtocolError(f"view: popularity of {len(view.popularity)} bytes does not match its shape")
    if len(view.ways) not in (0, view.layers * view.experts):
        raise ProtocolError(f"view: ways of {len(view.ways)} bytes do not match its shape")
    for table in (view.routing, view.target):
        if len(table) != 2 * view.layers * view.experts * view.width:
            raise ProtocolError(f"view: a table of {len(table)} bytes does not match its shape")
        indices = array("h", table)
        if indices and (min(indices) < -1 or max(indices) >= len(view.servers)):
            raise ProtocolError("view: a replica on a server that is not listed")
