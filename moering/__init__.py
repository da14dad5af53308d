"""What every moering process shares. Nothing in this package imports torch, but for `moering.fork_server`."""

__version__ = "0.1.0"
