"""python -m usocksd"""

import sys

from usocksd.cli import main

sys.exit(main())
