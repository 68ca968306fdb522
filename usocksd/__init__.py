"""usocksd, a SOCKS server with access control and a choice of egress address; and what transocks shares with it."""

__version__ = "2.0.0"
