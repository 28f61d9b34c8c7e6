"""The blocks of the page that adapts models of other packages."""

import pytest

pytest.importorskip("tunix", reason="needs the packages of the zoo: run `make test-zoo`")

from tests.workspace.test_readme import ZOO, blocks, check_block


@pytest.mark.parametrize("block", blocks("python", ZOO))
def test_a_block_runs_alone_and_prints_what_it_says(block):
    check_block(block)
