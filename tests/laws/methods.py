"""The table of methods: every value of every slot of the projection transformation is in at least
one row.

Every row is tested by every law. A row's program is compiled once: a `lax.scan` over steps whose
body is a `lax.cond`, with parameters and state donated, so that it alone is evidence for scan,
cond, donation and stable shapes. "Eager" is `jax.disable_jit`, in which conditions are Python's.
"""

import dataclasses
import functools
import inspect
import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lrx
from tests.laws.own_inner import SplitMomentum

STEPS = 6
VIEWS = lrx.Views(stacked=("stack/.*",))
SHAPES = {"dense": {"bias": (12,), "kernel": (8, 12)}, "stack": {"kernel": (3, 8, 8)}}
BASIS = np.linalg.qr(np.random.default_rng(5).normal(size=(8, 4)))[0].astype(np.float32)
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """One row.

    Attributes:
      factory, options: the call that makes the transformation.
      due: the steps below STEPS at which the basis moves.
      seeded: its basis depends on keys, and so on the path of a leaf and its place in a stack.
      fast: it also runs in the fast tier.
      tolerance: between two programs; larger where state is rounded to bfloat16.
      idle: first steps, which look at gradients and move nothing.
      gradients: what `lrx.projection.gradient_mode` says of a named optimizer by its defaults.
      elsewhere: options of the named optimizer on the trees of other tests, see `settings`.
    """

    name: str
    factory: Callable
    options: dict[str, Any]
    due: tuple[int, ...] = (0, 2, 4)
    seeded: bool = False
    fast: bool = False
    tolerance: float = 1e-4
    idle: int = 0
    gradients: str = "full"
    elsewhere: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def named(self) -> bool:
        return self.factory is not lrx.scale_by_projection

    def build(self, **overrides):
        options = {"views": VIEWS} | self.options | overrides
        return (
            self.factory(options.pop("learning_rate"), **options)
            if self.named
            else self.factory(**options)
        )

    def settings(self, *kept: str, rank: int, **given: Any) -> dict[str, Any]:
        """Options of the named optimizer for another tree, its own defaults beside them.

        Args:
          kept: options of the row that stay, beside those that have no default.
          rank: in place of the row's, where it has one.
          given: further options.
        """
        parameters = inspect.signature(self.factory).parameters.values()
        needed = {one.name for one in parameters if one.default is one.empty}
        own = {key: value for key, value in self.options.items() if key in {*needed, *kept}}
        rank_of = {"rank": rank} if isinstance(self.options.get("rank"), int) else {}
        return own | rank_of | self.elsewhere | given


_FIELDS = {field.name for field in dataclasses.fields(Method)}


def _row(factory, name, defaults, given):
    """A row of fields and options, which have no name in common."""
    fields = {key: value for key, value in given.items() if key in _FIELDS}
    options = {key: value for key, value in given.items() if key not in _FIELDS}
    return Method(name=name, factory=factory, options=defaults | options, **fields)


def _named(factory, name, **given):
    return _row(factory, name, {"learning_rate": 0.1, "weight_decay": 0.1}, given)


def _custom(name, projector, **given):
    schedule = {"refresh_schedule": lrx.refresh_schedules.every(period=2)}
    return _row(lrx.scale_by_projection, name, {"projector": projector} | schedule, given)


P, C, T, R = lrx.projectors, lrx.refresh_schedules, lrx.transports, lrx.residuals
G, K = lrx.targets, lrx.rank_schedules
ALL = tuple(range(STEPS))
_galore = functools.partial(_named, lrx.galore, refresh_every=2)
_frugal = functools.partial(_named, lrx.frugal, refresh_every=2)
_apollo = functools.partial(_named, lrx.apollo, refresh_every=2, seeded=True)
_tsr = functools.partial(P.randomized_two_sided, iterations=0)
_tucker = functools.partial(P.tucker, iterations=0)
_low_bits = lrx.inner.adam(mu_dtype=jnp.bfloat16, nu_dtype=jnp.bfloat16)
_decayed_trace = lrx.inner.from_optax(optax.trace(0.9), decay=(("first", 0.9),))
_factored = lrx.inner.from_optax(optax.scale_by_factored_rms(), params=True)


