"""Files of other libraries: safetensors folders, the weights of Hugging Face's LLaMA family,
adapters of its PEFT."""

import functools

from lowrank_jax.interop import llama, peft, safetensors

__all__ = ["llama", "peft", "safetensors"]
__dir__ = functools.partial(sorted, __all__)
