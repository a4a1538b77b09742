"""`python -m specauf`, the same as `specauf`."""

import sys

from specauf.cli import main

sys.exit(main())
