"""The operator's verbs, one file each: what the command line of either daemon asks one that runs."""
