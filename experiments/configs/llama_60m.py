"""LLaMA-60M on C4 by GaLore's protocol: 10 000 updates of 512 padded documents of at most 256
tokens (1.3 B tokens).

    python -m experiments.pretrain --config=experiments/configs/llama_60m.py --workdir=runs/llama_60m

Needs C4 prepared as array_record (`python -m experiments.data.prepare c4/en`) and the SentencePiece
model of t5-base at `config.data.tokenizer`. Expect a perplexity near the published 34.88 (AdamW:
34.06; GaLore, arXiv:2403.03507, table 2), which trained in bf16 throughout and printed
`script_perplexity`; here parameters are float32. Not yet run by us.
"""

from experiments.settings import configuration


def get_config():
    """The configuration, for flags to override."""
    config = configuration.template()
    config.name = "llama_60m"
    config.model.preset = "60M"
    config.model.dtype = "bfloat16"
    config.data.name = "c4/en"
    config.data.tokenizer = "~/t5-base/spiece.model"
    config.data.packing = "pad"
    config.data.sequence_length = 256
    config.data.batch_size = 512
    config.optimizer.name = "galore"
    config.optimizer.rank = 128
    config.optimizer.learning_rate = 1e-2
    config.optimizer.refresh_every = 200
    config.schedule.steps = 10_000
    config.schedule.warmup_steps = 1_000
    config.checkpoint.every = 500
    config.run.evaluate_every = 1_000
    config.run.evaluation_tokens = 10_000_000
    config.run.sample_prompt = "The "
    return config
