"""A catalogue of jax's primitives: with a node as an operand each obeys the first law, or raises.

Functions of `jax.lax` and `jax.numpy` are called with a kernel in every place that takes one. What
they return must be what they return of the effective kernel, or an error must name the kernel. And
of every primitive that jax exports, an equation that reads a node must be one that some rule knows.
"""

import inspect
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives

import lowrank_jax as lrx
from lowrank_jax.functions import calls, hosts, structure
from lowrank_jax.functions.errors import ReadError
from lowrank_jax.functions.flow import Flow
from lowrank_jax.functions.reader import Reader
from tests.functions.cases import normal

pytestmark = pytest.mark.slow

KNOWN = {*structure.RULES, *calls.RULES, *hosts.PRODUCTS}
OTHERS = (normal(4, 4, seed=8), normal(4, seed=9), jnp.arange(4), 1, (0, 1), jnp.float32)


def functions():
    for module in (jax.lax, jnp, jax.nn, jnp.linalg):
        for name in sorted(dir(module)):
            function = getattr(module, name)
            if not name.startswith("_") and callable(function) and not inspect.isclass(function):
                yield f"{module.__name__}.{name}", function


def arguments():
    """Places for a kernel W (4, 4), alone and beside others."""
    yield lambda w: (w,)
    for other in OTHERS:
        yield lambda w, other=other: (w, other)
        yield lambda w, other=other: (other, w)
    for other in OTHERS[:3]:
        yield lambda w, other=other: (w, other, OTHERS[0])
        yield lambda w, other=other: (other, other, w)


def start():
    params = {"w": normal(4, 4)}
    adaptation = lrx.adapt(params, {"w": lrx.adapters.lora(rank=1)}, jax.random.key(0))
    moved = jax.tree.map(lambda x: x + 0.3, adaptation.train)
    node = lrx.attach(params, adaptation.replace(train=moved))["w"]
    return node, node.dense()


def programs():
    """Calls that jax traces with a kernel as an array."""
    _, effective = start()
    seen = set()
    for name, function in functions():
        for number, make in enumerate(arguments()):
            run = lambda w, function=function, make=make: function(*make(w))  # noqa: E731
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    jaxpr = jax.make_jaxpr(run)(effective)
            except Exception:  # no call of this function
                continue
            # of programs of the same primitives on the same shapes one is enough
            kind = tuple(
                (eqn.primitive.name, *(str(v.aval) for v in (*eqn.invars, *eqn.outvars)))
                for eqn in jaxpr.eqns
            )
            if kind in seen:
                continue
            seen.add(kind)
            if any(v in eqn.invars for eqn in jaxpr.eqns for v in jaxpr.jaxpr.invars):
                yield f"{name}[{number}]", run


def is_node(x):
    return isinstance(x, lrx.KernelNode)


def formed(x):
    return x.dense() if is_node(x) else x


def test_every_function_obeys_or_raises():
    node, effective = start()
    obeyed, refused = set(), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, run in programs():
            try:
                found = lrx.adapted(run, partial=True)(node)
            except ReadError as error:
                refused[name] = str(error)
                continue
            except Exception:  # what jax traces and cannot compile
                with pytest.raises(Exception):  # noqa: B017, PT011
                    jax.block_until_ready(run(effective))
                continue
            wanted = run(effective)
            found = jax.tree.map(formed, found, is_leaf=is_node)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=name)
            obeyed.add(name)
    assert all("'w'" in message for message in refused.values())
    assert len(obeyed) > 20 and len(refused) > 200
    products = {name.partition("[")[0] for name in obeyed}
    assert products & {"jax.numpy.matmul", "jax.numpy.dot"}


def exported():
    found = {}
    for name in dir(primitives):
        primitive = getattr(primitives, name)
        if isinstance(primitive, jax.extend.core.Primitive):
            found[primitive.name] = primitive
    return found


@pytest.mark.parametrize("name", sorted(set(exported()) - KNOWN))
def test_a_primitive_that_no_rule_knows_raises(name):
    node, _ = start()
    flow = Flow.of(node, "w")
    eqn = types.SimpleNamespace(
        primitive=exported()[name],
        params={},
        invars=[],
        source_info=jax.make_jaxpr(jnp.sin)(1.0).eqns[0].source_info,
    )
    with pytest.raises(ReadError, match="'w': .*is no product|'w': .*rule"):
        Reader().equation(eqn, [flow, normal(4, 4)], {})


def test_the_rules_are_of_primitives_that_exist():
    unknown = KNOWN - set(exported())
    # of releases of jax on both ends of what is supported, and without an export
    assert unknown <= {
        "pjit", "jit", "remat2", "remat3", "checkpoint", "closed_call", "core_call", "mesh_cast",
        "custom_vjp_call_jaxpr", "custom_vjp_call", "custom_jvp_call", "pallas_call", "pcast",
        "pvary", "copy", "copy_p", "name", "reshard", "optimization_barrier", "stop_gradient",
        "sharding_constraint", "split", "ragged_dot_general", "ragged_dot", "device_put",
        "unstack",
    }, unknown  # fmt: skip
