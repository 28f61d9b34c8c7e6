"""What `make train` runs: 0.87 M parameters on the source of Python's standard library, with
DCT-AdamW and projected backprop: a new subspace every 10 updates, low-rank gradients between two of
them.

    python -m experiments.pretrain --config=experiments/configs/default.py --workdir=runs/default

Expect 1.2 M tokens in one to four minutes on 2 cores, and at the end the validation loss beside
that of a trigram model of the training text, which is 1.80 nats a byte on the first 262 144
validation tokens of Python 3.11.7's library.
"""

from experiments.settings import configuration


def get_config():
    """The configuration, for flags to override."""
    config = configuration.template()
    config.name = "default"
    config.model.preset = "nano"
    config.data.sequence_length = 128
    config.data.batch_size = 8
    config.optimizer.name = "dct_adamw"
    config.optimizer.rank = 32
    config.optimizer.refresh_every = 10
    config.optimizer.backprop = "projected"
    config.optimizer.learning_rate = 3e-3
    config.schedule.steps = 1200
    config.schedule.warmup_steps = 100
    config.checkpoint.every = 200
    config.run.evaluate_every = 300
    config.run.evaluation_tokens = 256 * 1024
    config.run.evaluation_batch_size = 64
    config.run.trigram = True
    return config
