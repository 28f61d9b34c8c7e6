"""Configurations of `experiments.finetune`: each begins with its command and what to expect."""
