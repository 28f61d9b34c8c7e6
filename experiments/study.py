"""The study behind docs/results/compare.md: the same runs of every optimizer, one core each.

    python -m experiments.study --time

It may be stopped, and goes on where it was. Results go to `experiments/results/compare.json`.
"""

import sys

from experiments.benchmarks import study

if __name__ == "__main__":
    sys.exit(study.main())
