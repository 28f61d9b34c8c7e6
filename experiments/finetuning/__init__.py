"""Fine-tuning: the task, the model that is tuned, the bases it starts from, and what it exports."""
