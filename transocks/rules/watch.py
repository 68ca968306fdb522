"""Hears of it when somebody takes nft tables away (nfnetlink, NFNLGRP_NFTABLES): a flush is known at once."""

from __future__ import annotations

import errno
import select
import time
from types import TracebackType

from transocks.tools import FirewallError
from usocksd.host.netlink import NETFILTER, connect, messages

_GROUP_NFTABLES = 1 << 6  # NFNLGRP_NFTABLES is 7
_DELTABLE = 10 << 8 | 2  # NFNL_SUBSYS_NFTABLES, NFT_MSG_DELTABLE
_LARGEST = 1 << 16


class TableWatch:
    """Of the network namespace of this process; takes CAP_NET_ADMIN. Raises FirewallError without."""

    def __init__(self) -> None:
        self._socket = connect(NETFILTER)
        self._socket.setblocking(False)
        try:
            self._socket.bind((0, _GROUP_NFTABLES))
        except OSError as error:
            self._socket.close()
            raise FirewallError(f"can't watch nft tables: {error.strerror}") from None

    def __enter__(self) -> TableWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def wait(self, seconds: float) -> bool:
        """Wait until a table is deleted, by whomever (True), or for so many seconds (False)."""
        deadline = time.monotonic() + seconds
        while not self.forget():
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                return False
        return True

    def forget(self) -> bool:
        """Forget what has happened until now; returns whether a table was deleted."""
        found = False
        while True:
            try:
                data = self._socket.recv(_LARGEST)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    return True  # look, and hear again later
                found = True  # events were lost, so anything may have happened
            else:
                found = found or any(kind == _DELTABLE for kind, *_ in messages(data))
