"""This host: its addresses, its sockets, its control groups and mounts."""
