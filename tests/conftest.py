import os
import signal
import sys
from pathlib import Path

from hypothesis import settings

# Makes tests/daemons.py and others importable from all test folders.
sys.path.append(str(Path(__file__).parent))

# ./test has made two forms of the wheel: this process imports the interpreted one, because tests subclass and patch what is
# in it, and the daemons and verbs that it starts run the compiled one.
if "TRANSOCKS_TESTED" in os.environ:
    os.environ["PYTHONPATH"] = os.environ["TRANSOCKS_TESTED"]

# pytest-xdist's workers ignore SIGINT, and what they start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline, since a shared machine may be slow at times. In CI, examples are the same in each run.
settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")
