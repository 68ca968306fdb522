"""Connections: one epoll, endpoints, relays, dials and listeners, and how many there may be."""
