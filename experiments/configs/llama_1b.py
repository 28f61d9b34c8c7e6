"""LLaMA-1B on C4 by GaLore's protocol: 100 000 updates of 512 padded documents of at most 256
tokens (13.1 B tokens).

    python -m experiments.pretrain --config=experiments/configs/llama_1b.py --workdir=runs/llama_1b

Needs what `llama_60m.py` needs. Expect a perplexity near the published 15.64 (AdamW: 15.56;
arXiv:2403.03507, table 2). Not yet run by us.
"""

from experiments.configs import llama_60m


def get_config():
    """The configuration, for flags to override."""
    config = llama_60m.get_config()
    config.name = "llama_1b"
    config.model.preset = "1B"
    config.optimizer.rank = 512
    config.schedule.steps = 100_000
    config.schedule.warmup_steps = 10_000
    config.schedule.accumulation = 8
    config.model.remat = True
    return config
