"""Text for pre-training: sources, tokenizers, batches as a pure function of (seed, step), and a
trigram baseline."""

from experiments.data.dataset import DataConfig, Dataset, load

__all__ = ["DataConfig", "Dataset", "load"]
