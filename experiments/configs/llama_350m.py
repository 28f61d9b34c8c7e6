"""LLaMA-350M on C4 by GaLore's protocol: 60 000 updates of 512 padded documents of at most 256
tokens (7.8 B tokens).

    python -m experiments.pretrain --config=experiments/configs/llama_350m.py --workdir=runs/llama_350m

Needs what `llama_60m.py` needs. Expect a perplexity near the published 18.95 (AdamW: 18.80;
arXiv:2403.03507, table 2). Not yet run by us.
"""

from experiments.configs import llama_60m


def get_config():
    """The configuration, for flags to override."""
    config = llama_60m.get_config()
    config.name = "llama_350m"
    config.model.preset = "350M"
    config.optimizer.rank = 256
    config.schedule.steps = 60_000
    config.schedule.warmup_steps = 6_000
    config.schedule.accumulation = 4
    config.model.remat = True
    return config
