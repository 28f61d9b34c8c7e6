"""Files of other libraries: safetensors folders, the weights of Hugging Face's LLaMA family,
adapters of its PEFT."""

from lowrank_jax.interop import llama, peft, safetensors

__all__ = ["llama", "peft", "safetensors"]
