"""One self-contained page that compares runs: loss, memory, step time, configuration, sampled text.

    python -m experiments.report runs/adamw runs/galore --output report.html

The page needs no other file and no network; the figures are also written beside it as PNG files.
Exit codes: 0 written, 1 not written, 2 wrong arguments or no run.
"""

import sys

from experiments.reporting import page

if __name__ == "__main__":
    sys.exit(page.main())
