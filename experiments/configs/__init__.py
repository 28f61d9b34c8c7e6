"""Configurations of `experiments.pretrain`: each begins with its command and what to expect."""
