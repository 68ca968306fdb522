"""Side-by-side measurements of this project's daemons and other proxies; start with `bench/run --help`."""
