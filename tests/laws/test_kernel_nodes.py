"""Laws of kernel nodes: whatever stands in a kernel's place is multiplied as its matrix would be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from lowrank_jax.factorized import LowRankKernel, SparseLowRankKernel
from lowrank_jax.kernel_node import KernelNode
from lowrank_jax.quantized import QuantizedKernel

N, M, R, LAYERS = 12, 20, 3, 4


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagonal(KernelNode):
    """A kernel as a user writes one: a diagonal, and zeros beside it."""

    entries: jax.Array
    columns: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self):
        return (*self.entries.shape, self.columns)

    @property
    def dtype(self):
        return self.entries.dtype

    def dense(self, dtype=None):
        return self.entries[..., None] * jnp.eye(self.shape[-2], self.columns, dtype=self.dtype)


@functools.cache
def node(kind, lead=(), dtype=jnp.float32):
    a, b = normal((*lead, N, R), 1, dtype), normal((*lead, R, M), 2, dtype)
    if kind == "low rank":
        return LowRankKernel(a, b)
    if kind == "diagonal":
        return Diagonal(normal((*lead, N), 3, dtype), M)
    rng = np.random.default_rng(4)
    places = [np.sort(rng.permutation(N * M)[:17]) for _ in range(int(np.prod(lead)))]
    indices = jnp.asarray(np.reshape(places, (*lead, 17)), jnp.int32)
    return SparseLowRankKernel(a, b, indices, normal((*lead, 17), 5, dtype))


KINDS = ("low rank", "low rank and sparse", "diagonal")


def trained(kernel):
    """`(arrays that have a gradient, arrays -> kernel)`."""
    leaves, treedef = jax.tree.flatten(kernel)
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def build(arrays):
        arrays = iter(arrays)
        own = [next(arrays) if f else x for f, x in zip(floating, leaves, strict=True)]
        return jax.tree.unflatten(treedef, own)

    return [x for x, f in zip(leaves, floating, strict=True) if f], build


def products(kernel, stack, dtype=jnp.float32):
    """All products of a kernel (n, m) and of a stack of them, summed to something not linear."""
    x, back = normal((2, 5, N), 6, dtype), normal((2, 5, M), 7, dtype)
    several = normal((LAYERS, 6, N), 8, dtype)
    rows = (((0,), (0,)), ((), ()))
    return {
        "matmul": lrx.matmul(x, kernel),
        "einsum": lrx.einsum("bsd,df->fbs", x, kernel),
        "ellipsis": lrx.einsum("...d,df->...f", x, kernel),
        "first axis": lrx.dot_general(x.transpose(2, 0, 1), kernel, rows),
        "transposed": lrx.einsum("bsf,df->bsd", back, kernel),
        "experts": lrx.einsum("end,edf->enf", several, stack),
        "experts in the middle": lrx.einsum("end,edf->nef", several, stack),
        "wide": lrx.dot_general(x, kernel, (((2,), (0,)), ((), ())), preferred_element_type=float),
    }


def loss(outputs):
    return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in outputs.values())


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_matrix(kind):
    (arrays, build), (stacked, build_stack) = trained(node(kind)), trained(node(kind, (LAYERS,)))

    def of(form):
        def run(arrays, stacked):
            outputs = products(form(build(arrays)), form(build_stack(stacked)))
            return loss(outputs), outputs

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))

    (_, found), grads = of(lambda kernel: kernel)(arrays, stacked)
    (_, expected), dense = of(lambda kernel: kernel.dense())(arrays, stacked)
    for name, y in expected.items():
        assert (found[name].shape, found[name].dtype) == (y.shape, y.dtype), name
        np.testing.assert_allclose(found[name], y, atol=2e-5, err_msg=name)
    for own, other in zip(jax.tree.leaves(grads), jax.tree.leaves(dense), strict=True):
        assert float(jnp.linalg.norm(other)) > 0
        np.testing.assert_allclose(own, other, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_and_is_summed_in_float32(kind):
    kernels = [node(kind, lead, jnp.bfloat16) for lead in ((), (LAYERS,))]
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, kernels)
    found = jax.jit(lambda a, b: products(a, b, jnp.bfloat16))(*kernels)
    expected = products(*(kernel.dense() for kernel in wide))
    for name, y in expected.items():
        assert found[name].dtype == (jnp.float32 if name == "wide" else jnp.bfloat16)
        np.testing.assert_allclose(
            found[name].astype(jnp.float32), y, atol=0.02 * float(jnp.abs(y).max()), err_msg=name
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_is_its_layers_under_scan_and_vmap(kind):
    stack, x = node(kind, (LAYERS,)), normal((5, N), 9)
    layer = lambda kernel: jnp.tanh(lrx.matmul(x, kernel))  # noqa: E731
    one = [layer(jax.tree.map(lambda leaf, i=i: leaf[i], stack)) for i in range(LAYERS)]
    np.testing.assert_allclose(jax.jit(jax.vmap(layer))(stack), jnp.stack(one), atol=1e-5)
    _, scanned = jax.jit(lambda s: jax.lax.scan(lambda c, kernel: (c, layer(kernel)), 0, s))(stack)
    np.testing.assert_allclose(scanned, jnp.stack(one), atol=1e-5)


def largest(function, *args):
    """The largest array that a program makes, its inner programs' among them."""

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars)
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(inner, "jaxpr", inner)
                yield from sizes(inner) if hasattr(inner, "eqns") else ()

    return max(sizes(jax.make_jaxpr(function)(*args).jaxpr))


