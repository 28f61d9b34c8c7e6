"""Handwritten digits in two domains: upright and turned by 90 degrees.

scikit-learn's 1797 images of 8 x 8 pixels.

They come with scikit-learn (the test set of UCI's "Optical Recognition of Handwritten Digits"), so
nothing is downloaded. One image in five, by the CRC-32 of its upright pixels, is for validation, in
both domains: a model trained on one has met no validation image of the other.
"""

import zlib

import numpy as np

from experiments.data.loader import Numbered

NAMES = ("digits", "digits_rotated")
CLASSES = tuple("0123456789")


class Images(Numbered):
    """{"inputs": (b, I, I, C) float32, "targets": (b,) int32, "weights": (b,) float32}."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch_size: int, seed: int):
        self.images, self.labels = images, labels
        super().__init__(len(images), len(images), batch_size, seed)

    def _read(self, examples):
        weights = np.ones(len(examples), np.float32)
        return {
            "inputs": self.images[examples],
            "targets": self.labels[examples],
            "weights": weights,
        }


def digits(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{split: (images (n, 8, 8, 1) float32 in [-1, 1], labels (n,) int32)} of one of NAMES.

    Raises ImportError without scikit-learn.

    >>> {split: len(labels) for split, (_, labels) in digits("digits").items()}
    {'train': 1449, 'validation': 348}
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"data.name={name!r} needs scikit-learn: pip install -e '.[experiments]'"
        ) from error
    found = load_digits()
    pixels = (found.images / 8 - 1).astype(np.float32)
    held_out = np.array([zlib.crc32(image.tobytes()) % 5 == 0 for image in pixels])
    if name == "digits_rotated":
        pixels = np.rot90(pixels, axes=(1, 2))
    images, labels = np.ascontiguousarray(pixels)[..., None], found.target.astype(np.int32)
    return {
        split: (images[chosen], labels[chosen])
        for split, chosen in (("train", ~held_out), ("validation", held_out))
    }


def fingerprint(splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """Equal for equal images and labels."""
    return "/".join(
        f"{len(labels)}-{zlib.crc32(labels.tobytes(), zlib.crc32(images.tobytes())):08x}"
        for images, labels in splits.values()
    )
