"""``python -m pruneops``."""

import sys

from pruneops.cli import main

sys.exit(main())