def _only_dense(params):
    """A mask of whole subtrees."""
    return {name: name == "dense" for name in params}


METHODS = (
    _galore("galore", rank=4, fast=True, gradients="full at a refresh"),
    _galore("galore-reverse_std", rank=4, proj_type="reverse_std"),
    _galore("galore-left", rank=0.5, proj_type="left"),
    _galore("galore-right", rank=(("dense/.*", 2), (".*", 0.5)), proj_type="right"),
    # R is diagonal: a small eps amplifies rounding
    _galore("galore-full", rank=4, proj_type="full", eps=1e-2),
    _galore("galore-full-rotate", rank=4, proj_type="full", eps=1e-2, transport=T.rotate()),
    _galore("galore-power", projector=P.power(rank=4, iterations=2), seeded=True),
    _galore("galore-randomized", projector=P.randomized(rank=4), seeded=True),
    _galore("galore-dct", projector=P.dct(rank=4)),
    _galore("galore-svd-bf16", projector=P.svd(rank=4, dtype=jnp.bfloat16), inner=_low_bits, tolerance=2e-3),
    _galore("galore-adafactor", rank=4, inner=lrx.inner.adafactor(b1=0.9)),
    _galore("galore-adam_mini", rank=4, inner=lrx.inner.adam_mini(eps=1e-6, convention="hf")),
    _named(lrx.dct_adamw, "dct_adamw", rank=4, due=ALL),
    _named(lrx.dct_adamw, "dct_adamw-dct2", rank=4, kind=2, norm="l2", refresh_every=3, due=(0, 2, 5)),
    _named(lrx.dct_adamw, "dct_adamw-ef", rank=4, error_feedback=True, refresh_every=3, due=(0, 2, 5)),
    _named(lrx.dct_adamw, "dct_adamw-keep", rank=4, rotate=False, refresh_every=2, due=(0, 1, 3, 5)),
    _named(lrx.dct_adamw, "dct_adamw-decays", rank=4, due=ALL, weight_decay=optax.linear_schedule(0.4, 0.0, STEPS),
           mask=_only_dense),
    _frugal("frugal"),
    _frugal("frugal-columns", rank=0.5, projection="columns", seeded=True, fast=True),
    _frugal("frugal-random", rank=4, projection="random", rule="discard", seeded=True),
    _frugal("frugal-rho0", rank=0, due=()),
    _frugal("frugal-rho0-sgd", rank=0, rule="sgd", inactive_scale=0.5, due=()),
    _frugal("frugal-sgd", rule="sgd", inactive_scale=0.5, reset=False),
    _frugal("frugal-sgdm", inner=optax.trace(0.9), active_scale=0.5),
    _named(lrx.ldadam, "ldadam", rank=4, due=ALL, fast=True),
    _named(lrx.ldadam, "ldadam-no-ef", rank=4, error_feedback=False, first="range", due=ALL, seeded=True),
    _apollo("apollo", rank=4),
    _named(lrx.apollo, "apollo-svd", refresh_every=2, projection="svd"),  # rank by its default
    _apollo("apollo-tensor", projector=P.svd(rank=4), axis="tensor", limiter=None),
    _named(lrx.apollo_mini, "apollo_mini", refresh_every=2, seeded=True),
    _named(lrx.muon, "muon", due=(), gradients="taps", scale=lrx.scales.rms()),  # fans are swapped in a transpose
    _named(lrx.normuon, "normuon", due=(), gradients="taps"),
    # plain leaves too, and a side that is too long for a basis; a small eps amplifies rounding
    _named(lrx.soap, "soap", due=(), idle=1, refresh_every=2, max_precond_dim=8, eps=1e-2,
           plain=lrx.inner.soap(max_precond_dim=8, eps=1e-2), gradients="taps", elsewhere={"first": "identity"}),
    _named(lrx.golore, "golore", rank=4, refresh_every=2, random_from=3, seeded=True, gradients="full at a refresh"),
    _named(lrx.natural_galore, "natural_galore", rank=4, refresh_every=2, history=2, damping=0.1,
           gradients="full at a refresh"),
    _named(lrx.flora, "flora", rank=4, refresh_every=2, seeded=True),
    # R is diagonal: a small eps amplifies rounding
    _named(lrx.tsr_adam, "tsr_adam", projector=_tsr(rank=4), refresh_every=4, due=(0, 4), eps=1e-2, seeded=True,
           gradients="full at a refresh", elsewhere={"projector": _tsr(rank=0.3), "eps": 1e-2}),
    _named(lrx.tensor_galore, "tensor_galore", projector=_tucker(rank=4), refresh_every=4, due=(0, 4),
           eps=1e-2, gradients="full at a refresh", elsewhere={"projector": _tucker(rank=0.3), "eps": 1e-2}),
    _named(lrx.rso, "rso", rank=4, refresh_every=2, due=(1, 3, 5), eps=1e-3, seeded=True, gradients="taps"),
    # any direction is near enough: the period doubles at the second refresh
    _named(lrx.q_galore, "q_galore", rank=4, refresh_every=2, threshold=0.0, queue=1, due=(0, 2), eps=1e-3,
           gradients="full at a refresh", tolerance=2e-3),
    _named(lrx.fira, "fira", rank=4, refresh_every=2),
    _named(lrx.fira, "fira-paper", rank=4, refresh_every=2, form="paper", limiter=None),
    _named(lrx.subtrack, "subtrack", rank=4, refresh_every=2, step_size=0.01, elsewhere={"step_size": 0.01}),
    # gradients of other tests have fewer directions than a matrix has, and the others are not determined
    _named(lrx.conda, "conda", refresh_every=2, gradients="full at a refresh",
           elsewhere={"projector": P.svd(rank=2, momentum=0.9)}),
    _named(lrx.coap, "coap", rank=4, refresh_every=1, due=ALL, recalibrate_every=3, seeded=True),
    # any direction is near enough: a basis moves at every look
    _named(lrx.lotus, "lotus", rank=4, gap=3, threshold=1.0, seeded=True, gradients="full at a refresh"),
    _named(lrx.mofasgd, "mofasgd", rank=3, due=(), gradients="taps"),
    _named(lrx.racs, "racs", due=(), gradients="taps"),
    _named(lrx.alice, "alice", rank=4, refresh_every=3, leading=2, due=(0, 2, 5), seeded=True),
    # a scale that does not tell inputs from outputs, for the law of transposition
    _named(lrx.dion, "dion", rank=4, scale=lrx.scales.rms(0.2), due=ALL, seeded=True),
    _named(lrx.dion2, "dion2", scale=lrx.scales.rms(0.2), due=ALL),
    _named(lrx.dion3, "dion3", due=ALL),
    _named(lrx.trion, "trion", rank=4, kind=3, scale=lrx.scales.rms(0.2), due=ALL),
    _named(lrx.online_subspace_descent, "online_subspace_descent", rank=4, refresh_every=10, due=ALL, peak_rate=0.1,
           elsewhere={"peak_rate": 1e-2, "refresh_every": 5}),
    _named(lrx.online_subspace_descent, "online_subspace_descent-sgd", rank=4, refresh_every=10, due=ALL, seeded=True,
           basis_optimizer="sgd", first="random", peak_rate=0.05),
    _custom("columns-l2", P.columns(rank=4, select="l2"), transport=T.reset(count=False)),
    _custom("columns-l1-rotate", P.columns(rank=4, select="l1"), transport=T.rotate(), residual=R.sign(scale=0.1)),
    _custom("columns-given", P.columns(select=(1, 2, 5, 9)), due=(), inner=optax.scale_by_rms()),
    _custom("hadamard-lion", P.hadamard(rank=4), inner=optax.scale_by_lion(), transport=T.rotate()),
    _custom("structured-trace", P.random(rank=4, kind="structured"), inner=optax.trace(0.9), seeded=True),
    _custom("gaussian-stored", P.random(rank=4, stored=True, dtype=jnp.bfloat16), seeded=True, side="larger"),
    _custom("given-amsgrad", P.given(matrix=BASIS), due=(), inner=optax.scale_by_amsgrad(), transport=T.rotate()),
    _custom("identity-factored", P.identity(), due=(), inner=_factored, residual=R.sgd()),
    _custom("staggered", P.svd(rank=4), refresh_schedule=C.staggered(period=2), transport=T.rotate(), due=ALL),
    # any direction is near enough: the period doubles at the second refresh
    _custom("lazy", P.svd(rank=4), refresh_schedule=C.lazy(period=2, threshold=0.0, queue=1), due=(0, 2)),
    _custom("ranked-energy", P.ranked(projector=P.dct(rank=4), schedule=K.energy(share=0.5)), due=(0, 2, 3),
            refresh_schedule=C.piecewise(periods={0: 2, 3: 4})),
    _custom("never", P.dct2(rank=4), refresh_schedule=C.never(), due=(0,), plain=optax.scale_by_rms()),
    _custom("after", P.svd(rank=4), refresh_schedule=C.every(period=2, phase=1, when="after"),
            inner=optax.scale_by_rms(), transport=T.rotate(), due=(0, 1, 3, 5)),
    _custom("not-first", P.random(rank=4, kind="orthonormal"), refresh_schedule=C.every(period=2, first=False, phase=1),
            due=(1, 3, 5), seeded=True, tie="cols", seed=7),
    _custom("ldadam-slots", P.power(rank=4, first="svd"), refresh_schedule=C.every_step(when="after"),
            transport=T.ldadam(), target=G.ldadam_error_feedback(dtype=jnp.bfloat16), due=ALL, side="cols",
            tolerance=2e-3, seeded=True),
    _custom("own-inner", P.svd(rank=4), inner=SplitMomentum(), plain=lrx.inner.adam(), transport=T.rotate()),
    _custom("clipped", P.dct3(rank=4), target=G.error_feedback(), clip_norm=0.5, inner=_decayed_trace, scale=0.5),
)  # fmt: skip

