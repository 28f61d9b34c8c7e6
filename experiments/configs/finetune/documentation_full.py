"""`documentation.py` with the whole model by a projection optimizer: DCT-AdamW with projected
backprop.

    python -m experiments.finetune --config=experiments/configs/finetune/documentation_full.py --workdir=runs/full

Expect a validation loss of 1.57 nats a byte after as many tokens as `documentation.py`, and 1.58 on
the base's domain.
"""

from experiments.configs.finetune import documentation


def get_config():
    """The configuration, for flags to override."""
    config = documentation.get_config()
    config.name = "documentation_full"
    config.adapter.method = ""
    config.optimizer.name = "dct_adamw"
    config.optimizer.rank = 32
    config.optimizer.refresh_every = 10
    config.optimizer.backprop = "projected"
    config.optimizer.learning_rate = 1e-3
    return config
