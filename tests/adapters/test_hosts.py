"""Every host of a kernel: its output with adapters is that of the effective kernel; and what a host
must not do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx
from lowrank_jax.adapters.base import matrix_op

pytestmark = pytest.mark.slow  # the fast tier has its laws and documentation

A = lrx.adapters
KEY = jax.random.key(0)
# one of each way to act: factors, factors of a shared vector, a gain on the columns, a rotation of
# the rows, a sum of shards, a dense delta, a product with the kernel, entries in blocks
FAMILIES = {
    "lora": A.lora(rank=2, init="pissa"), "uni_lora": A.uni_lora(rank=2, size=20, bound=0.5), "dora": A.dora(rank=2),
    "oft": A.oft(block=4), "miss": A.miss(rank=3), "mini": A.miss(rank=4, mode="mini", mini_rank=2),
    "loha": A.loha(rank=2), "hira": A.hira(rank=2), "shira": A.shira(rank=1), "vera": A.vera(rank=3),
    "fourierft": A.fourierft(frequencies=9, alpha=20.0), "bat": A.miss(rank=4, mode="bat"),
}  # fmt: skip
FAST = ("lora", "dora", "oft", "miss", "shira")


def slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


every_family = pytest.mark.parametrize(
    "name", [*FAST, *slow(*(name for name in FAMILIES if name not in FAST))]
)
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
HEADS = lrx.MatrixView(rows=(0,), cols=(1, 2))
OUT = lrx.MatrixView(rows=(0, 1), cols=(2,))
WINDOW = lrx.MatrixView(rows=(0, 1, 2), cols=(3,))
EXPERTS = lrx.MatrixView(batch=(0,), rows=(1,), cols=(2,))
VIEWS = lrx.Views(rules={"heads": HEADS, "out": OUT, "conv": WINDOW, "experts": EXPERTS})
SHAPES = {
    "dense": (8, 12),
    "heads": (8, 3, 4),
    "out": (2, 4, 12),
    "experts": (3, 8, 4),
    "embedding": (12, 8),
    "conv": (2, 2, 4, 8),
}


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, dtype)


@functools.cache
def kernels(dtype=jnp.float32):
    return {name: normal(shape, len(name), dtype) for name, shape in SHAPES.items()}


@functools.cache
def adaptation(family, seed=3, name="default"):
    """Of all hosts' kernels, somewhere else than at the start."""
    adapt = lambda params: lrx.adapt(params, {".*": FAMILIES[family]}, KEY, views=VIEWS, name=name)  # noqa: E731
    return moved(jax.jit(adapt, compiler_options=FAST_COMPILE)(kernels()), seed)


def moved(made, seed):
    """The adaptation with random numbers added to everything that trains."""
    leaves, treedef = jax.tree.flatten(made.train)
    return made.replace(
        train=jax.tree.unflatten(
            treedef, [x + 0.4 * normal(x.shape, seed + i) for i, x in enumerate(leaves)]
        )
    )


