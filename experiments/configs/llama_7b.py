"""LLaMA-7B on C4 by GaLore's protocol: 150 000 updates of 512 padded documents of at most 256
tokens (19.7 B tokens).

    python -m experiments.pretrain --config=experiments/configs/llama_7b.py --workdir=runs/llama_7b

Needs what `llama_60m.py` needs. Expect a perplexity near the published 14.65 (AdamW: 14.61), both
with 8-bit states (APOLLO, arXiv:2412.05270).
Not yet run by us.
"""

from experiments.configs import llama_60m


def get_config():
    """The configuration, for flags to override."""
    config = llama_60m.get_config()
    config.name = "llama_7b"
    config.model.preset = "7B"
    config.optimizer.rank = 1024
    config.optimizer.learning_rate = 5e-3
    config.schedule.steps = 150_000
    config.schedule.warmup_steps = 15_000
    config.schedule.accumulation = 16
    config.model.remat = True
    return config
