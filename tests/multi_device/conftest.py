"""One small tree in which every leaf is laid out differently, and the meshes it lies on."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

SHAPES = {
    "fsdp": {"kernel": (16, 32), "bias": (32,)},
    "tp": {"kernel": (32, 16)},
    "both": {"kernel": (16, 16)},
    "layers": {"kernel": (4, 16, 32)},
    "heads": {"kernel": (16, 4, 8)},
}
SPECS = {
    "fsdp": {"kernel": P("data", None), "bias": P("model")},
    "tp": {"kernel": P(None, "model")},
    "both": {"kernel": P("data", "model")},
    "layers": {"kernel": P("data", None, "model")},
    "heads": {"kernel": P(None, "model", None)},
}


@pytest.fixture(scope="session", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)


def mesh_of(kind: AxisType):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def tree(seed: int):
    random = np.random.default_rng(seed)
    draw = lambda shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def put(arrays, mesh, specs=SPECS):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), arrays, specs)
