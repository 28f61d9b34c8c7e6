"""What the optimizer benchmark works on: a preset's matrices, and the optimizers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_jax as lrx
from experiments.models import llama
from lowrank_jax.typing import Pytree

PERIOD = 200  # T of every optimizer that refreshes periodically: GaLore's scripts
VIEWS = lrx.Views(stacked=(r"layers/.*",))


def rank(preset: str) -> int:
    """A quarter of the width, as in GaLore's experiments."""
    return llama.preset(preset).width // 4


def matrices(preset: str, **overrides: Any) -> dict[str, Any]:
    """Shapes `(L, d_in, d_out)` of the kernels of the scanned blocks alone."""
    model = llama.Llama(llama.preset(preset, **overrides))
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"][
        "layers"
    ]
    kernels = {
        group: {name: leaf["kernel"] for name, leaf in tree[group].items()}
        for group in ("attention", "mlp")
    }
    return {"layers": jax.tree.map(lambda leaf: {"kernel": leaf}, kernels)}


def gradients(shapes: Any, seed: int = 0) -> Any:
    """Standard normal arrays of these shapes."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(generator.standard_normal(x.shape, np.float32)), shapes
    )


def unstacked(tree: Pytree) -> Any:
    """Every leaf `(L, m, n)` as L matrices: `optax.contrib.galore` silently skips stacks."""
    if all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
        return jax.tree.map(
            lambda x: [jax.ShapeDtypeStruct(x.shape[1:], x.dtype)] * x.shape[0], tree
        )
    return jax.tree.map(lambda x: [jnp.array(layer) for layer in x], tree)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One optimizer of the comparison.

    Attributes:
      name: as in the table.
      tx: the optimizer.
      refresh: the step that pays for a refresh of everything, or None where every step is alike.
      unstacked: it is given the layers one by one.
      every_step: every step refreshes.
      aim: its refresh is one of those that should cost less than three normal steps.
    """

    name: str
    tx: optax.GradientTransformation
    refresh: int | None = None
    unstacked: bool = False
    every_step: bool = False
    aim: bool = False

    @property
    def staggered(self) -> bool:
        """Whether its refreshes are spread over the period."""
        return isinstance(
            getattr(getattr(self.tx, "projection", None), "refresh_schedule", None),
            lrx.refresh_schedules.Staggered,
        )

    def at(self, state: Pytree, step: int) -> Any:
        """The state as it would be at this step, as far as the refresh schedule is concerned."""
        count = jnp.asarray(step, jnp.int32)
        if hasattr(self.tx, "projection"):
            return state._replace(projection=state.projection._replace(step=count))
        if self.unstacked:
            return (state[0]._replace(count=count), *state[1:])
        return state

    def working_steps(self, shapes: Any) -> list[int]:
        """The steps of a staggered period after the first at which some layer is refreshed."""
        projection = self.tx.projection
        stacks = [
            (projection.phase(view), view.batch[0]) for view in projection.report(shapes).projected
        ]
        schedule = projection.refresh_schedule
        return [
            t
            for t in range(1, PERIOD + 1)
            if any(int(schedule.start(t, phase, n)) < n for phase, n in stacks)
        ]


def cases(rank: int) -> list[Case]:
    """The optimizers of the comparison, at one rank; AdamW is the first."""
    common: dict[str, Any] = {"views": VIEWS}
    bases = lrx.projectors
    stagger = {"refresh_schedule": lrx.refresh_schedules.staggered(period=PERIOD)} | common

    def galore(projector, **options) -> Any:
        return lrx.galore(1e-2, projector=projector, **options)

    dct = lambda kind, T: lrx.dct_adamw(1e-3, rank=rank, refresh_every=T, kind=kind, **common)  # noqa: E731
    contrib = optax.contrib.galore(1e-2, rank, PERIOD, 0.25)
    return [
        Case(name="optax.adamw", tx=optax.adamw(1e-3)),
        Case(name="optax.sgd", tx=optax.sgd(1e-3)),
        Case(name="optax.contrib.galore", tx=contrib, refresh=PERIOD, unstacked=True),
        Case(name="galore (svd)", tx=galore(bases.svd(rank=rank), **common), refresh=PERIOD),
        Case(
            name="galore (power)",
            tx=galore(bases.power(rank=rank), **common),
            refresh=PERIOD,
            aim=True,
        ),
        Case(
            name="galore (randomized)",
            tx=galore(bases.randomized(rank=rank), **common),
            refresh=PERIOD,
            aim=True,
        ),
        Case(name="galore (svd, staggered)", tx=galore(bases.svd(rank=rank), **stagger)),
        Case(name="galore (power, staggered)", tx=galore(bases.power(rank=rank), **stagger)),
        Case(name="dct_adamw (dct3, T=1)", tx=dct(3, 1), every_step=True),
        Case(name="dct_adamw (dct3, T=200)", tx=dct(3, PERIOD), refresh=PERIOD - 1, aim=True),
        Case(name="dct_adamw (dct2, T=1)", tx=dct(2, 1), every_step=True),
        Case(name="dct_adamw (dct2, T=200)", tx=dct(2, PERIOD), refresh=PERIOD - 1, aim=True),
        Case(name="frugal (svd)", tx=lrx.frugal(1e-3, rank=rank, **common), refresh=PERIOD),
        Case(
            name="frugal (columns)",
            tx=lrx.frugal(1e-3, rank=rank, projection="columns", **common),
            refresh=PERIOD,
        ),
        Case(name="ldadam", tx=lrx.ldadam(1e-3, rank=rank, **common), every_step=True),
        Case(name="apollo", tx=lrx.apollo(1e-2, rank=rank, **common), refresh=PERIOD),
    ]


def thin_products(shapes: Any, rank: int) -> tuple[Callable[[], Any], int]:
    """A function that computes `PᵀG` and `P low` of every matrix, and its operations."""
    report = lrx.explain(lrx.galore(1e-2, rank=rank, views=VIEWS), shapes)
    generator = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(generator.standard_normal(shape, np.float32))  # noqa: E731
    operands = [
        (
            normal(*view.batch, view.shrunk, view.rank),
            normal(*view.oriented),
            normal(*view.batch, view.rank, view.kept),
        )
        for view in report.projected
    ]
    operations = sum(4 * basis.size * gradient.shape[-1] for basis, gradient, _ in operands)

    @jax.jit
    def both(operands):
        return [
            (
                jnp.einsum("...sr,...sk->...rk", basis, gradient),
                jnp.einsum("...sr,...rk->...sk", basis, low),
            )
            for basis, gradient, low in operands
        ]

    return lambda: both(operands), operations


def square_product(size: int = 2048) -> tuple[Callable[[], Any], int]:
    """One large square product, which gives the machine's matmul rate, and its operations."""
    x = jnp.asarray(np.random.default_rng(2).standard_normal((size, size), np.float32))
    product = jax.jit(jnp.matmul)
    return lambda: product(x, x), 2 * size**3


def adamw_traffic(shapes: Any) -> Callable[[], Any]:
    """A function that moves what AdamW moves and computes nothing.

    Reads p, g, m, v and writes p, m, v.
    """
    gradient = gradients(shapes)
    holder = [jax.tree.map(jnp.zeros_like, (gradient, gradient, gradient))]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(buffers, gradient):
        return tuple(jax.tree.map(jnp.add, buffer, gradient) for buffer in buffers)

    def run():
        holder[0] = step(holder[0], gradient)
        return holder[0]

    return run
