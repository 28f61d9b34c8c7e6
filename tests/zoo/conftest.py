"""Warnings of the packages of the zoo, and of what they bring, are not ours to mend."""

import warnings

import pytest

# By the module that a warning is attributed to.
PACKAGES = (
    "tunix", "gemma", "kauldron", "equinox", "haiku", "flaxmodels",
    "flax.nnx",  # to which what tunix calls is attributed
    "absl", "etils", "google", "grain", "jaxtyping", "jmp", "qwix", "tensorflow", "transformers",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _warnings_of_packages_are_theirs():
    warnings.filterwarnings("ignore", module=rf"({'|'.join(PACKAGES)})(\.|$)")
