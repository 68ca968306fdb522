"""Master and workers: one process that owns what must be one truth, and those that carry the connections."""