# The named optimizers, each by the first of its rows: other tests take them from here.
NAMED = {row.name: row for row in METHODS if row.named and row.name == row.factory.__name__}

# Of samplers, whose laws are `test_samplers.py`: few layers have states, and all others none.
SAMPLED = {
    "lisa": functools.partial(lrx.lisa, active=2, period=3, weight_decay=0.1),
    "badam": functools.partial(lrx.badam, period=2, order="ascending", weight_decay=0.1),
    "badam-random": functools.partial(lrx.badam, period=2, order="random", phase=1),
    "owlore": functools.partial(
        lrx.owlore,
        rank=3,
        active=2,
        period=3,
        refresh_every=2,
        weights=(0.5, 0.1, 0.3, 0.2),
        weight_decay=0.1,
    ),
    # GaLore on the active layers: its bases are made at a draw, and again two steps later
    "galore": functools.partial(
        lrx.galore,
        rank=3,
        refresh_every=2,
        weight_decay=0.1,
        sampler=lrx.samplers.lisa(active=2, period=3),
    ),
}
SAMPLING = {row.func.__name__ for row in SAMPLED.values()} - NAMED.keys()

COUPLED = {"clipped": "clip_norm couples leaves on purpose"}


def rows(*, unless: Callable[[Method], Any] = lambda method: False):
    """The table as pytest parameters; rows that are not fast are marked slow."""
    return [
        pytest.param(method, id=method.name, marks=() if method.fast else pytest.mark.slow)
        for method in METHODS
        if not unless(method)
    ]


