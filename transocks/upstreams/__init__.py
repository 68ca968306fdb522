"""The proxies that connections go through: groups of them, their health, how they are asked."""
