"""``python -m moering`` is the command ``moering``."""

import sys

from moering.cli import main

sys.exit(main())
