"""Fuzz one parser: python tests/fuzz TARGET; see README.md."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

if importlib.util.find_spec("atheris") is not None:
    import atheris

    # Which branches of these an input takes is what guides the search.
    with atheris.instrument_imports(include=["usocksd", "transocks", *(["dns"] if "dns_answer" in sys.argv else [])]):
        from fuzz.targets import TARGETS
else:
    atheris = None
    from fuzz.targets import TARGETS

from fuzz.mutate import mutated
from fuzz.seeds import SEEDS


def main() -> int:
    parser = argparse.ArgumentParser("python tests/fuzz", description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--runs", type=int, default=100_000, help="inputs (default 100000)")
    parser.add_argument("--seconds", type=int, default=0, help="time limit in seconds (default: none)")
    parser.add_argument("--longest", type=int, default=4096, help="bytes of an input, at most (default 4096)")
    parser.add_argument("--corpus", type=Path, help="folder for the inputs that reached something new, to go on with")
    parser.add_argument("--plain", action="store_true", help="mutate seeds at random, as where there is no atheris")
    args = parser.parse_args()
    target, seeds = TARGETS[args.target], SEEDS[args.target]
    if atheris is None or args.plain:
        for data in mutated(seeds, args.runs, longest=args.longest):
            try:
                target(data)
            except BaseException:
                print(f"input: {data!r}", file=sys.stderr)
                raise
        print(f"{args.runs} inputs, no finding")
        return 0
    corpus = args.corpus or Path(tempfile.mkdtemp(prefix=f"fuzz-{args.target}-"))
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    # An input that takes more than 5 s or 1 GiB is a finding. Findings are written beside the corpus.
    bounds = [f"-runs={args.runs}", f"-max_total_time={args.seconds}", f"-max_len={args.longest}"]
    limits = ["-timeout=5", "-rss_limit_mb=1024", f"-artifact_prefix={corpus}-", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *bounds, *limits, str(corpus)], target)
    atheris.Fuzz()  # ends the process
    return 0


if __name__ == "__main__":
    sys.exit(main())
