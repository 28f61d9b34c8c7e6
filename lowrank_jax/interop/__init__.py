"""Files of other libraries: safetensors folders, the weights of Hugging Face's LLaMA family,
adapters of its PEFT; and states of `optax.contrib.galore`."""

import functools

from lowrank_jax.interop import llama, optax_galore, peft, safetensors

__all__ = ["llama", "optax_galore", "peft", "safetensors"]
__dir__ = functools.partial(sorted, __all__)
