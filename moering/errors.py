"""The exceptions of moering.

::

    MoeringError
    ├── ConfigError        a flag, a variable or a configuration file is wrong
    ├── CheckpointError    a checkpoint cannot be served; names file and tensor
    ├── ProtocolError      a frame from a peer breaks the wire format
    ├── HandshakeError     a peer that must not be talked to; never retried
    └── PlanError          no placement satisfies what was asked

Some modules have one more of their own: `EtcdError`, `HttpError`, `StartFailed`, and `NoRoom` of an expert server.
"""


class MoeringError(Exception):
    """Base of all errors that moering raises on purpose; its text is meant for a person."""


class ConfigError(MoeringError):
    """A flag, an environment variable or a configuration file is wrong."""


class CheckpointError(MoeringError):
    """A checkpoint cannot be served. The text names the file and, where there is one, the tensor."""


class ProtocolError(MoeringError):
    """A frame breaks the wire format. It costs its sender an error and nobody else anything."""


class HandshakeError(MoeringError):
    """Two processes must not work together (version, checkpoint, numerics). Fatal: never retried."""


class PlanError(MoeringError):
    """No placement satisfies what was asked of it."""
