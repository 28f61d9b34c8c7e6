"""Compiling for TPUs that are not there, with the compiler that libtpu brings.

It proves that a program lowers, how large it is and how much memory it takes; not its numbers and
not its speed.
"""

import importlib.util

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding


@pytest.fixture(scope="session")
def topology():
    """Devices of a topology by name, such as "v5e:2x2"."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu, which brings the TPU compiler: run `make test-tpu`")
    return lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name)


@pytest.fixture(scope="session")
def compile_for(topology):
    """`compile_for("v5e:2x2", function, *abstract)`: for one device, where the arguments' shardings
    do not say else.

    Keyword arguments go to `jax.jit`.
    """

    def compile_for(name, function, *abstract, **options):
        single = SingleDeviceSharding(topology(name).devices[0])

        def place(leaf):
            sharding = getattr(leaf, "sharding", None) or single
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.jit(function, **options).lower(*jax.tree.map(place, abstract)).compile()

    return compile_for
