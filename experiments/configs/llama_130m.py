"""LLaMA-130M on C4 by GaLore's protocol: 20 000 updates of 512 padded documents of at most 256
tokens (2.6 B tokens).

    python -m experiments.pretrain --config=experiments/configs/llama_130m.py --workdir=runs/llama_130m

Needs what `llama_60m.py` needs. Expect a perplexity near the published 25.36 (AdamW: 25.08;
arXiv:2403.03507, table 2). Not yet run by us.
"""

from experiments.configs import llama_60m


def get_config():
    """The configuration, for flags to override."""
    config = llama_60m.get_config()
    config.name = "llama_130m"
    config.model.preset = "130M"
    config.optimizer.rank = 256
    config.schedule.steps = 20_000
    config.schedule.warmup_steps = 2_000
    config.schedule.accumulation = 2
    return config
