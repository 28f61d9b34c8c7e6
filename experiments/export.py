"""The newest good checkpoint of a run as a folder that Hugging Face's transformers reads.

    python -m experiments.export --workdir=runs/default --output=exported

Exit codes: 0 written, 1 no good checkpoint or not written, 2 wrong arguments.
"""

import sys

from experiments.harness import export

if __name__ == "__main__":
    sys.exit(export.main())