def convolve(x, kernel, strides=(2, 1), padding=((1, 0), (0, 1)), groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def hosts(tree):
    """`{host: output}` of plain or adapted kernels."""
    dtype = tree["dense"].dtype
    x, heads = normal((2, 5, 8), 1, dtype), normal((2, 5, 2, 4), 2, dtype)
    numbers = (((2, 3), (0, 1)), ((), ()))
    return {
        "matmul": lrx.matmul(x, tree["dense"]),
        "heads": lrx.einsum("bsd,dhk->bhsk", x, tree["heads"]),
        "rows of heads": lrx.einsum("...hk,hkd->...d", heads, tree["out"]),
        "dot_general": lrx.dot_general(heads, tree["out"], numbers),
        "experts": lrx.einsum("end,edf->enf", normal((3, 6, 8), 4, dtype), tree["experts"]),
        "experts in the middle": lrx.einsum(
            "ned,edf->nfe", normal((6, 3, 8), 5, dtype), tree["experts"]
        ),
        "embed": A.embed(jnp.array([[1, 7, 1], [0, 11, 3]]), tree["embedding"]),
        "attend": A.attend(x, tree["embedding"]),
        "conv": A.conv(normal((2, 5, 6, 4), 6, dtype), tree["conv"], convolve),
    }


@functools.cache
def compared(name):
    """Outputs and gradients through adapted and through effective kernels, in one program."""

    def run(params, adaptation):
        def loss(form):
            def of(train):
                found = hosts(form(params, adaptation.replace(train=train)))
                weights = {
                    host: jnp.sin(jnp.arange(out.size)).reshape(out.shape)
                    for host, out in found.items()
                }
                return sum(jnp.sum(out * weights[host]) for host, out in found.items()), found

            return jax.grad(of, has_aux=True)(adaptation.train)

        return loss(lrx.attach), loss(lrx.effective), hosts(params)

    return jax.jit(run, compiler_options=FAST_COMPILE)(kernels(), adaptation(name))


@every_family
def test_every_host_multiplies_by_the_effective_kernel(name):
    (gradient, outputs), (wanted_gradient, wanted), base = compared(name)
    for host, output in outputs.items():
        assert float(jnp.abs(output - base[host]).max()) > 1e-2, (
            f"{host}: the adapter changes nothing"
        )
        np.testing.assert_allclose(
            output, wanted[host], atol=2e-5 * float(jnp.abs(wanted[host]).max()), err_msg=host
        )
        assert output.dtype == wanted[host].dtype
    for found, value in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True
    ):
        np.testing.assert_allclose(found, value, atol=5e-5 * float(jnp.abs(value).max()))


