"""This host: its addresses, its sockets, its limits."""
