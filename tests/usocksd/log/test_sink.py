import errno
import fcntl
import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

import usocksd
from usocksd.log.formats import JSON, MAX_RECORD
from usocksd.log.sink import Output, Sink

ROOT = Path(usocksd.__file__).parents[1]
FOREVER = 3600.0
LIMIT = 20.0  # seconds after which a test has failed


def line(number: int, size: int = 100) -> bytes:
    text = b'{"message":"record","n":%d,"x":"' % number
    return text + b"x" * (size - len(text) - 3) + b'"}\n'


def numbers(data: bytes) -> list[int]:
    """The numbers of the records in `data`, which must be whole lines."""
    assert data == b"" or data.endswith(b"\n")
    records = [json.loads(text) for text in data.splitlines()]
    return [record["n"] for record in records if record["message"] == "record"]


def others(data: bytes) -> list[dict[str, object]]:
    records = [json.loads(text) for text in data.splitlines()]
    return [record for record in records if record["message"] != "record"]


class Reader:
    """Reads lines from a descriptor; fails instead of waiting for ever."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.buffer = b""

    def line(self) -> bytes:
        deadline = time.monotonic() + LIMIT
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            assert left > 0, f"no line came, but {self.buffer!r}"
            if select.select([self.fd], [], [], left)[0]:
                data = os.read(self.fd, 1 << 16)
                assert data, f"the end came, after {self.buffer!r}"
                self.buffer += data
        text, _, self.buffer = self.buffer.partition(b"\n")
        return text + b"\n"

    def rest(self) -> bytes:
        while data := os.read(self.fd, 1 << 16):
            self.buffer += data
        return self.buffer


@pytest.fixture
def sink() -> Iterator[Callable[..., Sink]]:
    made: list[Sink] = []

    def make(target: str | Path | int, **options: float) -> Sink:
        target = target if isinstance(target, int) else str(target)
        options = {"linger": 0.0, "backoff": 0.001, **options}
        made.append(Sink(target, JSON("test", "localhost"), **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close(0.0)
        each._writer.join(LIMIT)
        assert not each._writer.is_alive()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe of one page."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    yield reader, writer
    for fd in (reader, writer):
        with suppress(OSError):
            os.close(fd)


MakeSink = Callable[..., Sink]
Pipe = tuple[int, int]


# Files.


def test_mode_and_flags(tmp_path: Path) -> None:
    old = os.umask(0o002)
    try:
        output = Output(str(tmp_path / "log"))
    finally:
        os.umask(old)
    assert (tmp_path / "log").stat().st_mode & 0o7777 == 0o644
    assert fcntl.fcntl(output.fd, fcntl.F_GETFL) & os.O_APPEND
    assert fcntl.fcntl(output.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    output.close()


@pytest.mark.parametrize("name", ["none/log", "fifo"])
def test_a_path_that_can_not_be_opened(sink: MakeSink, tmp_path: Path, name: str) -> None:
    """A FIFO without a reader is one: it does not hang."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="No such"):
        sink(tmp_path / name)


def test_records_that_come_while_lingering_share_a_write(sink: MakeSink) -> None:
    reader, writer = os.pipe2(os.O_DIRECT)  # a read returns what one write wrote
    log = sink(writer, linger=FOREVER)
    for number in range(10):
        log.append(line(number))
    log.close(LIMIT)
    assert numbers(os.read(reader, 1 << 16)) == list(range(10))
    os.close(reader)
    os.close(writer)


def test_no_record_waits_for_the_next(sink: MakeSink, pipe: Pipe) -> None:
    reader = Reader(pipe[0])
    log = sink(pipe[1])
    for number in range(2000):
        log.append(line(number))
        assert reader.line() == line(number)


def test_append_inside_of_append(sink: MakeSink, tmp_path: Path) -> None:
    log = sink(tmp_path / "log")
    with log._lock:  # where a destructor or a signal handler may find us
        log.append(line(1))
    log.close(LIMIT)
    assert numbers((tmp_path / "log").read_bytes()) == [1]


def test_after_close(sink: MakeSink, tmp_path: Path) -> None:
    log = sink(tmp_path / "log")
    log.close(LIMIT)
    log.append(line(1))
    log.close(LIMIT)
    assert log.dropped == 1
    assert (tmp_path / "log").read_bytes() == b""


# Rotation.


