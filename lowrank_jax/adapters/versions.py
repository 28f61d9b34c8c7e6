"""What older versions called the places of an adaptation's arrays, for whoever stored them.

Files of adapters are PEFT's, whose names do not change. Checkpoints hold the tree `train`, beside it
the optimizer's trees of the same layout, and `frozen`; their paths are what these names make.
"""

from __future__ import annotations

import re

FORMAT_VERSION = 2  # 2: leaves trained in full stand under "trainable"

_BEFORE = r"((?:(?!(?:sites|shared|whole|trainable)/)[^/]+/)*)"
# (pattern, replacement) on whole paths, from format 1: the first of the three parts of `train`
RENAMED: tuple[tuple[str, str], ...] = ((rf"^{_BEFORE}whole/", r"\1trainable/"),)


def present_path(path: str) -> str:
    """A path of a stored tree by its present name.

    >>> present_path("params/whole/head/kernel"), present_path("opt_state/0/mu/whole/head/kernel")
    ('params/trainable/head/kernel', 'opt_state/0/mu/trainable/head/kernel')
    >>> present_path("params/sites/whole/kernel/a")
    'params/sites/whole/kernel/a'
    """
    for pattern, replacement in RENAMED:
        path = re.sub(pattern, replacement, path)
    return path