def test_a_low_rank_kernel_never_is_a_matrix_and_costs_what_its_factors_cost():
    n, m, r, rows = 64, 96, 4, 16
    kernel, x = LowRankKernel(normal((n, r)), normal((r, m))), normal((rows, n))

    def value(kernel, x):
        y = lrx.matmul(x, kernel)
        return jnp.sum(lrx.einsum("nf,df->nd", y, kernel) ** 2)

    grads = jax.value_and_grad(value, argnums=(0, 1))
    assert largest(grads, kernel, x) <= max(rows * m, n * r, r * m) < n * m
    flops = lambda k: jax.jit(grads).lower(k, x).compile().cost_analysis()["flops"]  # noqa: E731
    # two products of the kernel, forward, and two for each of them backward
    thin, dense = 2 * rows * r * (n + m) * 6, 2 * rows * n * m * 6
    assert thin <= flops(kernel) < 1.2 * thin < 0.3 * dense
    assert flops(kernel.dense()) >= 0.9 * dense


def adapted(family, kernel):
    """The attached kernel of an adapter somewhere else than at its start, with this base."""
    params = {"kernel": kernel.dense()}
    adaptation = lrx.adapt(params, family, jax.random.key(0))
    leaves, treedef = jax.tree.flatten(adaptation.train)
    leaves = [leaf + 0.3 * normal(leaf.shape, i + 20) for i, leaf in enumerate(leaves)]
    adaptation = adaptation.replace(train=jax.tree.unflatten(treedef, leaves))
    return lrx.attach(params, adaptation)["kernel"], adaptation