def every_method(*, unless: Callable[[Method], Any] = lambda method: False):
    return pytest.mark.parametrize("method", rows(unless=unless))


def tree(seed: int, dtype=np.float32, steps: int | None = None, shapes=SHAPES):
    """Normal leaves of the given shapes, with a leading steps axis if asked."""
    generator = np.random.default_rng(seed)
    lead = () if steps is None else (steps,)
    return jax.tree.map(
        lambda shape: jnp.asarray(generator.normal(size=lead + shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def params_like(dtype=np.float32):
    return tree(0, dtype)


def gradients():
    return tree(1, steps=STEPS)


def at(trees, step: int):
    return jax.tree.map(lambda x: x[step], trees)


def stores_floats(method: Method) -> bool:
    """Whether a basis holds more than indices."""
    state = jax.eval_shape(method.build().init, params_like())
    is_matrix = lambda x: isinstance(x, lrx.projection.MatrixState)  # noqa: E731
    nodes = jax.tree.leaves(projection_state(state).matrices, is_leaf=is_matrix)
    bases = jax.tree.leaves([node.basis for node in nodes if is_matrix(node)])
    return any(jnp.issubdtype(basis.dtype, jnp.floating) for basis in bases)


def copy(trees):
    return jax.tree.map(jnp.copy, trees)


def eager(function: Callable, *args):
    """`function(*args)` without any compilation of conditions or loops."""
    with jax.disable_jit():
        return function(*args)


@functools.cache
def program(method: Method):
    """`(transformation, run, traces)`: `run(params, state, grads, live) -> ((params, state),
    (updates, states))`."""
    transformation = method.build()
    traces: list[int] = []

    def run(params, state, grads, live):
        traces.append(1)

        def body(carry, step):
            params, state = carry
            grad, alive = step
            zeros = jax.tree.map(jnp.zeros_like, params)
            updates, state = jax.lax.cond(
                alive, lambda: transformation.update(grad, state, params), lambda: (zeros, state)
            )
            return (optax.apply_updates(params, updates), state), (updates, state)

        return jax.lax.scan(body, (params, state), (grads, live))

    return (
        transformation,
        jax.jit(run, donate_argnums=(0, 1), compiler_options=FAST_COMPILE),
        traces,
    )


def run(method: Method, grads, live=None):
    """The trajectory of a row: `(params, state)` at the end and `(updates, states)` of every
    step."""
    transformation, compiled, _ = program(method)
    params = params_like()
    state = eager(transformation.init, params)
    live = jnp.ones(STEPS, bool) if live is None else jnp.asarray(live)
    return compiled(copy(params), state, grads, live)


@functools.cache
def trajectory(method: Method):
    return run(method, gradients())


def projection_state(state) -> lrx.projection.ProjectionState:
    return state if isinstance(state, lrx.projection.ProjectionState) else state.projection


def same(a, b) -> bool:
    """Equal structure, dtypes and bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(_bits(x), _bits(y)) for x, y in pairs)


def _bits(x):
    return np.ascontiguousarray(np.asarray(x)).view(np.uint8)


def assert_close(a, b, tolerance=2e-5):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(
            x,
            y,
            rtol=10 * tolerance,
            atol=tolerance * max(1.0, np.abs(y).max(initial=0)),
            err_msg=jax.tree_util.keystr(path),
        )


def assert_finite(trees):
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        assert np.all(np.isfinite(np.asarray(leaf, np.float32))), jax.tree_util.keystr(path)


def fingerprint() -> str:
    """CRC32 of the traced programs of every row; addresses of functions do not count."""
    total = 0
    for method in METHODS:
        transformation, params = method.build(), params_like()
        state = jax.eval_shape(transformation.init, params)
        for jaxpr in (
            jax.make_jaxpr(transformation.init)(params),
            jax.make_jaxpr(transformation.update)(params, state, params),
        ):
            text = re.sub(r"0x[0-9a-f]+", "", str(jaxpr)) + "".join(
                str(np.asarray(const)) for const in jaxpr.consts
            )
            total = zlib.crc32(text.encode(), total)
    return f"{total:08x}"
