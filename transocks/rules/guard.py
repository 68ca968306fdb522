"""nft tables that belong to this process: nobody else can change, delete or flush them, and they end with it.

The kernel keeps to that (NFT_TABLE_F_OWNER, Linux 5.12) by the socket that has made them. `nft` closes its own when it
ends, so this asks the library that nft itself is made of.
"""

from __future__ import annotations

import ctypes

from transocks.tools import FirewallError

_LIBRARY = "libnftables.so.1"


class Guard:
    """Takes nft's language, as `nft -f` does, through one socket that stays open. Raises FirewallError."""

    def __init__(self) -> None:
        try:
            self._nft = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise FirewallError(str(error)) from None
        self._nft.nft_ctx_new.restype = ctypes.c_void_p
        self._nft.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        self._context: ctypes.c_void_p | None = ctypes.c_void_p(self._nft.nft_ctx_new(0))
        self._nft.nft_ctx_buffer_error(self._context)  # else it writes to stderr itself

    def load(self, text: str) -> None:
        """Do this in one transaction. Raises FirewallError, and then nothing has changed."""
        if self._nft.nft_run_cmd_from_buffer(self._context, ctypes.c_char_p(text.encode())) != 0:
            said = self._nft.nft_ctx_get_error_buffer(self._context)
            raise FirewallError((said or b"").decode(errors="replace").strip() or f"{_LIBRARY}: failed")

    def close(self) -> None:
        """The tables are gone then."""
        if self._context is not None:
            self._nft.nft_ctx_free(self._context)
            self._context = None
