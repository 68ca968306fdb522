"""nft tables that belong to this process, and the news that somebody has deleted others: for `transocks rules hold`."""

from __future__ import annotations

import ctypes
import errno
import select
import time

from transocks.tools import FirewallError
from usocksd.host.netlink import NETFILTER, RECEIVE_SIZE, connect, messages

_LIBRARY = "libnftables.so.1"
_GROUP_NFTABLES = 1 << 6  # NFNLGRP_NFTABLES is 7
_DELTABLE = 10 << 8 | 2  # NFNL_SUBSYS_NFTABLES, NFT_MSG_DELTABLE


class OwnTables:
    """Loads tables in nft's language, as `nft -f` does, through one socket that stays open. Raises FirewallError.

    Nobody else can change, delete or flush tables with `flags owner`, and they end with the socket that has made them
    (NFT_TABLE_F_OWNER, Linux 5.12). `nft` closes its own when it ends, so this asks the library that nft is made of.
    """

    def __init__(self) -> None:
        try:
            self._nft = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise FirewallError(str(error)) from None
        self._nft.nft_ctx_new.restype = ctypes.c_void_p
        self._nft.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        self._context: ctypes.c_void_p | None = ctypes.c_void_p(self._nft.nft_ctx_new(0))
        self._nft.nft_ctx_buffer_error(self._context)  # else the library writes to stderr

    def load(self, text: str) -> None:
        """Do this in one transaction. Raises FirewallError, and then nothing has changed."""
        if self._nft.nft_run_cmd_from_buffer(self._context, ctypes.c_char_p(text.encode())) != 0:
            words = self._nft.nft_ctx_get_error_buffer(self._context)
            raise FirewallError((words or b"").decode(errors="replace").strip() or f"{_LIBRARY}: failed")

    def close(self) -> None:
        """The tables are gone then."""
        if self._context is not None:
            self._nft.nft_ctx_free(self._context)
            self._context = None


class TableWatch:
    """Hears when nft tables are deleted in the network namespace of this process (nfnetlink), so a flush is known at
    once. Takes CAP_NET_ADMIN. Raises FirewallError without.
    """

    def __init__(self) -> None:
        self._socket = connect(NETFILTER)
        self._socket.setblocking(False)
        try:
            self._socket.bind((0, _GROUP_NFTABLES))
        except OSError as error:
            raise FirewallError(f"can't watch nft tables: {error.strerror}") from None

    def wait(self, seconds: float) -> bool:
        """Wait until somebody deletes a table (True), `seconds` at most (False)."""
        deadline = time.monotonic() + seconds
        while not self.forget():
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                return False
        return True

    def forget(self) -> bool:
        """Forget all events so far; returns whether a table was deleted."""
        deleted = False
        while True:
            try:
                data = self._socket.recv(RECEIVE_SIZE)
            except BlockingIOError:
                return deleted
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    return True  # look, and hear again later
                deleted = True  # events were lost, so anything may have happened
            else:
                deleted = deleted or any(message.kind == _DELTABLE for message in messages(data))
