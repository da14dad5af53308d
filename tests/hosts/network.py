"""Separate hosts on one machine: Linux network namespaces with addresses of their own, at one switch.

Each has its own process ids as well, so that nothing that one host alone can see (loopback, `/proc`) serves two of
them. To cut a host off is to take its link down; to cut two hosts from each other is to isolate their ports.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

NET = "10.213.97"
OWN_ADDRESS = f"{NET}.254"
"""Of this machine, which is another host to them."""


class NoNamespaces(Exception):
    """This machine does not allow them."""


def run(*argv: str) -> None:
    """One command; raises `NoNamespaces` with what it says when it fails."""
    try:
        subprocess.run(argv, check=True, capture_output=True, text=True)
    except FileNotFoundError as e:
        raise NoNamespaces(f"there is no `{argv[0]}`: install iproute2 and util-linux") from e
    except subprocess.CalledProcessError as e:
        reason = e.stderr.strip()
        raise NoNamespaces(f"`{' '.join(argv)}` failed ({reason}): network namespaces need root on Linux") from e


class Network:
    """The switch, a bridge in a namespace of its own (the firewall of a container engine drops what crosses a bridge of
    this machine), and its hosts by name."""

    def __init__(self, names: Sequence[str]) -> None:
        self._tag = f"mo{os.getpid()}"
        self.addresses = {name: f"{NET}.{i + 1}" for i, name in enumerate(names)}

    def namespace(self, host: str) -> str:
        return f"{self._tag}-{host}"

    @property
    def own_link(self) -> str:
        """This machine's link to the switch."""
        return f"{self._tag}own"

    @property
    def switch(self) -> list[str]:
        """What a command line of `ip` begins with to act on the switch."""
        return ["ip", "-n", self.namespace("switch")]

    def inside(self, host: str) -> list[str]:
        """What a command line begins with to run there; its processes end with it."""
        alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return ["ip", "netns", "exec", self.namespace(host), *alone]

    def cut_off(self, host: str, *, cut: bool) -> None:
        """Take the host's link down, or up again."""
        run(*self.switch, "link", "set", "dev", host, "down" if cut else "up")

    def part(self, *, cut: bool) -> None:
        """Cut all hosts from each other, or join them again; this machine reaches each of them."""
        for host in self.addresses:
            run(*self.switch, "link", "set", "dev", host, "type", "bridge_slave", "isolated", "on" if cut else "off")


@contextmanager
def network(*names: str) -> Iterator[Network]:
    """Make one; nothing of it is left at the end. Raises `NoNamespaces`."""
    made = Network(names)
    with ExitStack() as stack:
        for name in ("switch", *names):
            run("ip", "netns", "add", made.namespace(name))
            stack.callback(run, "ip", "netns", "del", made.namespace(name))
        run(*made.switch, "link", "add", "br0", "type", "bridge")
        run(*made.switch, "link", "set", "br0", "up")
        run(
            "ip", "link", "add", made.own_link, "type", "veth", "peer", "name", "own", "netns", made.namespace("switch")
        )
        stack.callback(run, "ip", "link", "del", made.own_link)
        run("ip", "address", "add", f"{OWN_ADDRESS}/24", "dev", made.own_link)
        run("ip", "link", "set", made.own_link, "up")
        for name, address in made.addresses.items():
            within = ["ip", "-n", made.namespace(name)]
            run(*within, "link", "add", "eth0", "type", "veth", "peer", "name", name, "netns", made.namespace("switch"))
            run(*within, "address", "add", f"{address}/24", "dev", "eth0")
            run(*within, "link", "set", "eth0", "up")
            run(*within, "link", "set", "lo", "up")
        for port in ("own", *names):
            run(*made.switch, "link", "set", "dev", port, "master", "br0", "up")
        yield made