def test_rotation_while_threads_append(sink: MakeSink, tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = sink(path)
    descriptors = len(os.listdir("/proc/self/fd"))
    threads, count = 4, 3000
    halfway = threading.Barrier(threads + 1)

    def work(first: int) -> None:
        for number in range(first, first + count):
            if number == first + count // 2:
                halfway.wait(LIMIT)
            log.append(line(number))

    workers = [threading.Thread(target=work, args=(start * count,)) for start in range(threads)]
    for worker in workers:
        worker.start()
    halfway.wait(LIMIT)
    turns = 0
    while any(worker.is_alive() for worker in workers) or turns == 0:
        # The file may not be there again yet. It always was the first time.
        with suppress(FileNotFoundError):
            path.rename(tmp_path / f"log.{turns}")
            turns += 1
            log.reopen()
    for worker in workers:
        worker.join()
    log.close(LIMIT)
    found = [number for each in tmp_path.iterdir() for number in numbers(each.read_bytes())]
    assert sorted(found) == list(range(threads * count))
    assert log.dropped == 0
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1


def test_a_reopen_that_fails_keeps_the_old_file(sink: MakeSink, tmp_path: Path) -> None:
    path, old = tmp_path / "log", tmp_path / "old"
    log = sink(path)
    path.rename(old)
    os.mkfifo(path)  # ENXIO while nobody reads
    log.reopen()
    with old.open("rb") as stream:
        wait_for(lambda: b"failed to reopen" in old.read_bytes())
        log.append(line(1))
        log.close(LIMIT)
        data = stream.read()
    assert numbers(data) == [1]
    (complaint,) = others(data)
    assert complaint["severity"] == "error"
    assert "No such device" in str(complaint["error"])


def test_reopen_of_an_inherited_descriptor_is_nothing(sink: MakeSink, pipe: Pipe) -> None:
    log = sink(pipe[1])
    log.reopen()
    log.append(line(1))
    assert Reader(pipe[0]).line() == line(1)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


# Several processes.

APPEND = """
import sys
from usocksd.log.formats import JSON
from usocksd.log.sink import Sink
target, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sink = Sink(int(target) if target.isdigit() else target, JSON("test", "localhost"), linger=0.0)
sys.stdin.read()
for number in range(first, first + count):
    sink.append(b'{"message":"record","n":%d,"x":"%s"}\\n' % (number, b"x" * (number * 7 % 900)))
sink.close(30.0)
print(sink.dropped)
"""


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_processes_share_an_output(tmp_path: Path, kind: str) -> None:
    reader, writer = os.pipe()
    command = [sys.executable, "-c", APPEND, str(writer) if kind == "pipe" else str(tmp_path / "log")]
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, str(turn * 2000), "2000"],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    pass_fds=[writer],
                )
            )
            for turn in range(3)
        ]
        os.close(writer)
        for each in started:
            assert each.stdin
            each.stdin.close()
        data = Reader(reader).rest()
        os.close(reader)
        assert [each.stdout.read() for each in started if each.stdout] == [b"0\n"] * 3
    assert sorted(numbers(data if kind == "pipe" else (tmp_path / "log").read_bytes())) == list(range(6000))


# Pipes.


def test_chunks_of_a_pipe_are_whole_records() -> None:
    reader, writer = os.pipe2(os.O_DIRECT)
    output = Output(writer)
    records = deque(line(number, 900) for number in range(10))
    sizes = []
    found = []
    while records:
        done = output.write(records, LIMIT)
        chunk = os.read(reader, 1 << 16)
        assert len(chunk) == done
        sizes.append(len(chunk))
        found += numbers(chunk)
    assert sizes == [3600, 3600, 1800]
    assert found == list(range(10))
    output.close()
    os.close(reader)
    os.close(writer)


def test_flags_of_an_inherited_descriptor_stay(sink: MakeSink, pipe: Pipe) -> None:
    log = sink(pipe[1])
    log.append(line(1))
    assert Reader(pipe[0]).line() == line(1)
    assert not fcntl.fcntl(pipe[1], fcntl.F_GETFL) & os.O_NONBLOCK


def test_a_record_of_more_than_a_pipe_takes(sink: MakeSink, pipe: Pipe) -> None:
    log = sink(pipe[1])
    reader = Reader(pipe[0])
    for record in (line(1), line(2, MAX_RECORD), line(3), line(4, 4096), line(5, 4097), line(6)):
        log.append(record)
    assert [numbers(reader.line()) for _ in range(6)] == [[1], [2], [3], [4], [5], [6]]


def test_a_pipe_that_nobody_reads(sink: MakeSink, pipe: Pipe) -> None:
    log = sink(pipe[1], max_bytes=8192)
    count = 0
    while log.dropped < 10:
        log.append(line(count))
        count += 1
    reader = Reader(pipe[0])
    found: list[int] = []
    while not (told := others(text := reader.line())):
        found += numbers(text)
    assert found == list(range(count - 10))
    assert told[0]["message"] == "log records dropped"
    assert told[0]["count"] == 10
    log.append(line(count))
    assert reader.line() == line(count)


def test_bound_on_the_number_of_records(sink: MakeSink, pipe: Pipe) -> None:
    log = sink(pipe[1], linger=FOREVER, max_records=5)
    for number in range(8):
        log.append(line(number))
    assert log.dropped == 3
    log.close(LIMIT)
    reader = Reader(pipe[0])
    assert [numbers(reader.line()) for _ in range(5)] == [[n] for n in range(5)]
    assert others(reader.line())[0]["count"] == 3


def test_close_does_not_wait_for_a_stopped_reader(sink: MakeSink, pipe: Pipe) -> None:
    log = sink(pipe[1])
    for number in range(100):
        log.append(line(number))
    begin = time.monotonic()
    log.close(0.05)
    assert time.monotonic() - begin < LIMIT / 2
    log._writer.join(LIMIT)
    os.set_blocking(pipe[0], False)
    data = os.read(pipe[0], 1 << 16)
    assert len(numbers(data)) + log.dropped == 100


