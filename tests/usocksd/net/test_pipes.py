import fcntl
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import usocksd
from usocksd.net import pipes as pipes_module
from usocksd.net.pipes import PIPE_SIZE, Pipe, PipePool


@pytest.fixture
def pool(nothing_leaks: None) -> Iterator[PipePool]:
    pool = PipePool(1024)
    yield pool
    pool.close()


def borrow(pool: PipePool) -> Pipe:
    pipe = pool.borrow()
    assert pipe is not None
    return pipe


def is_open(pipe: Pipe) -> bool:
    return os.path.exists(f"/proc/self/fd/{pipe.reader}") or os.path.exists(f"/proc/self/fd/{pipe.writer}")


def test_pipes_are_large_and_do_not_block(pool: PipePool) -> None:
    pipe = borrow(pool)
    assert fcntl.fcntl(pipe.writer, fcntl.F_GETPIPE_SZ) == PIPE_SIZE
    assert os.write(pipe.writer, bytes(PIPE_SIZE + 1)) == PIPE_SIZE
    with pytest.raises(BlockingIOError):
        os.write(pipe.writer, b"x")
    assert not os.get_inheritable(pipe.reader)
    assert not os.get_inheritable(pipe.writer)
    pipe.filled = PIPE_SIZE
    pool.give_back(pipe)


def test_the_last_one_given_back_is_lent_next(pool: PipePool) -> None:
    first, second = borrow(pool), borrow(pool)
    assert pool.lent == 2
    pool.give_back(first)
    pool.give_back(second)
    assert pool.lent == 0
    assert borrow(pool) is second
    assert borrow(pool) is first
    pool.give_back(first)
    pool.give_back(second)


def test_one_with_bytes_in_it_is_closed(pool: PipePool) -> None:
    pipe = borrow(pool)
    os.write(pipe.writer, b"somebody's")
    pipe.filled = 10
    pool.give_back(pipe)
    assert pool.lent == 0
    assert not is_open(pipe)


def test_only_so_many_are_kept(pool: PipePool) -> None:
    pipes = [borrow(pool) for _ in range(pipes_module._KEEP + 3)]
    for pipe in pipes:
        pool.give_back(pipe)
    assert sum(map(is_open, pipes)) == pipes_module._KEEP
    pool.close()
    assert not any(map(is_open, pipes))
    assert pool.lent == 0


def test_none_without_descriptors(pool: PipePool, no_more_descriptors: Any) -> None:
    kept = borrow(pool)
    pool.give_back(kept)
    with no_more_descriptors():
        assert pool.borrow() is kept
        assert pool.borrow() is None
    assert pool.lent == 1
    pool.give_back(kept)


def test_lends_no_more_than_its_share() -> None:
    pool = PipePool(2)
    first, second = pool.borrow(), pool.borrow()
    assert first is not None
    assert second is not None
    assert pool.borrow() is None
    pool.give_back(first)
    again = pool.borrow()
    assert again is not None
    pool.give_back(again)
    pool.give_back(second)
    pool.close()


UNPRIVILEGED = """
    import fcntl, os, sys
    from usocksd.net.pipes import PIPE_SIZE, PipePool

    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    held = []
    while len(held) < 4000:
        held += os.pipe2(os.O_NONBLOCK)
        try:
            fcntl.fcntl(held[-1], fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        except PermissionError:
            break
    else:
        sys.exit(77)
    pool = PipePool(1024)
    assert pool.borrow() is None and not pool.lent
    os.close(held.pop())
"""


def test_without_privileges_the_kernel_rations_pipes() -> None:
    command = [sys.executable, "-c", textwrap.dedent(UNPRIVILEGED)]
    root = Path(usocksd.__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 77:
        pytest.skip("pipe pages are not rationed here (fs.pipe-user-pages-soft)")
    assert done.returncode == 0, done.stderr