FAMILIES = {
    "lora": lrx.adapters.lora(rank=2),
    "dora": lrx.adapters.dora(rank=2),
    "vera": lrx.adapters.vera(rank=2),
    "oft": lrx.adapters.oft(block=4),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_act_on_any_node(family):
    x = normal((2, 5, N), 10)
    for kind in KINDS:
        kernel = node(kind)
        dense, adaptation = adapted(FAMILIES[family], kernel)
        on_node = dense.with_base(kernel)
        expected = lrx.matmul(x, lrx.effective({"kernel": kernel.dense()}, adaptation)["kernel"])
        np.testing.assert_allclose(jax.jit(lrx.matmul)(x, on_node), expected, atol=1e-4)
        np.testing.assert_allclose(lrx.matmul(x, on_node.dense()), expected, atol=1e-4)


def test_lora_reads_no_low_rank_kernel():
    n, m = 64, 96
    kernel, x = LowRankKernel(normal((n, 3)), normal((3, m))), normal((5, n))
    attached = adapted(lrx.adapters.lora(rank=2), kernel)[0].with_base(kernel)
    value = lambda attached, x: jnp.sum(jnp.sin(lrx.matmul(x, attached)))  # noqa: E731
    assert largest(jax.grad(value, argnums=(0, 1), allow_int=True), attached, x) < n * m


def test_a_stack_of_adapted_nodes():
    views = lrx.Views(rules={"kernel": lrx.MatrixView(batch=(0,), rows=(1,), cols=(2,))})
    for kind in KINDS:
        kernel, x = node(kind, (LAYERS,)), normal((LAYERS, 5, N), 11)
        params = {"kernel": kernel.dense()}
        adaptation = lrx.adapt(params, FAMILIES["vera"], jax.random.key(1), views=views)
        attached = lrx.attach(params, adaptation)["kernel"].with_base(kernel)
        expected = jnp.einsum("end,edf->enf", x, lrx.effective(params, adaptation)["kernel"])
        np.testing.assert_allclose(
            lrx.einsum("end,edf->enf", x, attached), expected, atol=1e-4, err_msg=kind
        )
        # what a scan slices has the batch axis in front, and what it closes over has not
        own, shared = attached.parts()
        assert all(leaf.shape[0] == LAYERS for leaf in jax.tree.leaves(own))
        assert jax.tree.leaves(shared)

        def layer(xs, attached=attached, shared=shared):
            return lrx.matmul(xs[1], attached.with_parts(xs[0], shared))

        scanned = jax.lax.map(layer, (own, x))
        np.testing.assert_allclose(scanned, expected, atol=1e-4, err_msg=kind)


def test_quantised_kernels_are_nodes_where_they_are_multiplied():
    codes, x = lrx.linalg.quantize_blocks(normal((N, M)), "linear"), normal((2, 5, N), 12)
    own = QuantizedKernel(codes)
    assert (own.shape, own.dtype) == (codes.shape, codes.dtype)
    for function in (lrx.matmul, functools.partial(lrx.einsum, "bsd,df->fbs")):
        np.testing.assert_array_equal(function(x, own), function(x, codes))
        np.testing.assert_allclose(
            function(x, codes), function(x, codes.dequantize()), rtol=1e-6, atol=1e-6
        )
    attached = adapted(FAMILIES["lora"], own)[0].with_base(codes)
    np.testing.assert_allclose(
        lrx.matmul(x, attached), lrx.matmul(x, attached.dense()), rtol=1e-4, atol=1e-5
    )


def test_optimizers_see_the_factors_as_ordinary_leaves():
    params = {"up": {"kernel": LowRankKernel(normal((8, 4), 1), normal((4, 16), 2))}}
    views = lrx.Views(rules={".*/kernel/(a|b)": lrx.MatrixView()})
    report = lrx.resolution.resolve(params, rank=2, views=views)
    assert [leaf.path for leaf in report.leaves] == ["up/kernel/a", "up/kernel/b"]
    x, y = normal((6, 8), 3), normal((6, 16), 4)

    def value(params):
        return jnp.mean((lrx.matmul(x, params["up"]["kernel"]) - y) ** 2)

    for tx in (optax.adam(0.02), lrx.galore(0.02, rank=2, views=views)):

        @jax.jit
        def step(params, state, tx=tx):
            updates, state = tx.update(jax.grad(value)(params), state, params)
            return optax.apply_updates(params, updates), state

        own, state = params, tx.init(params)
        for _ in range(20):
            own, state = step(own, state)
        assert isinstance(own["up"]["kernel"], LowRankKernel)
        assert float(value(own)) < 0.9 * float(value(params))


def test_uses_and_what_may_not_be_formed():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Doubled(KernelNode):
        kernel: jax.Array

        @property
        def uses(self):
            return ("gather",)

        def base(self):
            return self.kernel

        def dense(self, dtype=None):
            return 2 * self.kernel

    kernel, x = normal((N, M)), normal((5, N), 13)
    np.testing.assert_array_equal(lrx.matmul(x, Doubled(kernel)), lrx.matmul(x, kernel))
    rows = lrx.adapters.embed(jnp.array([1, 3]), Doubled(kernel))
    np.testing.assert_array_equal(rows, 2 * kernel[jnp.array([1, 3])])

    state = lrx.scale_by_projection(lrx.projectors.svd(rank=2)).init({"kernel": kernel})
    tap = lrx.taps(state).taps["kernel"].placed()
    tapped = lrx.projection.Tapped(kernel, tap)
    assert tapped.dense() is None and tapped.path == "kernel"
    assert jax.tree.structure(tapped.with_parts(*tapped.parts())) == jax.tree.structure(tapped)
    with pytest.raises(ValueError, match="tap 'kernel': the kernel is read as an array"):
        jnp.sin(tapped)
    with pytest.raises(ValueError, match="tap 'kernel': sin at .* reads the kernel"):
        lrx.adapted(jnp.sin, dense=".*")(tapped)
    with pytest.raises(ValueError, match=r"LowRankKernel: the kernel \(12, 20\) is read as"):
        jnp.sin(node("low rank"))


def test_codes_that_a_view_sees_transposed():
    """A kernel that multiplies by codes as they lie, of a square matrix whose rows are its columns."""
    params = {"kernel": lrx.linalg.quantize_nf4(normal((64, 64)), implementation="pallas")}
    views = lrx.Views(rules={"kernel": lrx.MatrixView(rows=(1,), cols=(0,))})
    adaptation = lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(0), views=views)
    adaptation = adaptation.replace(train=jax.tree.map(lambda x: x + 0.1, adaptation.train))
    function = lambda params, x: x @ params["kernel"].T  # noqa: E731
    x, decoded = normal((5, 64), 3), {"kernel": params["kernel"].dequantize()}
    got = lrx.adapted(function)(lrx.attach(params, adaptation), x)
    wanted = function(lrx.effective(decoded, adaptation), x)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_errors_name_the_node():
    class Loud(Diagonal):
        def multiply(self, op, x, key=None):
            return x, jnp.ones(())

    jax.tree_util.register_dataclass(Loud, ["entries"], ["columns"])
    with pytest.raises(ValueError, match="Loud: it gives a value beside the product"):
        lrx.matmul(normal((5, N)), Loud(normal((N,)), N))
    low, x = node("low rank"), normal((N, M))
    with pytest.raises(ValueError, match="LowRankKernel.*a part of the rows and a part of the col"):
        lrx.einsum("df,df->", x, low)
    with pytest.raises(ValueError, match="LowRankKernel.*reduce_sum at .* reads the kernel"):
        lrx.einsum("nd,df->n", normal((5, N)), low)
    # a node that forms its matrix takes any einsum
    diagonal = node("diagonal")
    found = lrx.einsum("nd,df->n", normal((5, N)), diagonal)
    np.testing.assert_allclose(found, normal((5, N)) @ diagonal.dense().sum(1), rtol=1e-5)
    heads = lrx.Views(rules={"kernel": lrx.MatrixView(rows=(1,), cols=(0,))})
    params = {"kernel": low.dense()}
    adaptation = lrx.adapt(params, FAMILIES["lora"], jax.random.key(0), views=heads)
    with pytest.raises(ValueError, match="give them the same views=, or node.dense"):
        lrx.einsum(
            "nf,df->nd", normal((5, M)), lrx.attach(params, adaptation)["kernel"].with_base(low)
        )
