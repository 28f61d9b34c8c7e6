"""The smallest run that exercises everything, for trying out flags.

    python -m experiments.pretrain --config=experiments/configs/tiny.py --config.optimizer.rank=16 --workdir=runs/tiny

Expect 100 updates in well under a minute and no useful text.
"""

from experiments.settings import configuration


def get_config():
    """The configuration, for flags to override."""
    config = configuration.template()
    config.name = "tiny"
    config.model.preset = "nano"
    config.model.width = 64
    config.model.hidden = 176
    config.model.layers = 2
    config.data.sequence_length = 64
    config.data.batch_size = 8
    config.optimizer.name = "galore"
    config.optimizer.rank = 16
    config.optimizer.learning_rate = 1e-2
    config.optimizer.refresh_every = 50
    config.schedule.steps = 100
    config.checkpoint.every = 20
    config.run.evaluate_every = 50
    config.run.evaluation_tokens = 16 * 1024
    config.run.log_every = 10
    return config
