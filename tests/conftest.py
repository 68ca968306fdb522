import os
import signal
import sys
from pathlib import Path

from hypothesis import settings

# What several test folders share is imported from here (tests/daemons.py).
sys.path.append(str(Path(__file__).parent))

# pytest-xdist's workers ignore SIGINT, and what they start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A shared machine is slow at times, which is no fault of an example. What CI finds, it must find again.
settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")
