"""A value beside a product, such as the loss of a router: who gives it, who takes it, and that nobody
loses it silently."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx

A = lrx.adapters
GENERATOR = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(GENERATOR.normal(size=shape), jnp.float32)  # noqa: E731
X = draw(5, 6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed(A.lora):
    """Two experts, each a LoRA of one component, by the softmax of a router, and the loss that keeps
    the router even: `2 sum_e (mean p_e)²`."""

    gives_aux: ClassVar[bool] = True

    def init_site(self, key, site, kernel, given):
        train, frozen = super().init_site(key, site, kernel, given)
        return train | {"router": jax.random.normal(key, (site.n, 2))}, frozen

    def axes(self, site):
        return super().axes(site) | {"router": ("rows", None)}

    def wrap(self, op, site, p, key=None):
        chances = lambda x: jax.nn.softmax(op.contract(x, p["router"]))  # noqa: E731

        def forward(x):
            low = op.contract(x, p["a"]) * chances(x) * p["scale"]
            return op.expand(low.astype(x.dtype), p["b"])

        adapted = op.plus(forward, lambda: self.delta(site, p))
        return adapted.giving(lambda x: 2 * jnp.sum(jnp.mean(chances(x), axis=0) ** 2))


def made(params, adapter=None, **options):
    adaptation = lrx.adapt(params, {".*": adapter or Routed(rank=2)}, jax.random.key(0), **options)
    return adaptation.replace(train=jax.tree.map(lambda x: x + 0.3, adaptation.train))


def reference(x, kernel, own):
    """`(y, loss)` in float64."""
    x, kernel, a, b, router = (
        np.asarray(v, np.float64) for v in (x, kernel, own["a"], own["b"], own["router"])
    )
    logits = np.exp(x @ router)
    chances = logits / logits.sum(1, keepdims=True)
    scale = 8 / 2
    return x @ kernel + ((x @ a) * chances * scale) @ b, 2 * np.sum(chances.mean(0) ** 2)


def test_a_product_gives_both_and_both_have_gradients():
    params = {"kernel": draw(6, 4)}
    adaptation = made(params)

    @jax.jit
    def objective(train):
        tree = lrx.attach(params, adaptation.replace(train=train))
        y, (loss,) = lrx.matmul(X, tree["kernel"], aux=True)
        return jnp.sum(y**2) + 10 * loss, (y, loss)

    gradient, (y, loss) = jax.grad(objective, has_aux=True)(adaptation.train)
    wanted, balance = reference(X, params["kernel"], adaptation.train["sites"]["kernel"])
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss, balance, rtol=1e-5)
    # the router learns from the loss, too
    router = adaptation.train["sites"]["kernel"]["router"]
    step = jnp.zeros_like(router).at[2, 1].set(1e-2)

    def moved(sign):
        site = adaptation.train["sites"]["kernel"] | {"router": router + sign * step}
        return objective(adaptation.train | {"sites": {"kernel": site}})[0]

    slope = (moved(1) - moved(-1)) / 2e-2
    np.testing.assert_allclose(gradient["sites"]["kernel"]["router"][2, 1], slope, rtol=2e-2)


def test_what_nobody_takes_is_an_error_on_every_host():
    params = {"kernel": draw(6, 4), "embedding": draw(9, 6), "conv": draw(3, 6, 4)}
    views = lrx.Views(rules={"conv": lrx.MatrixView(rows=(0, 1), cols=(2,))})
    tree = lrx.attach(params, made(params, views=views))
    for use in (
        lambda: lrx.matmul(X, tree["kernel"]),
        lambda: lrx.einsum("bd,dh->bh", X, tree["kernel"]),
        lambda: lrx.dot_general(X, tree["kernel"], (((1,), (0,)), ((), ()))),
    ):
        with pytest.raises(ValueError, match="'kernel'.*nobody takes it.*aux=True"):
            use()
    layout = ("NWC", "WIO", "NWC")
    convolve = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (1,), "SAME", dimension_numbers=layout
    )
    for use in (
        lambda: A.embed(jnp.arange(3), tree["embedding"]),
        lambda: A.attend(X, tree["embedding"]),
        lambda: A.conv(X[None], tree["conv"], convolve),
    ):
        with pytest.raises(ValueError, match="gives a value beside the product.*has none"):
            use()


def test_adapters_together_give_theirs_in_order_and_see_what_is_turned_before_them():
    params = {"kernel": draw(6, 4)}
    one, two = made(params), made(params, Routed(rank=2, alpha=2.0))
    turn = lrx.adapt(params, {"kernel": A.oft(block=3)}, jax.random.key(1))
    turn = turn.replace(train=jax.tree.map(lambda x: x + 0.4, turn.train))
    rotation = A.oft(block=3).rotation(turn.arrays("kernel"))
    turned = jnp.einsum("bgi,gij->bgj", X.reshape(5, 2, 3), rotation).reshape(5, 6)

    def losses(**adaptations):
        return lrx.matmul(X, lrx.attach(params, adaptations)["kernel"], aux=True)[1]

    own = [reference(X, params["kernel"], a.train["sites"]["kernel"])[1] for a in (one, two)]
    np.testing.assert_allclose(losses(one=one, two=two), own, rtol=1e-5)
    behind = reference(turned, params["kernel"], one.train["sites"]["kernel"])[1]
    np.testing.assert_allclose(losses(one=one, turn=turn), [behind], rtol=1e-5)
    np.testing.assert_allclose(losses(turn=turn, one=one), [own[0]], rtol=1e-5)
    assert losses(turn=turn) is None


def test_stacks_scans_remat_and_rows_keep_the_value():
    params = {"kernel": draw(3, 6, 6)}
    adaptation = made(params, views=lrx.Views(stacked=("kernel",)))
    kernel = lrx.attach(params, adaptation)["kernel"]
    own = adaptation.train["sites"]["kernel"]

    @jax.jit
    def run(x, kernel):
        body = jax.checkpoint(lambda x, kernel: lrx.matmul(x, kernel, aux=True))
        return jax.lax.scan(body, x, kernel)

    y, (losses,) = run(X, kernel)
    x = np.asarray(X, np.float64)
    for layer in range(3):
        arrays = {name: own[name][layer] for name in own}
        x, loss = reference(x, params["kernel"][layer], arrays)
        np.testing.assert_allclose(losses[layer], loss, rtol=1e-3)
    np.testing.assert_allclose(y, x, rtol=1e-3, atol=1e-2)
    # rows that choose: a value for each row
    params = {"kernel": draw(6, 4)}
    one, two = made(params), made(params, Routed(rank=2, alpha=2.0))
    both = A.candidates({"one": one, "two": two})
    tree = lrx.attach(params, both, ids=jnp.asarray([0, 1, 0, 1, 0]))
    y, (losses,) = lrx.matmul(X, tree["kernel"], aux=True)
    for row, adaptation in enumerate((one, two, one, two, one)):
        wanted = reference(X[row][None], params["kernel"], adaptation.train["sites"]["kernel"])
        np.testing.assert_allclose(losses[row], wanted[1], rtol=1e-5)


def test_a_plain_kernel_gives_nothing():
    params = {"kernel": draw(6, 4)}
    adaptation = made(params, A.lora(rank=2))
    y, aux = lrx.matmul(X, lrx.attach(params, adaptation)["kernel"], aux=True)
    assert aux is None
    np.testing.assert_array_equal(y, lrx.matmul(X, lrx.attach(params, adaptation)["kernel"]))
