"""The table of adapters: every family and every option that changes its arithmetic is in at least
one row.

Every row is tested by every law. A row's program is compiled once, for a dense kernel and a scanned
stack: outputs and gradients through `attach`, through `effective`, merged and unmerged. It takes
the adapter's arrays as arguments, so that the arrays of the start, random ones, and a scale of 0
run in the same program.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lrx

A = lrx.adapters
LAYERS, BATCH = 3, 5
VIEWS = lrx.Views(stacked=("stack/.*",))
SHAPES = {"dense": {"kernel": (12, 8)}, "stack": {"kernel": (LAYERS, 8, 8)}}
MATRICES = ((12, 8), *((8, 8),) * LAYERS)
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One row.

    Attributes:
      adapter: what is tested.
      count: `(n, m) ->` numbers that train of one matrix, from the paper's formula.
      shared: numbers that train once.
      starts: "base", or "elsewhere": the start changes the function, as documented.
      removable: it can be taken out of a merged kernel by arithmetic.
      dense: it forms an n x m matrix beside the kernel, as documented.
      fast: it also runs in the fast tier.
    """

    name: str
    adapter: A.Adapter
    count: Callable[[int, int], int]
    shared: int = 0
    starts: str = "base"
    removable: bool = True
    dense: bool = False
    fast: bool = False


def _lora(name, rank=4, *, fast=False, family=A.lora, **options):
    return Row(
        name=name,
        adapter=family(rank=rank, **options),
        count=lambda n, m: rank * (n + m),
        fast=fast,
    )


