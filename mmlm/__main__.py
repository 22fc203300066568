"""``python -m mmlm``: the same as the console script ``mmlm``."""

import sys

from mmlm.cli import main

sys.exit(main())
