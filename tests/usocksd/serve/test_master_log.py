"""The master's own log, wherever the configuration puts it."""

import os
from pathlib import Path

from daemons import wait_until

from usocksd.serve.master_log import MasterLog
from usocksd.settings.types import LogConfig


def test_dropped_records_stay_counted(tmp_path: Path, nothing_leaks: None) -> None:
    """When the log moves, or is opened again."""
    fifo, file = tmp_path / "fifo", tmp_path / "file"
    os.mkfifo(fifo)
    log = MasterLog("tiny", LogConfig())
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # opened, and never read
    try:
        log.prepare(LogConfig(filename=str(fifo)))

        def dropped() -> int:
            for _ in range(100):
                log.current.append(b"x" * 10_000 + b"\n")
            return log.dropped

        count = wait_until(dropped, "some are dropped")
        log.prepare(LogConfig(filename=str(file)))
        old = log.commit()
        assert old is not None
        old.close(0.0)
        assert log.dropped >= count
        log.current.close()
        log.reopen()
        assert log.dropped >= count
    finally:
        os.close(reader)
        log.current.close()
