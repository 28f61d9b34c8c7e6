"""How the factors of LoRA start."""
