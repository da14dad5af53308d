"""Makes the Triton kernels run without a GPU."""

import tests.interpreter  # noqa: F401
