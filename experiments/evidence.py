"""The old name of `experiments.study`; it goes with the next minor version."""

import sys

from experiments.benchmarks import study

if __name__ == "__main__":
    print(
        "note: `python -m experiments.evidence` is now called `python -m experiments.study`, and "
        "keeps its runs in runs/compare; here they stay in runs/evidence",
        file=sys.stderr,
    )
    sys.exit(study.main(["--root", "runs/evidence", *sys.argv[1:]]))
