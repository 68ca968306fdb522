"""Hosts as names, networks and addresses: matching them, and resolving names."""
