"""rsLoRA of a LLaMA-family model from Hugging Face on instructions in a JSONL file, loss on the
responses alone.

    python -m experiments.finetune --config=experiments/configs/finetune/instructions.py \\
        --config.base.source=~/llama-3b --config.data.name=instructions.jsonl
        --workdir=runs/instructions

Each line of the file is {"prompt": "...", "response": "..."}, has other usual keys of instructions,
or is a talk, {"messages": [{"role": "user", "content": "..."}, ...]};
`--config.data.template=chatml` names what delimits turns. The base's folder holds a tokenizer.json
or tokenizer.model, or name one by `--config.data.tokenizer`. Expect what the model card of your
base lets you expect. Not yet run by us.
"""

from experiments.settings import finetuning_configuration


def get_config():
    """The configuration, for flags to override."""
    config = finetuning_configuration.template()
    config.name = "instructions"
    config.base.source = "~/llama-3b"
    config.base.dtype = "bfloat16"
    config.base.remat = True
    config.adapter.method = "lora(rank=64, alpha=64, rank_stabilized=True, dropout=0.05)"
    config.data.task = "instruction"
    config.data.name = "instructions.jsonl"
    config.data.bos = True
    config.data.sequence_length = 1024
    config.data.batch_size = 16
    config.optimizer.learning_rate = 1e-4
    config.schedule.steps = 2000
    config.schedule.accumulation = 4
    config.checkpoint.every = 500
    config.run.evaluate_every = 250
    config.run.evaluation_tokens = 1_000_000
    return config
