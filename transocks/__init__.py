"""transocks, a transparent proxy: carries redirected TCP connections to their destinations through a proxy."""

from usocksd import __version__

__all__ = ["__version__"]
