"""Compute that does not depend on the batch: a row's bits are a function of that row alone.

transformers looks for a package of this name and reads its version, hence `__version__`.
"""

__version__ = "0.1.0"
