"""The causes of a worker's death."""

import signal

import pytest

from usocksd.serve.coroner import Coroner


class Kernel:
    """Counts the processes that it has killed for memory; None if it does not count."""

    def __init__(self, count: int | None = 7) -> None:
        self.count = count

    def __call__(self) -> int | None:
        return self.count


@pytest.mark.parametrize(
    ("status", "cause"), [(0, "exit status 0"), (3, "exit status 3"), (-11, "signal 11 (SIGSEGV)"), (-63, "signal 63")]
)
def test_an_exit_or_a_signal(status: int, cause: str) -> None:
    assert Coroner(Kernel()).cause(status, killed=False) == cause


def test_out_of_memory() -> None:
    """The kernel's count explains one death for each kill."""
    kernel = Kernel()
    coroner = Coroner(kernel)
    kernel.count = 9
    causes = [coroner.cause(-signal.SIGKILL, killed=False) for _ in range(3)]
    assert ["out of memory" in cause for cause in causes] == [True, True, False]
    assert "not by the kernel" in causes[2]


def test_a_kernel_that_does_not_count() -> None:
    assert Coroner(Kernel(None)).cause(-signal.SIGKILL, killed=False) == "killed by signal 9: out of memory?"


def test_killed_by_the_daemon_itself() -> None:
    kernel = Kernel()
    coroner = Coroner(kernel)
    kernel.count = 8
    assert coroner.cause(-signal.SIGKILL, killed=True) == "killed by the daemon"


def test_an_old_kill_explains_no_later_death() -> None:
    kernel = Kernel()
    coroner = Coroner(kernel)
    kernel.count = 8
    coroner.forget(10.0)
    assert "out of memory" in coroner.cause(-signal.SIGKILL, killed=False)
    kernel.count = 9
    for now in (12.0, 16.0, 22.0):
        coroner.forget(now)
    assert "not by the kernel" in coroner.cause(-signal.SIGKILL, killed=False)
