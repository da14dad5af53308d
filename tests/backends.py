"""The arithmetic that this machine has."""

from collections.abc import Iterator
from contextlib import contextmanager

from kernels.linear import available_backends
from kernels.native_linear import available

if available():
    from kernels import _native


BACKENDS = available_backends()


@contextmanager
def computing_with(instructions: str) -> Iterator[None]:
    """The native kernels in one of `INSTRUCTIONS`."""
    assert _native.use(instructions)
    try:
        yield
    finally:
        _native.use(INSTRUCTIONS[0])


INSTRUCTIONS = [name for name in ("avx512", "avx2") if _native.use(name)] if available() else []
"""The best comes first, and is in use."""
if INSTRUCTIONS:
    _native.use(INSTRUCTIONS[0])
