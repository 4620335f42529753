"""`eval` on real data: what a model finds, and how long that takes from nothing.

    python benchmarks/eval.py DATASET [DIR] [--model e5v-tiny]

Writes benchmarks/results/eval-DATASET.json: the report without what it keeps of every query.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--model", default="e5v-tiny")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        words = ["eval", args.dataset, "--model", args.model, "--cache", cache, "--json"]
        words += ["--data", str(args.data)] if args.data else []
        done = subprocess.run([sys.executable, "-m", "e5v_search", *words], stdout=subprocess.PIPE, check=True)
    report = json.loads(done.stdout)
    if args.data:
        report["source"] = str(Path(report["source"]).relative_to(args.data.absolute()))
    command = f"python benchmarks/eval.py {args.dataset} {'DIR ' if args.data else ''}--model {args.model}"
    print(save(f"eval-{args.dataset}", {"command": command, "report": report}))


if __name__ == "__main__":
    main()
