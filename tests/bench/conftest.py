"""Makes the kernels that the bench times run without a GPU."""

import tests.interpreter  # noqa: F401
