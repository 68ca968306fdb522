"""Master and workers, and what operators ask them."""
