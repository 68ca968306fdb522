"""Connections: one epoll, endpoints, relays, dials and listeners."""
