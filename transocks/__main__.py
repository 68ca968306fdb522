"""python -m transocks"""

import sys

from transocks.cli import main

sys.exit(main())
