"""The verbs of usocksd, one file each."""
