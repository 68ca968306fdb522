import os
import resource
import subprocess
import sys
from pathlib import Path

import usocksd
from usocksd.runtime.limits import most_connections, most_pipes

ROOT = Path(usocksd.__file__).parents[1]

SET_AND_RAISE = """
import resource, sys
from usocksd.runtime.limits import raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
print(raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def raised(soft: int, hard: int) -> list[int]:
    """What the limit is in a process that starts with these."""
    code = SET_AND_RAISE.format(soft=soft, hard=hard)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_the_soft_limit_becomes_the_hard_one() -> None:
    assert raised(100, 200) == [200] * 3


def test_a_limit_that_is_raised_already() -> None:
    assert raised(200, 200) == [200] * 3


def test_an_endless_hard_limit_means_the_kernel_s_own() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    endless = hard == resource.RLIM_INFINITY
    # No process may raise its hard limit without privileges, so this is what it is where it is not endless already.
    expected = int(Path("/proc/sys/fs/nr_open").read_text()) if endless else hard
    assert raised(100, hard) == [expected] * 3


def test_connections_that_fit() -> None:
    open_now = len(os.listdir("/proc/self/fd"))
    assert most_connections(1600) == (1600 - open_now - 48 - 2 * 50) // 2
    assert most_pipes(1600) == 50


def test_what_is_open_already_does_not_fit_again() -> None:
    before = most_connections(1000)
    pipes = [os.pipe() for _ in range(10)]
    assert most_connections(1000) == before - 10
    for pipe in pipes:
        for fd in pipe:
            os.close(fd)


def test_at_least_one() -> None:
    assert most_connections(3) == 1