ROWS = (
    _lora("lora", alpha=6.0, fast=True),
    _lora("lora-rs", alpha=6.0, rank_stabilized=True),
    _lora("lora-gaussian", init="gaussian"),
    _lora("lora-orthogonal", init="orthogonal"),
    _lora("lora-pissa", init="pissa", alpha=6.0, fast=True),
    _lora("lora-pissa-randomized", init=A.pissa(iterations=4)),
    _lora("lora-milora", init="milora"),
    _lora("lora-olora", init="olora", alpha=6.0),
    Row(name="lora-fa", adapter=A.lora(rank=4, trains="b"), count=lambda n, m: 4 * m),
    Row(name="lora-a", adapter=A.lora(rank=4, trains="a", init="pissa"), count=lambda n, m: 4 * n),
    Row(name="dora", adapter=A.dora(rank=4, alpha=6.0), count=lambda n, m: 4 * (n + m) + m, removable=False, fast=True),
    _lora("dylora", alpha=6.0, family=A.dylora),
    Row(name="hira", adapter=A.hira(rank=4), count=lambda n, m: 4 * (n + m), dense=True),
    Row(name="oft", adapter=A.oft(block=4), count=lambda n, m: n * 3 // 2, fast=True),
    Row(name="oft-neumann", adapter=A.oft(block=2, cayley="neumann"), count=lambda n, m: n // 2),
    Row(name="uni_lora", adapter=A.uni_lora(rank=2, size=30), count=lambda n, m: 0, shared=30, starts="elsewhere",
        fast=True),
    Row(name="vera", adapter=A.vera(rank=6), count=lambda n, m: 6 + m, fast=True),
    Row(name="vera-regenerated", adapter=A.vera(rank=6, stored=False, initial=0.5), count=lambda n, m: 6 + m),
    # 12 x 8: N = 3 bases of rank 3; 8 x 8: the same
    Row(name="rand_lora", adapter=A.rand_lora(rank=3, alpha=6.0), count=lambda n, m: 3 * (3 + min(n, m)), dense=True,
        fast=True),
    Row(name="rand_lora-normalized", adapter=A.rand_lora(rank=4, alpha=30.0, basis_normalized=True, bases="sparse"),
        count=lambda n, m: 2 * (4 + min(n, m)), dense=True),
    Row(name="rand_lora-regenerated", adapter=A.rand_lora(rank=8, alpha=6.0, stored=False),
        count=lambda n, m: 8 + min(n, m), dense=True),
    Row(name="miss", adapter=A.miss(rank=5), count=lambda n, m: 5 * m, fast=True),
    Row(name="miss-mini", adapter=A.miss(rank=4, mode="mini", mini_rank=2), count=lambda n, m: 8),
    Row(name="miss-bat", adapter=A.miss(rank=4, mode="bat"), count=lambda n, m: 4 * m, dense=True),
    Row(name="loha", adapter=A.loha(rank=2, alpha=6.0), count=lambda n, m: 4 * (n + m), dense=True),
    Row(name="fourierft", adapter=A.fourierft(frequencies=20), count=lambda n, m: 20, dense=True),
    Row(name="fourierft-normal", adapter=A.fourierft(frequencies=20, init="normal", alpha=6.0, seed=3),
        count=lambda n, m: 20, starts="elsewhere", dense=True),
    Row(name="shira", adapter=A.shira(rank=1), count=lambda n, m: n + m, fast=True),
    Row(name="shira-torch", adapter=A.shira(rank=2, seed=5), count=lambda n, m: 2 * (n + m)),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interleaved(A.lora):
    """LoRA whose factors come in another order: each component of the start behind the one that it
    belongs to."""

    def factors(self, site, p):
        a, scale, b, rank_of = super().factors(site, p)
        order = np.arange(len(rank_of)).reshape(2, -1).T.reshape(-1)
        return A.Factors(a[:, order], scale[order], b[order], rank_of[order])


FOREIGN = (
    Row(name="interleaved", adapter=Interleaved(rank=4, init="pissa"), count=lambda n, m: 4 * (n + m), fast=True),
)  # fmt: skip


def every_row(*, unless: Callable[[Row], Any] = lambda row: False, more: tuple[Row, ...] = ()):
    """The table, and more rows, as pytest parameters; rows that are not fast are marked slow."""
    return pytest.mark.parametrize(
        "row",
        [
            pytest.param(row, id=row.name, marks=() if row.fast else pytest.mark.slow)
            for row in (*ROWS, *more)
            if not unless(row)
        ],
    )


@functools.cache
def params(dtype: Any = jnp.float32):
    """Kernels whose columns have norms near 1."""
    generator = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(generator.normal(size=shape) / np.sqrt(shape[-2]), dtype)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


@functools.cache
def inputs(dtype: Any = jnp.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, 12)), dtype)


@functools.cache
def start(row: Row) -> lrx.adapters.Adaptation:
    """The adaptation as it starts."""
    return jax.jit(lambda params, key: lrx.adapt(params, row.adapter, key, views=VIEWS))(
        params(), jax.random.key(0)
    )


@functools.cache
def moved(row: Row) -> lrx.adapters.Adaptation:
    """The adaptation somewhere else: random numbers added to everything that trains."""
    generator = np.random.default_rng(2)
    add = lambda x: x + 0.2 * jnp.asarray(generator.normal(size=x.shape), x.dtype)  # noqa: E731
    return start(row).replace(train=jax.tree.map(add, start(row).train))


@functools.cache
def low_precision(row: Row) -> dict[str, Any]:
    """Outputs of a bfloat16 model, of its effective kernels, and of the same numbers in float32."""

    def run(params, adaptation, x):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        effective = lrx.effective(params, adaptation)
        return {
            "attached": attached(params, adaptation, x),
            "effective": effective,
            "merged": model(effective, x),
            "exact": attached(wide, adaptation, x.astype(jnp.float32)),
        }

    return jax.jit(run, compiler_options=FAST_COMPILE)(
        params(jnp.bfloat16), moved(row), inputs(jnp.bfloat16)
    )


def padded(row: Row) -> lrx.adapters.Adaptation:
    """As `moved`, with a rank of its own for each layer of the stack where the family has ranks, 0
    for the last."""
    rank = getattr(row.adapter, "rank", 0)
    ranks = {"stack/kernel": (rank, max(rank // 2, 1), 0)} if row.adapter.ranked else {}
    adaptation = lrx.adapt(params(), row.adapter, jax.random.key(0), views=VIEWS, ranks=ranks)
    generator = np.random.default_rng(3)
    add = lambda x: x + 0.2 * jnp.asarray(generator.normal(size=x.shape), x.dtype)  # noqa: E731
    return adaptation.replace(train=jax.tree.map(add, adaptation.train))


def converted(row: Row, rank: int) -> tuple[Any, Any, dict[str, jax.Array]]:
    """The effective kernels of `padded` as plain LoRA, those of itself, and the errors that are
    reported."""

    def run(params, adaptation):
        lora, report = lrx.to_lora(params, adaptation, rank=rank)
        return lrx.effective(params, lora), lrx.effective(params, adaptation), report.errors

    return jax.jit(run, compiler_options=FAST_COMPILE)(params(), padded(row))


def off(adaptation: lrx.adapters.Adaptation) -> lrx.adapters.Adaptation:
    """With a weight of 0 in every scale."""
    sites = {
        path: own | {"scale": 0 * own["scale"]} for path, own in adaptation.frozen["sites"].items()
    }
    return adaptation.replace(frozen=adaptation.frozen | {"sites": sites})


def model(tree: Any, x: jax.Array, *, scan: bool = True) -> jax.Array:
    """A dense layer and a stack, by `lax.scan` or unrolled."""
    x, stack = jnp.tanh(lrx.matmul(x, tree["dense"]["kernel"])), tree["stack"]["kernel"]
    if scan:
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(lrx.matmul(x, kernel)), None), x, stack)[0]
    for number in range(LAYERS):
        x = jnp.tanh(lrx.matmul(x, stack[number]))
    return x


def attached(params, adaptation, x, **options):
    return lrx.adapted(model)(lrx.attach(params, adaptation), x, **options)


def weighted(output: jax.Array) -> jax.Array:
    """A scalar with another weight for each entry."""
    return jnp.sum(
        output * jnp.cos(jnp.arange(output.size, dtype=output.dtype)).reshape(output.shape)
    )


@functools.cache
def program(row: Row) -> Callable:
    """`run(params, adaptation, x)`: everything that the laws compare, in one compiled program."""

    def run(params, adaptation, x):
        def loss(form):
            def of(train):
                output = form(params, adaptation.replace(train=train), x)
                return weighted(output), output

            (_, output), gradient = jax.value_and_grad(of, has_aux=True)(adaptation.train)
            return output, gradient

        merged = lrx.merge(params, adaptation)
        found = {
            "attached": loss(attached),
            "effective": loss(
                lambda params, adaptation, x: model(lrx.effective(params, adaptation), x)
            ),
            "unrolled": attached(params, adaptation, x, scan=False),
            "base": model(params, x),
            "merged": merged,
            "kernels": lrx.effective(params, adaptation),
        }
        return found | (
            {"unmerged": lrx.adapters.unmerge(merged, adaptation)} if row.removable else {}
        )

    return jax.jit(run, compiler_options=FAST_COMPILE)


@functools.cache
def ran(row: Row, where: str) -> dict[str, Any]:
    """What the program gives at the start, "moved", or moved and "off"."""
    adaptation = {"start": start, "moved": moved, "off": lambda row: off(moved(row))}[where](row)
    return program(row)(params(), adaptation, inputs())


def error(a: Any, b: Any) -> float:
    """The largest difference of two trees, relative to the largest entry of a leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    wide = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs]
    return max(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30) for x, y in wide)
