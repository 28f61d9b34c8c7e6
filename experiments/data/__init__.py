"""Text for pre-training: sources, tokenizers, batches as functions of (seed, step)."""

from experiments.data.dataset import DataConfig, Dataset, load

__all__ = ["DataConfig", "Dataset", "load"]
