"""Attacks on the daemons, each with the good client's figures: `python -m bench.attacks.NAME`, see bench/README.md."""