@pytest.mark.parametrize("name", ["lora", "oft", *slow("dora", "miss")])
def test_a_bfloat16_base_with_float32_adapters_gives_bfloat16(name):
    params = kernels(jnp.bfloat16)

    def run(form):
        return jax.jit(lambda params, own: hosts(form(params, own)), compiler_options=FAST_COMPILE)

    outputs = run(lrx.attach)(params, adaptation(name))
    exact = run(lrx.effective)(
        jax.tree.map(lambda x: x.astype(jnp.float32), params), adaptation(name)
    )
    for host, output in outputs.items():
        assert output.dtype == jnp.bfloat16
        difference = np.abs(np.asarray(output, np.float32) - exact[host]).max()
        assert difference < 2.0**-6 * np.abs(exact[host]).max(), host
    wide = jax.lax.dot_general(
        normal((5, 8), 1, jnp.bfloat16),
        params["dense"],
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    adapted = lrx.dot_general(
        normal((5, 8), 1, jnp.bfloat16),
        lrx.attach(params, adaptation(name))["dense"],
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    assert adapted.dtype == wide.dtype == jnp.float32


def test_several_adaptations_act_in_their_order():
    params, orders = (
        {"dense": kernels()["dense"]},
        (("rotate", "add"), ("add", "rotate"), ("add",), ()),
    )

    def run(params):
        rules = {"rotate": A.oft(block=4), "add": A.lora(rank=2)}
        both = {
            name: moved(lrx.adapt(params, {"dense": own}, KEY, name=name), 3)
            for name, own in rules.items()
        }
        outputs = [
            lrx.matmul(normal((5, 8)), lrx.attach(params, both, active=active)["dense"])
            for active in orders
        ]
        effective = [lrx.effective(params, both, active=active)["dense"] for active in orders]
        return outputs, effective, lrx.adapters.unmerge(lrx.merge(params, both), both)

    outputs, effective, back = jax.jit(run, compiler_options=FAST_COMPILE)(params)
    for output, kernel in zip(outputs, effective, strict=True):
        np.testing.assert_allclose(output, normal((5, 8)) @ kernel, atol=1e-5)
    assert np.array_equal(effective[3], params["dense"])
    assert min(float(jnp.abs(effective[i] - effective[0]).max()) for i in (1, 2, 3)) > 1e-2
    np.testing.assert_allclose(back["dense"], params["dense"], atol=1e-5)


def test_an_operator_of_a_bare_matrix():
    op = A.oft(block=4).wrap(
        matrix_op(kernels()["dense"]),
        A.oft(block=4).site((8, 12)),
        A.oft(block=4).start(KEY, kernels()["dense"]),
    )
    assert op.shape == (8, 12)
    np.testing.assert_allclose(op(normal((5, 8))), normal((5, 8)) @ op.kernel(), atol=1e-5)


def test_a_host_may_bring_its_own_product_and_precision():
    tree, x = lrx.attach(kernels(), adaptation("lora")), normal((5, 8))
    numbers = (((1,), (0,)), ((), ()))
    # a product of one's own is one of the effective matrix
    ids = jnp.array([1, 5])
    found = A.embed(ids, tree["embedding"], lambda ids, matrix: 3 * matrix[ids])
    np.testing.assert_allclose(found, 3 * A.embed(ids, tree["embedding"]), atol=1e-5)
    found = A.attend(x, tree["embedding"], lambda x, matrix: 3 * x @ matrix.T)
    np.testing.assert_allclose(found, 3 * A.attend(x, tree["embedding"]), atol=1e-5)

    def highest(x):
        return lrx.dot_general(x, tree["dense"], numbers, precision=jax.lax.Precision.HIGHEST)

    # the base's product and both thin ones
    text = "precision=(Precision.HIGHEST, Precision.HIGHEST)"
    assert str(jax.make_jaxpr(highest)(x)).count(text) == 3


# what a host refuses


def test_products_of_other_axes_than_the_views():
    tree, effective = (work(kernels(), adaptation("lora")) for work in (lrx.attach, lrx.effective))
    for subscripts, x, name in (
        ("bd,fd->bf", normal((5, 12)), "dense"),
        ("bd,edf->bef", normal((5, 8)), "experts"),
    ):
        found = lrx.einsum(subscripts, x, tree[name])
        wanted = jnp.einsum(subscripts, x, effective[name])
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    with pytest.raises(ValueError, match="'dense': reduce_sum at .*test_hosts.py.*exclude="):
        lrx.einsum("bd,df->b", normal((5, 8)), tree["dense"])
    # a window whose axes are folded in another order
    params, views = (
        {"out": kernels()["out"]},
        lrx.Views(rules={"out": lrx.MatrixView(rows=(1, 0), cols=(2,))}),
    )
    made = moved(lrx.adapt(params, {"out": A.lora(rank=2)}, KEY, views=views), 3)
    x, layout = normal((2, 5, 4)), ("NWC", "WIO", "NWC")
    in_one = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (1,), "SAME", dimension_numbers=layout
    )
    found = A.conv(x, lrx.attach(params, made)["out"], in_one)
    wanted = in_one(x, lrx.effective(params, made)["out"])
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_a_convolution_in_groups_is_refused_and_works_through_effective():
    tree = lrx.attach(kernels(), adaptation("lora"))
    grouped = functools.partial(convolve, groups=2)
    x = normal((2, 5, 6, 8), 6)
    with pytest.raises(ValueError, match=r"'conv': conv_general_dilated at .*in groups"):
        A.conv(x, tree["conv"], grouped)
    assert A.conv(x, lrx.effective(kernels(), adaptation("lora"))["conv"], grouped).shape[-1] == 8


# dropout


def dropped(name, key, rate=0.5, tree="dense", host=lrx.matmul):
    families = {
        "lora": A.lora(rank=2, dropout=rate, init="pissa"),
        "dora": A.dora(rank=2, dropout=rate),
        "miss": A.miss(rank=3, dropout=rate),
        "vera": A.vera(rank=3, initial=2.0, dropout=rate),
    }
    params = {tree: kernels()[tree]}
    made = lrx.adapt(params, {tree: families[name]}, KEY)
    return host(normal((4, 8), 1), lrx.attach(params, moved(made, 7), key=key)[tree])


@pytest.mark.parametrize("host", ["dense", *slow("attend")])
@pytest.mark.parametrize("name", ["lora", "dora", *slow("miss", "vera")])
def test_dropout_is_unbiased_and_follows_its_key(name, host):
    options = {} if host == "dense" else {"tree": "embedding", "host": A.attend}
    draw = functools.partial(dropped, name, **options)
    exact, twice = draw(None), [draw(jax.random.key(1)) for _ in range(2)]
    assert np.array_equal(*twice) and not np.array_equal(twice[0], exact)
    np.testing.assert_allclose(draw(jax.random.key(1), rate=0.0), exact, atol=1e-6)
    many = jax.jit(jax.vmap(draw), compiler_options=FAST_COMPILE)(
        jax.random.split(jax.random.key(2), 4000)
    )
    spread = np.maximum(many.std(0), 1e-3) / np.sqrt(4000)
    assert np.abs((many.mean(0) - exact) / spread).max() < 5
    if name != "dora":  # whose base term sees the dropped input too
        x = normal((4, 8), 1)
        base = x @ kernels()["dense"] if host == "dense" else x @ kernels()["embedding"].T
        np.testing.assert_allclose(draw(None, rate=0.5), exact, atol=1e-6)
        assert many.std(0).mean() > 1e-2 and np.abs(exact - base).max() > 1e-2


def test_dropout_of_lora_is_on_the_branch_alone():
    """Inverted dropout of the branch's input: with K = 0 and one input 1, the branch is 0 or 2
    times itself."""
    params = {"kernel": jnp.zeros((8, 4))}
    made = lrx.adapt(params, {"kernel": A.lora(rank=2, alpha=2.0, dropout=0.5)}, KEY)
    made = made.replace(train=jax.tree.map(jnp.ones_like, made.train))
    x = jnp.zeros((1, 8)).at[0, 3].set(1.0)
    run = jax.vmap(lambda key: lrx.matmul(x, lrx.attach(params, made, key=key)["kernel"])[0, 0])
    outputs = np.asarray(run(jax.random.split(KEY, 400)))
    assert set(outputs.round(4)) == {0.0, 4.0} and 0.4 < (outputs > 0).mean() < 0.6


def test_dropout_of_dora_leaves_the_base_alone_at_the_start():
    """The base term sees the dropped input only through `gain - 1`, which is 0 there, as in
    PEFT."""
    for tree, host, x in (
        ("dense", lrx.matmul, normal((4, 8), 1)),
        ("embedding", A.attend, normal((4, 8), 1)),
    ):
        params = {tree: kernels()[tree]}
        made = lrx.adapt(params, {tree: A.dora(rank=2, dropout=0.5, init="gaussian")}, KEY)
        own = made.train["sites"][tree]
        zero = "a" if tree == "embedding" else "b"
        assert not own[zero].any()
        found = host(x, lrx.attach(params, made, key=jax.random.key(1))[tree])
        np.testing.assert_allclose(found, host(x, params[tree]), atol=1e-6)


def test_dropout_differs_between_sites_layers_and_names():
    params = {name: jnp.zeros((2, 8, 4)) for name in ("one", "two")}
    views = lrx.Views(stacked=".*")

    def outputs(name):
        made = lrx.adapt(params, {".*": A.miss(rank=8, dropout=0.5)}, KEY, views=views, name=name)
        places = jnp.arange(8.0)[:, None]
        made = made.replace(
            train=jax.tree.map(lambda x: jnp.broadcast_to(places, x.shape), made.train)
        )
        tree, x = lrx.attach(params, made, key=jax.random.key(5)), jnp.ones((2, 20, 8))
        return [
            lrx.einsum("end,edf->enf", x, tree[leaf])[layer] for leaf in params for layer in (0, 1)
        ]

    draws = [np.asarray(out) for name in ("default", "other") for out in outputs(name)]
    assert len({draw.tobytes() for draw in draws}) == 8


# quantised bases


def decodings(jaxpr) -> int:
    """How often the program looks up codes of 8 bits, those of inner jaxprs included."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == "gather" and equation.invars[0].aval.shape == (256,)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            found += decodings(inner) if hasattr(inner, "eqns") else 0
    return found


def quantised(adapter):
    params = {"kernel": lrx.linalg.quantize_blocks(kernels()["dense"])}
    made = moved(lrx.adapt(params, {"kernel": adapter}, KEY), 7)

    def loss(train, x):
        return jnp.sum(lrx.matmul(x, lrx.attach(params, made.replace(train=train))["kernel"]) ** 2)

    return params, made, loss


@every_family
def test_a_quantised_base_gives_what_its_decoded_kernel_gives(name):
    params, made, loss = quantised(FAMILIES[name])
    plain = {"kernel": params["kernel"].dequantize()}
    wanted = lrx.matmul(normal((5, 8)), lrx.effective(plain, made)["kernel"])
    output = lrx.matmul(normal((5, 8)), lrx.attach(params, made)["kernel"])
    np.testing.assert_allclose(output, wanted, atol=2e-5 * float(jnp.abs(wanted).max()))
    assert isinstance(lrx.effective(params, made)["kernel"], lrx.linalg.QuantizedBlocks)
    # only the base product decodes: thin adapters, rotations and shards never read the kernel
    reads = name in ("dora", "hira", "shira", "loha", "fourierft", "bat")
    asked = []
    op = matrix_op(plain["kernel"])
    counting = type(op)(op.shape, op.contract, lambda: asked.append(1) or op.kernel(), op.own)
    p = made.arrays("kernel")
    FAMILIES[name].wrap(counting, made.layout.sites[0], p)(normal((5, 8)))
    assert bool(asked) == reads
    assert decodings(jax.make_jaxpr(loss)(made.train, normal((5, 8))).jaxpr) == 1


@pytest.mark.parametrize("name", ["lora", "oft", "miss"])
def test_the_backward_pass_keeps_the_codes_of_a_quantised_base(name):
    """Between the passes there is no decoded kernel: 8 bits an entry are kept, and decoded again
    where dx needs it."""
    params, made, loss = quantised(FAMILIES[name])
    plain = lambda x: jnp.sum(lrx.matmul(x, params["kernel"]) ** 2)  # noqa: E731
    einsum = lambda x: jnp.sum(lrx.einsum("bd,df->bf", x, params["kernel"]) ** 2)  # noqa: E731
    for function, args in ((loss, (made.train,)), (plain, ()), (einsum, ())):
        _, backward = jax.vjp(function, *args, normal((5, 8)))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(backward) if leaf.shape == (8, 12)} == {
            "uint8"
        }


# a choice for each row


@pytest.mark.parametrize("family", ["lora", *slow("dora", "oft", "miss", "shira", "uni_lora")])
def test_every_row_takes_its_own_candidate(family):
    x, indices, ids = (
        normal((4, 3, 8), 1),
        jnp.array([[0, 3], [11, 3], [5, 3], [2, 3]]),
        jnp.array([1, -1, 0, 1]),
    )
    params = {name: kernels()[name] for name in ("dense", "embedding")}

    def products(tree):
        return (
            lrx.matmul(x, tree["dense"]),
            A.embed(indices, tree["embedding"]),
            A.attend(x, tree["embedding"]),
        )

    def run(params, ids):
        def adapt(i):
            return lrx.adapt(params, {".*": FAMILIES[family]}, jax.random.key(i), name=str(i))

        made = [moved(adapt(i), 20 * i) for i in (0, 1)]
        both = A.candidates({one.layout.name: one for one in made})
        alone = [products(params), *(products(lrx.effective(params, one)) for one in made)]
        return products(lrx.attach(params, both, ids=ids)), alone

    found, alone = jax.jit(run, compiler_options=FAST_COMPILE)(params, ids)
    for host, output in enumerate(found):
        for row, number in enumerate(ids.tolist()):
            wanted = alone[number + 1][host][row]
            np.testing.assert_allclose(
                output[row], wanted, atol=2e-5 * float(jnp.abs(wanted).max())
            )
        assert float(jnp.abs(alone[1][host] - alone[2][host]).max()) > 1e-2
