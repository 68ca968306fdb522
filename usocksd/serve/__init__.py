"""Master and workers, and the verbs by which operators query and control them."""
