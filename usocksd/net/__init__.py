"""Connections: one epoll, endpoints, relays, dials and listeners, and limits of their number."""
