"""Laws of `lrx.adapted`: on every function, with every kind of node, what the effective kernel gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

import lowrank_jax as lrx
from lowrank_jax.factorized import LowRankKernel
from tests.functions.cases import CASES, normal

FAMILIES = {
    "lora": lrx.adapters.lora(rank=2),
    "dora": lrx.adapters.dora(rank=2),
    "oft": lrx.adapters.oft(block=2),
    "hira": lrx.adapters.hira(rank=2),
}
DENSER = ("oft", "hira")  # what they add to DoRA: input turned, no thin factors
WHOLE = ("split", "some columns", "some rows and columns")


def objective(y):
    return jnp.sum(jnp.sin(y.astype(jnp.float32)))


def start(case, family):
    params = {"w": normal(*case.shape, seed=1)}
    views = lrx.Views(rules={"w": case.view})
    adaptation = lrx.adapt(params, {"w": FAMILIES[family]}, jax.random.key(0), views=views)
    moved = jax.tree.map(
        lambda x: x + normal(*x.shape, seed=2).astype(x.dtype) / 2, adaptation.train
    )
    return params, adaptation.replace(train=moved)


def floating(args):
    return tuple(i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating))


def rows():
    for name in CASES:
        for family in FAMILIES:
            small = name in ("matmul", "transposed", "from heads", "scan", "experts", "convolution")
            if family in ("lora", "dora") or small:
                yield name, family


@pytest.mark.parametrize(("name", "family"), list(rows()))
def test_value_and_gradients_are_those_of_the_effective_kernel(name, family):
    case = CASES[name]
    params, adaptation = start(case, family)
    function = lambda params, *args: objective(case.function(params["w"], *args))  # noqa: E731
    options = {"dense": "w"} if case.cut and family != "lora" else {}
    places = (0, 1, *(2 + i for i in floating(case.args)))

    def of(run, make):
        loss = lambda train, params, *args: run(  # noqa: E731
            make(params, adaptation.replace(train=train)), *args
        )
        value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=places))
        return value_and_grad(adaptation.train, params, *case.args)

    if options:
        with pytest.raises(ValueError, match=r"'w': \w+ at .*cases.py.*dense=path"):
            lrx.adapted(function)(lrx.attach(params, adaptation), *case.args)
    got = of(lrx.adapted(function, **options), lrx.attach)
    want = of(function, lrx.effective)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a, b, rtol=0, atol=case.tolerance * (scale + 1))
    assert any(float(jnp.max(jnp.abs(x))) > 1e-3 for x in jax.tree.leaves(want[1][0]))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("side", ["rows", "cols"])
@pytest.mark.parametrize("projector", ["random", "columns"])
def test_a_tap_gives_the_projection_of_the_gradient_over_all_uses(name, side, projector):
    if projector == "columns" and name not in ("matmul", "tied", "split", "convolution", "experts"):
        pytest.skip("indices are seen on a product of each kind")
    case = CASES[name]
    params = {"w": normal(*case.shape, seed=1)}
    views = lrx.Views(rules={"w": case.view})
    basis = getattr(lrx.projectors, projector)(rank=2)
    state = lrx.scale_by_projection(basis, views=views, side=side).init(params)
    loss = lambda params, *args: objective(case.function(params["w"], *args))  # noqa: E731
    lrx.check_taps(loss, lrx.taps(state), params, *case.args, tolerance=case.tolerance)


def test_second_derivatives():
    case = CASES["scan"]
    params, adaptation = start(case, "lora")
    function = lambda params, x: objective(case.function(params["w"], x))  # noqa: E731
    direction = jax.tree.map(lambda x: normal(*x.shape, seed=3), adaptation.train)

    def product(run, make):
        loss = lambda train: run(make(params, adaptation.replace(train=train)), *case.args)  # noqa: E731
        return jax.jvp(jax.grad(loss), (adaptation.train,), (direction,))

    got, want = product(lrx.adapted(function), lrx.attach), product(function, lrx.effective)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.view.batch == ()])
def test_factors_are_multiplied_as_factors(name):
    case = CASES[name]
    if case.cut or case.view.rows != (0,) or len(case.shape) != 2:
        pytest.skip("a kernel in factors is (n, m)")
    n, m = case.shape
    node = LowRankKernel(normal(n, 2, seed=4), normal(2, m, seed=5))
    run = lambda node: objective(lrx.adapted(case.function)(node, *case.args))  # noqa: E731
    got, grads = jax.value_and_grad(run)(node)
    formed = lambda node: objective(case.function(node.dense(), *case.args))  # noqa: E731
    want, expected = jax.value_and_grad(formed)(node)
    np.testing.assert_allclose(got, want, rtol=case.tolerance, atol=case.tolerance)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=0, atol=case.tolerance * (1 + float(jnp.abs(b).max()))
        )


# ------------------------------------------------------------------------ what is not made


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                yield from equations(getattr(inner, "jaxpr", inner))


def _is_program(x):
    return isinstance(x, core.ClosedJaxpr | core.Jaxpr)


COMPUTED = ("dot_general", "add", "add_any", "mul", "sub", "scatter-add", "conv_general_dilated")


@pytest.mark.parametrize("name", [name for name in CASES if name != "a registered call"])
def test_no_array_of_the_kernels_size_is_computed(name):
    """Neither by adapters nor by taps, forward or backward."""
    case = CASES[name]
    # large enough that nothing else has the matrix's size
    params, adaptation = start(case, "lora")
    n, m = case.view.matrix_shape(case.shape)[-2:]
    function = lambda params, *args: objective(case.function(params["w"], *args))  # noqa: E731
    train = lambda train: lrx.adapted(function)(  # noqa: E731
        lrx.attach(params, adaptation.replace(train=train)), *case.args
    )
    views = lrx.Views(rules={"w": case.view})
    state = lrx.scale_by_projection(lrx.projectors.random(rank=1), views=views).init(params)
    tapped = lrx.projected_value_and_grad(function, lrx.taps(state))
    sizes = {n * m, int(np.prod(case.shape))}
    plain = {
        eqn.outvars[0].aval.shape
        for eqn in equations(jax.make_jaxpr(function)(params, *case.args).jaxpr)
    }
    for program in (
        jax.make_jaxpr(jax.grad(train))(adaptation.train),
        jax.make_jaxpr(lambda *args: tapped(params, *args))(*case.args),
    ):
        made = [
            (eqn.primitive.name, eqn.outvars[0].aval.shape)
            for eqn in equations(program.jaxpr)
            if eqn.primitive.name in COMPUTED
            and eqn.outvars[0].aval.size in sizes
            and sorted(eqn.outvars[0].aval.shape)[-2:] == sorted((n, m))
            and eqn.outvars[0].aval.shape not in plain
        ]
        assert not made


# ----------------------------------------------------------------------- jit, bits, caches


def test_without_nodes_it_is_the_function_itself():
    case = CASES["remat in a scan"]
    w = normal(*case.shape)
    plain, read = (
        jax.make_jaxpr(f)(w, *case.args) for f in (case.function, lrx.adapted(case.function))
    )
    assert str(plain) == str(read)


def test_adapted_twice_is_adapted_once_and_keeps_the_options_of_that():
    case = CASES["matmul"]
    params, adaptation = start(case, "lora")
    node = lrx.attach(params, adaptation)
    once = lrx.adapted(lambda params, x: case.function(params["w"], x))
    assert lrx.adapted(once) is once
    with pytest.raises(ValueError, match="lrx.adapted already.*aux=True"):
        lrx.adapted(once, aux=True)

    # what wraps it, and copies its attributes, is another function
    @functools.wraps(once)
    def doubled(params, x):
        return 2 * once(params, x) + jnp.sum(x @ params["w"])

    want = 2 * once(node, *case.args) + jnp.sum(once(node, *case.args))
    np.testing.assert_allclose(lrx.adapted(doubled)(node, *case.args), want, rtol=1e-5)


def test_a_program_is_traced_again_where_a_mesh_or_the_precision_is_another():
    case = CASES["matmul"]
    params, adaptation = start(case, "lora")
    node, traced = lrx.attach(params, adaptation), []

    def function(params, x):
        traced.append(1)
        return x @ params["w"]

    run = lrx.adapted(function)
    run(node, *case.args), run(node, *case.args)
    assert len(traced) == 1
    with jax.default_matmul_precision("float32"):
        run(node, *case.args)
    assert len(traced) == 2
    mesh = lrx.meshes.make_mesh(devices=jax.devices()[:1])
    with lrx.meshes.use(mesh):
        run(node, *case.args)
    assert len(traced) == 3


# a scan that is run step by step stacks what it hands back
STEPPED = "scan that hands its layers back"


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if not c.cut and n != STEPPED])
def test_zero_factors_give_the_bits_of_the_base(name):
    case = CASES[name]
    params = {"w": normal(*case.shape, seed=1)}
    views = lrx.Views(rules={"w": case.view})
    adaptation = lrx.adapt(params, {"w": FAMILIES["lora"]}, jax.random.key(0), views=views)
    run = lambda params, *args: lrx.adapted(case.function)(params["w"], *args)  # noqa: E731
    with jax.disable_jit():  # operation by operation, so that no compiler sees both
        got = run(lrx.attach(params, adaptation), *case.args)
        np.testing.assert_array_equal(got, run(params, *case.args))


def test_a_function_is_traced_once_for_all_numbers():
    traced = []

    @jax.jit
    def inner(w, x):
        traced.append(1)
        return x @ w

    case = CASES["matmul"]
    run = lrx.adapted(lambda params, x: inner(params["w"], x))
    for seed in range(3):
        params, adaptation = start(case, "lora")
        moved = jax.tree.map(lambda x, seed=seed: x + seed, adaptation.train)
        run(lrx.attach(params, adaptation.replace(train=moved)), *case.args)
    assert len(traced) == 1


def test_what_is_returned_as_it_came_is_a_node_again():
    case = CASES["matmul"]
    params, adaptation = start(case, "lora")
    node = lrx.attach(params, adaptation)
    again, _ = lrx.adapted(lambda params, x: (params, x @ params["w"]))(node, *case.args)
    assert jax.tree.structure(again) == jax.tree.structure(node)
    jax.tree.map(np.testing.assert_array_equal, again, node)
    with pytest.raises(ValueError, match="the function returns the kernel, transposed"):
        lrx.adapted(lambda params, x: (params["w"].T, x @ params["w"]))(node, *case.args)


def test_vmap_over_adapters():
    case = CASES["matmul"]
    params, adaptation = start(case, "lora")
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x, x - 1]), adaptation.train)
    run = lambda train: lrx.adapted(lambda p, x: case.function(p["w"], x))(  # noqa: E731
        lrx.attach(params, adaptation.replace(train=train)), *case.args
    )
    got = jax.vmap(run)(many)
    one = functools.partial(jax.tree.map, lambda x: x[2])
    np.testing.assert_allclose(got[2], run(one(many)), rtol=1e-5, atol=1e-5)


def test_static_arguments_stay_static():
    def function(params, x, *, twice, name):
        assert isinstance(twice, bool) and name == "a"
        return x @ params["w"] * (2 if twice else 1)

    case = CASES["matmul"]
    params, adaptation = start(case, "lora")
    node = lrx.attach(params, adaptation)
    run = lrx.adapted(function)
    one, two = (run(node, *case.args, twice=twice, name="a") for twice in (False, True))
    np.testing.assert_array_equal(two, 2 * one)


def test_a_stopped_kernel_stops_its_adapters():
    case = CASES["matmul"]
    params, adaptation = start(case, "lora")
    loss = lambda params, x: objective(x @ jax.lax.stop_gradient(params["w"]))  # noqa: E731
    grads = jax.grad(
        lambda train: lrx.adapted(loss)(
            lrx.attach(params, adaptation.replace(train=train)), *case.args
        )
    )(adaptation.train)
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(grads))