def test_close_does_not_wait_for_a_hanging_write(sink: MakeSink, tmp_path: Path) -> None:
    log = sink(tmp_path / "log")
    writing, release = threading.Event(), threading.Event()

    def hang(records: deque[bytes], patience: float) -> int:
        writing.set()
        release.wait(LIMIT)
        raise OSError(errno.EIO, "")

    log._output.write = hang  # type: ignore[method-assign]
    log.append(line(1))
    assert writing.wait(LIMIT)
    log.close(0.0)
    log.append(line(2))
    release.set()
    log._writer.join(LIMIT)
    assert log.dropped == 2


def test_another_reader_comes(sink: MakeSink, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    first = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = sink(path, max_bytes=20_000)
    log.append(line(1))
    assert Reader(first).line() == line(1)
    os.close(first)
    for number in range(2, 102):
        log.append(line(number))
    wait_for(lambda: log.failing is not None)
    log.append(line(0, 20_000))  # too much
    second = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    reader = Reader(second)
    assert [numbers(reader.line()) for _ in range(2, 102)] == [[n] for n in range(2, 102)]
    (told,) = others(reader.line())
    assert told["count"] == 1
    assert "Broken pipe" in str(told["error"])
    log.close(LIMIT)
    os.close(second)


def test_records_appended_while_the_reader_is_stopped_follow(sink: MakeSink, pipe: Pipe) -> None:
    os.write(pipe[1], bytes(4095) + b"\n")
    log = sink(pipe[1])
    log.append(line(1))
    wait_for(lambda: len(log._held) > 0)
    log.append(line(2))
    wait_for(log._wake.empty)  # the thread has been told, and could do nothing
    reader = Reader(pipe[0])
    reader.line()
    assert reader.line() == line(1)
    assert reader.line() == line(2)


def test_rotation_in_the_middle_of_a_long_record(sink: MakeSink, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = sink(path)
    log.append(line(1, MAX_RECORD))
    wait_for(lambda: bool(select.select([reading], [], [], 0)[0]))
    log.reopen()
    assert Reader(reading).line() == line(1, MAX_RECORD)
    log.close(LIMIT)
    os.close(reading)


def test_stderr_closed_before_the_start() -> None:
    fd = os.open(os.devnull, os.O_WRONLY)
    os.close(fd)
    output = Output(fd)
    assert output.write(deque([line(1)]), LIMIT) == 100
    output.close()


# Full disks.


def test_the_first_failing_write_is_reported_on_stderr(sink: MakeSink, capfd: pytest.CaptureFixture[str]) -> None:
    log = sink("/dev/full")
    for number in range(3):
        log.append(line(number))
        wait_for(lambda: log.failing is not None)
    assert log.failing == "No space left on device"
    log.close(LIMIT)
    assert log.dropped == 3
    (told,) = map(json.loads, capfd.readouterr().err.splitlines())
    assert (told["severity"], told["message"]) == ("error", "the log can't be written")
    assert (told["file"], "No space left" in told["error"]) == ("/dev/full", True)


def test_a_log_that_is_written_again(sink: MakeSink, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with file_size_limit(50):
        log = sink(tmp_path / "log", max_records=1)
        log.append(line(1))
        wait_for(lambda: log.failing is not None)
        log.append(line(2))
        log.append(line(3))
    wait_for(lambda: log.failing is None)
    wait_for(lambda: "the log is written again" in capfd.readouterr().err)
    log.close(LIMIT)
    data = (tmp_path / "log").read_bytes()
    assert (numbers(data), log.dropped) == ([1, 2], 1)
    (told,) = others(data)
    assert (told["message"], told["count"], "No space left" in str(told["error"])) == ("log records dropped", 1, True)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond `size` are cut short, then fail with EFBIG, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def drain(output: Output, records: deque[bytes]) -> None:
    while records:
        output.write(records, 0.0)


def test_a_line_cut_short_does_not_stay(tmp_path: Path) -> None:
    path = tmp_path / "log"
    output = Output(str(path))
    records = deque(line(number) for number in range(10))
    with file_size_limit(550):
        for _ in range(3):
            with pytest.raises(OSError, match="No space left"):
                drain(output, records)
            assert numbers(path.read_bytes()) == [0, 1, 2, 3, 4]
    drain(output, records)
    assert numbers(path.read_bytes()) == list(range(10))
    output.close()


def test_a_cut_line_that_can_not_be_removed_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)  # as with 2>log: no O_APPEND, so truncating would leave a hole
    output = Output(fd)
    records = deque(line(number) for number in range(10))
    with file_size_limit(550), pytest.raises(OSError, match="File too large"):
        drain(output, records)
    drain(output, records)
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[5] == line(5)[:50] + b"\n"
    del lines[5]
    assert numbers(b"".join(lines)) == list(range(10))
    output.close()
    os.close(fd)
