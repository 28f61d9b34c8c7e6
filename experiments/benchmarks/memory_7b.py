"""What a whole training step of the 7B preset takes on one RTX 4090, from the CUDA compiler, without a device.

    python -m experiments.benchmarks.memory_7b --output experiments/results/memory_7b.json

needs an environment with `jax-cuda13-plugin` and `jax-cuda13-pjrt` of jax's version (no CUDA libraries). Sequence 2048,
batch 1: the layer-wise step of GaLore with projected backprop, 8-bit moments (block-wise, dynamic code), an int8 basis,
weights in bfloat16 or in int8 blocks with stochastic rounding, each layer rematerialised. The basis is a random
orthonormal one and the step compiled is one between two refreshes. It proves lowering and memory, not speed.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import lowrank_jax as lr
from experiments.benchmarks import workload
from experiments.models import llama
from lowrank_jax.projection.projectors.random import Random

# What XLA's GPU compiler asks of a device; public figures of the RTX 4090.
RTX_4090 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 1536 core_count: 128 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 102400 shared_memory_per_block_optin: 101376
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 l2_cache_size: 75497472 clock_rate_ghz: 2.52
  memory_bandwidth: 1008000000000 device_memory_size: 25393692672 cuda_compute_capability { major: 8 minor: 9 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA GeForce RTX 4090"
"""


def stack(config: llama.LlamaConfig) -> lr.Stack:
    """`experiments.models.llama.Llama` in three parts."""
    block, norm = llama.Block(config), llama.RMSNorm(config)
    dtype = llama.DTYPES[config.dtype]

    def after(rest, x, tokens):
        x = norm.apply({"params": rest["norm"]}, x)
        logits = jnp.einsum("bsd,dv->bsv", x, rest["lm_head"]["kernel"], preferred_element_type=jnp.float32)
        return llama.loss_and_metrics(logits, tokens, jnp.ones(tokens.shape))[0]

    return lr.Stack(
        before=lambda rest, tokens: rest["embed"]["embedding"][tokens].astype(dtype),
        layer=lr.linen.tapped(lambda layer, x: block.apply({"params": layer}, x)[0]),
        after=after,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing(Random):
    """A stored orthonormal basis between two refreshes."""

    moves: ClassVar[bool] = False


def step_of(config: llama.LlamaConfig, rank: int, *, int8: bool) -> tuple[Any, Any, Any]:
    """`(step, abstract parameters, abstract state)`."""
    model = llama.Llama(config)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    projector = Standing(rank=rank, kind="orthonormal", dtype=jnp.int8)
    inner = lr.inner.stored8(inner=lr.inner.adam(eps=1e-6, convention="hf"))
    tx = lr.galore(1e-2, projector=projector, views=workload.VIEWS, inner=inner)
    if int8:
        paths = {view.path for view in lr.explain(tx, params).projected}
        small = lambda x: jax.eval_shape(lambda: lr.linalg.quantize_blocks(jnp.zeros(x.shape), "linear"))  # noqa: E731
        params = jax.tree_util.tree_map_with_path(
            lambda keys, x: small(x) if "/".join(key.key for key in keys) in paths else x, params
        )
    form = lr.fused(tx, rounding="stochastic")
    return lr.layerwise_step(stack(config), form), params, jax.eval_shape(form.init, params)


def measure(preset: str, rank: int, length: int, *, int8: bool) -> dict[str, Any]:
    """Bytes of the compiled step."""
    config = llama.preset(preset, sequence_length=length, dtype="bfloat16", param_dtype="bfloat16")
    step, params, state = step_of(config, rank, int8=int8)
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="x", target_config=RTX_4090, topology="1x1x1"
    )
    device = SingleDeviceSharding(topology.devices[0])
    place = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree
    )
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=device)
    begin = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=(0, 1))
    program = lr.memory.measure(jitted.lower(place(params), place(state), tokens).compile())
    nbytes = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    return {
        "weights": "int8" if int8 else "bfloat16",
        "rank": rank,
        "parameter_bytes": nbytes(params),
        "state_bytes": nbytes(state),
        "argument_bytes": program.arguments,
        "temporary_bytes": program.temporaries,
        "peak_bytes": program.peak,
        "compile_seconds": time.perf_counter() - begin,
    }


# Weights, rank, and the peak in GiB that a rough prototype took or that was aimed at.
ROWS = ((False, 1024, 21.15), (False, 256, 16.16), (True, 1024, None), (True, 256, 12.0))


def main(arguments: list[str] | None = None) -> None:
    """Compiles the rows, prints them and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=Path("experiments/results/memory_7b.json"))
    options = parser.parse_args(arguments)
    rows = []
    for int8, rank, bound in ROWS:
        row = measure("7B", rank, options.length, int8=int8)
        rows.append(row | {"bound_gib": bound, "met": None if bound is None else row["peak_bytes"] < bound * 2**30})
        sizes = {name: round(value / 2**30, 2) for name, value in row.items() if name.endswith("bytes")}
        print(row["weights"], rank, sizes)
    result = {"command": "python -m experiments.benchmarks.memory_7b", "device": "RTX 4090", "length": options.length,
              "rows": rows}  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
