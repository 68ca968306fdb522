"""What both daemons stand on: reactor, relay, dial, listeners, configuration loading, log, life cycle.

Nothing here knows SOCKS, or which of the two daemons it serves.
"""
