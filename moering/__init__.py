"""What every moering process shares. Nothing in this package imports torch."""

__version__ = "0.1.0"
