"""The verbs of transocks, one file each."""
