"""Hosts as names, networks and addresses: what matches, and what resolves."""
