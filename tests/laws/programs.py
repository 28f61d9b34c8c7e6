"""Random programs: a seed draws shapes, slots and one equality of two forms, which must agree.

    python -m tests.laws.programs --seeds 10000 --results /tmp/programs.jsonl
    python -c "from tests.laws.programs import *; print(check(draw(17)))"

The first is a queue that may be stopped and started again. A `Program` prints as the call that
makes it. Its gradients are `G = X^T Y` with singular values from 4 down to 1 in equal ratios, and
its loss is linear, so that every form, by full or by projected gradients, sees the same ones.

The bound. Let f(d) be the parameters after each step, where d are the gradients, the parameters and
the state before every step. Another form does the same arithmetic in another order. By the rules of
backward error analysis (Higham, Accuracy and Stability, sections 3.1 and 19.3) each of its steps is
the exact step for inputs with relative changes of at most `n u`: u = 2^-24 is the unit roundoff,
and n is

    s + r   for the products `P^T G` and `P R`,
    s r     for the QR or SVD of a refresh,
    k       for sums of squares,
    32      for what is done to single entries: moments, decay, clipping, rates.

Roundings of T n operations that are not aligned with each other add up to `e = 4 sqrt(T n) u`
(Higham and Mary, 2019: exceeded with a probability below 1e-3 for each number). Two forms then
differ by at most 2 e times the condition number of f, and by their own rounding of the parameters.
The condition number holds everything that amplifies: 1 / gap of singular values, eps of Adam, the
conditioning of power steps, the limiter's feedback. It is measured rather than guessed, by a
small-sample statistical estimate (Kenney and Laub, 1994): the reference form runs again on inputs
changed by random signs times h = 2^-15, every input anew before every step, and

    bound = 2 (e / h) max |f(d (1 + h signs)) - f(d)| + 2 e max |f|.

Discontinuous rules (sign, top-k selections, signs of singular vectors, Lion) have no condition
number at a jump. Since h > e, the changed runs jump wherever rounding could. They then differ by
more than `SMOOTH` of what the parameters move, and the gradients are drawn again. What is compared
is thus always smooth on a neighbourhood that is larger than rounding, and no tolerance is loosened
for a sign.

Storage below float32 (bfloat16, 8-bit codes) rounds too often to keep away from every jump: in a
few hundred entries some lie on an edge. There each stored number is changed by one unit of its own
storage, and the difference itself, doubled, is the bound: entries may land on either side of an
edge at every step, and nothing more.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_jax as lrx
from tests.laws.methods import FAST_COMPILE, at
from tests.laws.test_pairs import EXCLUDED

STEPS = 5
UNIT = 2.0**-24
CHANGE = 2.0**-15
SAMPLES = 3
SMOOTH, SMOOTH_STORED = 0.02, 0.3
DRAWS = 12

P, C, T, R, A = lrx.projectors, lrx.refresh_schedules, lrx.transports, lrx.residuals, lrx.inner
_LOW = {"mu_dtype": jnp.bfloat16, "nu_dtype": jnp.bfloat16}
SLOTS: dict[str, dict[str, Any]] = {
    "projector": {
        "svd": P.svd,
        "svd_two_sided": P.svd_two_sided,
        "power": P.power,
        "power_svd": functools.partial(P.power, first="svd", iterations=2),
        "power_mix": functools.partial(P.power, mix=0.9, first="svd"),
        "alternating": P.alternating,
        "randomized": P.randomized,
        "sketch": functools.partial(P.randomized, iterations=0),
        "dct2": functools.partial(P.dct2, norm="l2"),
        "dct3": P.dct3,
        "hadamard": P.hadamard,
        "columns_l1": functools.partial(P.columns, select="l1"),
        "columns_l2": functools.partial(P.columns, select="l2"),
        "columns": P.columns,
        "gaussian": P.random,
        "gaussian_stored": functools.partial(P.random, stored=True),
        "structured": functools.partial(P.random, kind="structured"),
        "orthonormal": functools.partial(P.random, kind="orthonormal"),
        "columns_given": lambda rank: P.columns(select=(0, 2, 3)),
        "identity": lambda rank: P.identity(),
        "svd_bf16": functools.partial(P.svd, dtype=jnp.bfloat16),
        "svd_int8": functools.partial(P.svd, dtype=jnp.int8),
    },
    "refresh_schedule": {
        "every": C.every(period=2),
        "after": C.every(period=2, when="after"),
        "phase": C.every(period=3, phase=1),
        "not_first": C.every(period=2, phase=1, first=False),
        "every_step": C.every_step(),
        "every_step_after": C.every_step(when="after"),
        "never": C.never(),
        "never_after": C.never(when="after"),
        "staggered": C.staggered(period=2),
        "staggered_after": C.staggered(period=2, when="after"),
    },
    "transport": {
        "keep": T.keep(),
        "reset": T.reset(),
        "reset_moments": T.reset(count=False),
        "rotate": T.rotate(),
        "ldadam": T.ldadam(),
    },
    "residual": {
        "discard": R.discard(),
        "sign": R.sign(scale=0.5),
        "sgd": R.sgd(scale=0.5),
        "error_feedback": lrx.targets.error_feedback(),
        "ldadam": lrx.targets.ldadam_error_feedback(),
        "channel": R.gradient_rescale(),
        "tensor": R.gradient_rescale(axis="tensor", limiter=None),
    },
    "inner": {
        "adam": A.adam(),
        "adam_hf": A.adam(convention="hf", eps=1e-2),
        "trace": optax.trace(0.9),
        "lion": optax.scale_by_lion(),
        "rms": optax.scale_by_rms(),
        "amsgrad": optax.scale_by_amsgrad(eps=1e-3),
        "identity": optax.identity(),
        "factored": A.from_optax(optax.scale_by_factored_rms(), params=True),
        "adam_bf16": A.adam(eps=1e-2, **_LOW),
        "stored8": A.stored8(inner=A.adam(eps=1e-2), minimum=0),
    },
}
STORED = {
    "projector": ("svd_bf16", "svd_int8"),
    "inner": ("adam_bf16", "stored8"),
    "dtype": ("bfloat16",),
}
SEEDED = (
    "alternating",
    "power",
    "randomized",
    "sketch",
    "columns",
    "gaussian",
    "gaussian_stored",
    "structured",
    "orthonormal",
    "power_mix",
    "power_svd",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One program and what is to be compared; the defaults are the plainest one.

    Attributes:
      data: seed of parameters and gradients.
      shape: of one matrix, as inputs and outputs.
      stack: batch axes in front.
      fold: whether outputs are two axes, as those of heads.
      dtype: of the parameters.
      projector, refresh_schedule, transport, residual, inner: names in `SLOTS`.
      rank, side, tie, scale, clip_norm, guard: of the projection.
      rate: "number" or "schedule".
      decay, when: of the weights.
      accumulate: microbatches, in forms that take a loss.
      equality: a name in `EQUALITIES`.
    """

    data: int = 0
    shape: tuple[int, int] = (8, 12)
    stack: tuple[int, ...] = ()
    fold: bool = False
    dtype: str = "float32"
    projector: str = "svd"
    rank: int | float = 4
    side: str = "paper"
    tie: str = "rows"
    refresh_schedule: str = "every"
    transport: str = "keep"
    residual: str = "discard"
    inner: str = "adam"
    scale: float = 1.0
    clip_norm: float | None = None
    guard: bool = True
    rate: str = "number"
    decay: float = 0.0
    when: str = "before"
    accumulate: int = 1
    equality: str = "scan"

    def __repr__(self):
        given = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"Program({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"

    @property
    def stored(self) -> bool:
        """Whether something is stored in less than float32."""
        return any(getattr(self, slot) in values for slot, values in STORED.items())

    @property
    def views(self) -> lrx.Views:
        """Which axes of the kernel are which."""
        lead = len(self.stack)
        if lead < 2 and not self.fold:
            return lrx.Views(stacked=("layers/.*",) if lead else ())
        columns = (lead + 1, lead + 2) if self.fold else (lead + 1,)
        view = lrx.MatrixView(batch=tuple(range(lead)), rows=(lead,), cols=columns)
        return lrx.Views(rules=(("layers/kernel.*", view),))

    @property
    def kernel(self) -> tuple[int, ...]:
        """Shape of the projected leaf."""
        rows, columns = self.shape
        return (*self.stack, rows, *((2, columns // 2) if self.fold else (columns,)))

    def build(self, **overrides: Any) -> Any:
        """The optimizer in its optax form."""
        slots = {name: values[getattr(self, name)] for name, values in SLOTS.items()}
        slots["projector"] = slots["projector"](rank=self.rank)
        options = {"scale": self.scale, "side": self.side, "tie": self.tie, "views": self.views}
        options |= {"clip_norm": self.clip_norm, "guard": self.guard, "plain": A.adam(eps=1e-3)}
        rate = 0.05 if self.rate == "number" else optax.linear_schedule(0.05, 0.02, STEPS)
        projection = lrx.projection.Projection(**(slots | options | overrides))
        return lrx.projection.Recipe(
            projection=projection, learning_rate=rate, weight_decay=self.decay, decay=self.when
        ).optax()


@dataclasses.dataclass(frozen=True)
class Data:
    """Parameters, and for each step the factors of the gradients and the gradients themselves."""

    params: Any
    batches: list[Any]
    gradients: list[Any]


def made(program: Program) -> Data:
    """The data of a program, from `program.data` alone."""
    generator = np.random.default_rng(program.data)
    rows, columns = program.shape
    inner = min(rows, columns)
    root = np.sqrt(np.geomspace(4.0, 1.0, inner))[:, None]

    def frame(size: int) -> np.ndarray:
        """Orthonormal rows times roots of the singular values: `(stack..., inner, size)`."""
        normal = generator.normal(size=(*program.stack, size, inner))
        return root * np.swapaxes(np.linalg.qr(normal)[0], -1, -2)

    batches, gradients = [], []
    for _ in range(STEPS):
        x, y, bias = frame(rows), frame(columns), generator.normal(size=columns)
        x, y = (value.astype(np.float32) for value in (x, y))
        product = np.einsum("...qm,...qn->...mn", x.astype(np.float64), y.astype(np.float64))
        batches.append({"x": x, "y": y, "bias": bias.astype(np.float32)})
        gradients.append(_tree(product.reshape(program.kernel), bias, "float32"))
    kernel, bias = 0.1 * generator.normal(size=program.kernel), 0.1 * generator.normal(size=columns)
    return Data(_tree(kernel, bias, program.dtype), batches, gradients)


def _tree(kernel: np.ndarray, bias: np.ndarray, dtype: str) -> Any:
    kernel, bias = (np.asarray(x, jnp.dtype(dtype)) for x in (kernel, bias))
    return {"layers": {"kernel": kernel}, "out": {"bias": bias}}


def loss(params: Any, batch: Any) -> jax.Array:
    """Linear in the parameters: the gradient of a kernel is `X^T Y` of its matrix."""
    kernel, x, y = params["layers"]["kernel"], batch["x"], batch["y"]

    def one(total, part):
        kernel, x, y = part
        return total + jnp.sum(lrx.matmul(x, kernel) * y), None

    value = jnp.sum(params["out"]["bias"] * batch["bias"])
    if x.ndim == 2:
        return one(value, (kernel, x, y))[0]
    return jax.lax.scan(one, value, (kernel, x, y))[0]


def microbatches(batch: Any, count: int) -> Any:
    """The batch in parts along a new first axis, whose mean gradient is that of the batch."""
    split = lambda x: np.stack(np.split(x, count, axis=-2))  # noqa: E731
    bias = np.stack([batch["bias"]] * count)
    return {"x": split(batch["x"]), "y": count * split(batch["y"]), "bias": bias}


# forms: each gives the parameters after every step


def compiled(function: Callable) -> Callable:
    return jax.jit(function, compiler_options=FAST_COMPILE)


def optax_step(tx: Any) -> Callable:
    """`(params, state, gradients) -> (params, state)`."""

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def started(tx: Any, params: Any) -> Any:
    """The state of `init`, made by one program."""
    return compiled(tx.init)(params)


def rolled(step: Callable, params: Any, state: Any, inputs: list[Any]) -> tuple[list[Any], Any]:
    """Parameters after each step, and the last state."""
    trajectory = []
    for given in inputs:
        params, state, *_ = step(params, state, given)
        trajectory.append(params)
    return trajectory, state


def changed(tree: Any, generator: np.random.Generator) -> Any:
    """Every stored number moved by `CHANGE`, or by a unit of its own storage where that is coarser.

    Bases in float32 stay: a changed one is not orthonormal to rounding any more, which a method may
    rely on (a full basis leaves no rest). Changed gradients move them at refreshes.
    """

    def one(path, x):
        x = np.asarray(x)
        signs = generator.choice((-1, 1), size=x.shape)
        if x.dtype in (np.int8, np.uint8):
            limits = np.iinfo(x.dtype)
            return np.clip(x.astype(np.int32) + signs, limits.min, limits.max).astype(x.dtype)
        if x.dtype == jnp.bfloat16:
            return (x.astype(np.float32) * (1 + 2.0**-7 * signs)).astype(x.dtype)
        if x.dtype != np.float32 or any(getattr(key, "name", "") == "basis" for key in path):
            return x
        return (x * (1 + CHANGE * signs)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, tree)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The optax form, compiled step by step, and how far other forms may be from it."""

    program: Program
    data: Data
    tx: Any
    step: Callable
    trajectory: list[Any]
    start: Any
    state: Any
    bounds: list[float]
    smooth: bool


def reference(program: Program) -> Reference:
    """The program on the first data from `program.data` on that keep away from jumps."""
    tx = program.build()
    step, start = compiled(optax_step(tx)), started(tx, made(program).params)
    for draw in range(DRAWS):
        data = made(dataclasses.replace(program, data=program.data + 1_000_003 * draw))
        found = _measured(program, data, tx, step, start)
        if found.smooth:
            break
    return found


def _measured(program: Program, data: Data, tx: Any, step: Callable, start: Any) -> Reference:
    trajectory, state = rolled(step, data.params, start, data.gradients)
    generator = np.random.default_rng(1)
    differences = np.zeros(STEPS)
    for _ in range(SAMPLES):
        params, moved = data.params, start
        for number, gradients in enumerate(data.gradients):
            params, moved = step(*(changed(tree, generator) for tree in (params, moved, gradients)))
            differences[number] = max(differences[number], distance(params, trajectory[number]))
    size = max(largest(params) for params in trajectory)
    travelled = distance(trajectory[-1], data.params)
    rounding = 2 * 4 * np.sqrt(operations(program)) * UNIT
    factor = 2.0 if program.stored else rounding / CHANGE
    bounds = np.maximum.accumulate(factor * differences + rounding * size)
    limit = SMOOTH_STORED if program.stored else SMOOTH
    smooth = np.isfinite(bounds).all() and differences.max() <= limit * travelled
    return Reference(
        program, data, tx, step, trajectory, start, state, bounds.tolist(), bool(smooth)
    )


def operations(program: Program) -> int:
    """`T n` of the module's docstring."""
    s, k = min(program.shape), max(program.shape)
    if program.side in ("larger", "rows", "cols"):
        s = k
    rank = s if isinstance(program.rank, float) else program.rank
    return STEPS * (s + rank + s * rank + k + 32)


def distance(a: Any, b: Any) -> float:
    """The largest difference between entries, infinite where one is not finite."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    apart = max(
        np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max() for x, y in pairs
    )
    return float(apart) if np.isfinite(apart) else np.inf


def largest(tree: Any) -> float:
    return max(float(np.abs(np.asarray(x, np.float64)).max()) for x in jax.tree.leaves(tree))


# equalities: the trajectory that must be the reference's


def by_scan(ref: Reference) -> Any:
    """One program of all steps."""

    def run(params, state, gradients):
        def body(carry, gradients):
            params, state = optax_step(ref.tx)(*carry, gradients)
            return (params, state), params

        return jax.lax.scan(body, (params, state), gradients)

    stacked = jax.tree.map(lambda *x: np.stack(x), *ref.data.gradients)
    (_, state), trajectory = compiled(run)(ref.data.params, ref.start, stacked)
    return [at(trajectory, i) for i in range(STEPS)], state


def eager(ref: Reference) -> Any:
    """No compilation at all, two steps of it."""
    with jax.disable_jit():
        state = ref.tx.init(ref.data.params)
        return rolled(optax_step(ref.tx), ref.data.params, state, ref.data.gradients[:2])[0], None


def layers_one_by_one(ref: Reference) -> Any:
    """The matrices of a stack as leaves of their own."""
    program, count = ref.program, int(np.prod(ref.program.stack))
    rest = ref.program.kernel[len(program.stack) :]

    def split(tree):
        layers = np.reshape(tree["layers"]["kernel"], (count, *rest))
        return {"layers": {f"kernel{i}": layers[i] for i in range(count)}, "out": tree["out"]}

    def join(tree):
        layers = [tree["layers"][f"kernel{i}"] for i in range(count)]
        return {"layers": {"kernel": np.reshape(layers, program.kernel)}, "out": tree["out"]}

    columns = (1, 2) if program.fold else (1,)
    views = lrx.Views(rules=(("layers/kernel.*", lrx.MatrixView(rows=(0,), cols=columns)),))
    tx = program.build(views=views)
    params = split(ref.data.params)
    step = compiled(optax_step(tx))
    return [
        join(t)
        for t in rolled(step, params, started(tx, params), [split(g) for g in ref.data.gradients])[
            0
        ]
    ], None


def transposed(ref: Reference) -> Any:
    """Weights and gradients transposed, and sides with them."""
    other = {"rows": "cols", "cols": "rows"}
    program = ref.program
    tx = program.build(side=other.get(program.side, program.side), tie=other[program.tie])

    def flip(tree):
        return {
            "layers": {"kernel": np.swapaxes(tree["layers"]["kernel"], -1, -2)},
            "out": tree["out"],
        }

    params = flip(ref.data.params)
    step = compiled(optax_step(tx))
    found, state = rolled(step, params, started(tx, params), [flip(g) for g in ref.data.gradients])
    return [flip(params) for params in found], state


def among_neighbours(ref: Reference) -> Any:
    """Beside other matrices, and a part that another optimizer has."""
    extra = np.random.default_rng(3).normal(size=(STEPS + 1, 6, 10)).astype(np.float32)

    def wide(tree, number):
        more = np.asarray(extra[number], jnp.dtype(ref.program.dtype))
        return tree | {"other": {"kernel": more}, "theirs": {"kernel": more}}

    def label(path, _):
        return "theirs" if path[0].key == "theirs" else "ours"

    params = wide(ref.data.params, STEPS)
    labels = jax.tree_util.tree_map_with_path(label, params)
    # a neighbour of Hadamard bases would have to have a power of two, so there it is plain
    other = None if ref.program.projector == "hadamard" else lrx.MatrixView()
    views = ref.program.views
    views = dataclasses.replace(views, rules=(*views.rules, ("other/kernel", other)))
    make = SLOTS["projector"][ref.program.projector]
    projector = make(rank=(("other/.*", 2), (".*", ref.program.rank)))
    ours = ref.program.build(views=views, projector=projector)
    tx = optax.partition({"ours": ours, "theirs": optax.sgd(0.1)}, labels)
    step = compiled(optax_step(tx))
    gradients = [wide(g, i) for i, g in enumerate(ref.data.gradients)]
    found, _ = rolled(step, params, started(tx, params), gradients)
    return [{name: tree[name] for name in ("layers", "out")} for tree in found], None


def fused(ref: Reference) -> Any:
    """In place, layer by layer, from the same gradients."""
    form = lrx.fused(ref.tx)
    step = compiled(lambda params, state, gradients: form.step(params, gradients, state))
    return rolled(step, ref.data.params, ref.start, ref.data.gradients)


def _train(ref: Reference, backprop: str) -> Any:
    count = ref.program.accumulate
    step = compiled(lrx.train_step(loss, ref.tx, accumulate=count, backprop=backprop))
    batches = [batch if count == 1 else microbatches(batch, count) for batch in ref.data.batches]
    return rolled(step, ref.data.params, ref.start, batches)


def full(ref: Reference) -> Any:
    """`train_step` with full gradients."""
    return _train(ref, "full")


def projected(ref: Reference) -> Any:
    """`train_step` with projected gradients, where the method reads no more."""
    return _train(ref, "projected")


def layerwise(ref: Reference) -> Any:
    """Each layer inside the backward pass; the activation carries the layers' data, the number of
    the layer and the sum so far."""
    (count,), (rows, columns) = ref.program.stack, ref.program.shape
    microbatch = min(rows, columns) // ref.program.accumulate
    sizes = (count * microbatch * rows, count * microbatch * columns)

    def before(rest, batch):
        bias = jnp.sum(rest["out"]["bias"] * batch["bias"])
        return jnp.concatenate(
            [batch["x"].reshape(-1), batch["y"].reshape(-1), jnp.stack([jnp.zeros(()), bias])]
        )

    def layer(own, carried):
        number = jax.lax.stop_gradient(carried[-2]).astype(jnp.int32)
        x = carried[: sizes[0]].reshape(count, microbatch, rows)[number]
        y = carried[sizes[0] : sum(sizes)].reshape(count, microbatch, columns)[number]
        value = carried[-1] + jnp.sum(lrx.matmul(x, own["kernel"]) * y)
        return carried.at[-2:].set(jnp.stack([carried[-2] + 1, value]))

    stack = lrx.projection.Stack(before=before, layer=layer, after=lambda rest, x, batch: x[-1])
    accumulate = ref.program.accumulate
    step = compiled(lrx.layerwise_step(stack, ref.tx, accumulate=accumulate))
    batches = [
        batch if accumulate == 1 else microbatches(batch, accumulate) for batch in ref.data.batches
    ]
    return rolled(step, ref.data.params, ref.start, batches)


def multi_steps(ref: Reference) -> Any:
    """`optax.MultiSteps` over two halves of each gradient."""
    tx = optax.MultiSteps(ref.tx, 2).gradient_transformation()
    step = compiled(optax_step(tx))

    def scaled(gradients, part):
        return jax.tree.map(lambda g: np.float32(part) * g, gradients)

    parts = [scaled(gradients, part) for gradients in ref.data.gradients for part in (0.5, 1.5)]
    found, state = rolled(step, ref.data.params, started(tx, ref.data.params), parts)
    return found[1::2], state.inner_opt_state


def skipping(ref: Reference) -> Any:
    """With a bad gradient before every good one, which leaves no trace but a count: bitwise."""
    step, params, state, found = ref.step, ref.data.params, ref.start, []
    for gradients in ref.data.gradients:
        bad = jax.tree.map(lambda g: np.full_like(g, np.nan), gradients)
        params, state = step(params, state, bad)
        params, state = step(params, state, gradients)
        found.append(params)
    assert int(state.projection.skipped) == STEPS
    assert all(distance(a, b) == 0 for a, b in zip(found, ref.trajectory, strict=True)), (
        "skipped steps left a trace"
    )
    return found, state


def one_matrix(ref: Reference) -> Any:
    """The hook for the plain reference of one matrix, without mesh or guard, once there is one."""
    raise NotImplementedError


def _loss_takes(p: Program) -> bool:
    return len(p.stack) < 2 and not p.fold


EQUALITIES: dict[str, tuple[Callable, Callable[[Program], bool]]] = {
    # name: (the other form, whether a program has it)
    "scan": (by_scan, lambda p: True),
    "eager": (eager, lambda p: True),
    "stack": (
        layers_one_by_one,
        lambda p: bool(p.stack) and p.projector not in SEEDED and "stagg" not in p.refresh_schedule,
    ),
    "transposed": (transposed, lambda p: not p.fold),
    "neighbours": (
        among_neighbours,
        lambda p: p.clip_norm is None and p.projector != "columns_given",
    ),
    "fused": (fused, lambda p: p.dtype == "float32"),
    "full": (full, lambda p: _loss_takes(p) and p.dtype == "float32"),
    "projected": (projected, lambda p: _loss_takes(p) and p.dtype == "float32"),
    "layerwise": (
        layerwise,
        lambda p: len(p.stack) == 1 and _loss_takes(p) and p.dtype == "float32",
    ),
    "multi_steps": (multi_steps, lambda p: True),
    "skipping": (skipping, lambda p: p.guard),
}


# drawing

CHOICES: dict[str, tuple] = {
    "shape": ((8, 12), (12, 8), (8, 8), (4, 16), (6, 10)),
    "stack": ((), (3,), (3,), (2, 2)),
    "fold": (False, False, False, True),
    "dtype": ("float32",) * 7 + ("bfloat16",),
    "rank": (1, 2, 3, 4, 0.5, 1.0),
    "side": ("paper", "paper", "larger", "rows", "cols"),
    "tie": ("rows", "cols"),
    "scale": (1.0, 0.25),
    "clip_norm": (None, None, 1.0),
    "guard": (True, True, True, False),
    "rate": ("number", "schedule"),
    "decay": (0.0, 0.3),
    "when": ("before", "after"),
    "accumulate": (1, 1, 2),
} | {slot: tuple(values) for slot, values in SLOTS.items()}


# the eager form costs ten times the others and stands in laws of its own
WEIGHTS = {"eager": 0.3, "skipping": 2, "neighbours": 2}


def candidates(seed: int) -> Iterator[Program]:
    """The programs of a seed in the order in which they are tried: slots that have its equality."""
    generator = np.random.default_rng((15, seed))
    weights = np.asarray([WEIGHTS.get(name, 3) for name in EQUALITIES], float)
    equality = str(generator.choice(list(EQUALITIES), p=weights / weights.sum()))
    if equality == "eager" and generator.integers(4):
        equality = "scan"
    while True:
        fields = {name: values[generator.integers(len(values))] for name, values in CHOICES.items()}
        if equality not in ("full", "projected", "layerwise"):
            fields["accumulate"] = 1
        program = Program(data=seed, equality=equality, **fields)
        if EQUALITIES[equality][1](program):
            yield program


# what a program may be refused for, beside the pairs of the all-pairs table
REFUSED = (*EXCLUDED.values(), "rank=.* exceeds", "registered first moments")


def is_named(message: str) -> bool:
    """Whether the error of a refused program is one of those that are expected."""
    return any(re.search(pattern, message) for pattern in REFUSED)


def refusal(program: Program) -> str | None:
    """The error of `init`, or None."""
    try:
        jax.eval_shape(program.build().init, made(program).params)
    except ValueError as error:
        return str(error)
    return None


def degenerate(program: Program) -> bool:
    """Whether numbers are rounding by construction, of which a rule without eps makes signs.

    A two-sided basis makes R diagonal at a refresh: all else in it is rounding. Inner rules that
    divide by the size of what they see are those with a small eps, or none.
    """
    return program.projector == "svd_two_sided" and program.inner in (
        "adam",
        "lion",
        "rms",
        "factored",
    )


@functools.cache
def draw(seed: int) -> Program:
    """The first program of a seed that the library takes."""
    return next(p for p in candidates(seed) if not degenerate(p) and refusal(p) is None)


# checking


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program went.

    Attributes:
      program: what ran.
      ratio: the largest difference over its bound; above 1 is a failure.
      bound: at the last step, over what the parameters moved.
      smooth: False where no data were found that keep away from jumps; nothing was compared then.
      error: what was raised, or "".
    """

    program: Program
    ratio: float
    bound: float
    smooth: bool
    error: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.error) or (self.smooth and not self.ratio <= 1)


def _check_state(state: Any, ref: Reference) -> None:
    """Forms share the state and its counts; a transposed one has its own shapes."""
    for name in ("step", "refreshes"):
        own, expected = (int(getattr(s.projection, name)) for s in (state, ref.state))
        assert own == expected, f"{name}: {own} and {expected}"
    if ref.program.equality != "transposed":
        own, expected = (jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (state, ref.state))
        assert own == expected, "the states differ in structure, shapes or dtypes"


def check(program: Program) -> Outcome:
    """Runs both forms of a program and compares them."""
    try:
        ref = reference(program)
        bound = ref.bounds[-1] / max(distance(ref.trajectory[-1], ref.data.params), 1e-30)
        if not ref.smooth:
            return Outcome(program, 0.0, bound, False)
        found, state = EQUALITIES[program.equality][0](ref)
        pairs = zip(found, ref.trajectory, ref.bounds, strict=False)
        ratio = max(distance(own, expected) / limit for own, expected, limit in pairs)
        if state is not None:
            _check_state(state, ref)
        return Outcome(program, ratio, bound, True)
    except Exception as error:  # any error of an accepted program is a finding
        return Outcome(program, np.inf, np.inf, True, f"{type(error).__name__}: {error}")


def shrunk(
    program: Program, fails: Callable[[Program], bool] = lambda program: check(program).failed
) -> Program:
    """The smallest program that still fails: each field goes back to its default where it does."""
    again = True
    while again:
        again = False
        for field in dataclasses.fields(Program):
            smaller = dataclasses.replace(program, **{field.name: field.default})
            if (
                field.name == "equality"
                or smaller == program
                or not EQUALITIES[program.equality][1](smaller)
            ):
                continue
            if refusal(smaller) is None and not degenerate(smaller) and fails(smaller):
                program, again = smaller, True
    return program


def _seeds_in(results: Path) -> set[int]:
    """The seeds of a file of results; a last line that was cut off is taken away."""
    text = results.read_text() if results.exists() else ""
    whole, _, cut = text.rpartition("\n")
    if cut:
        results.write_text(f"{whole}\n" if whole else "")
    return {json.loads(line)["seed"] for line in whole.splitlines()}


def main() -> None:
    """A queue over seeds: a result is a line of the file, and seeds that have one are left out."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="run the seeds below this number")
    parser.add_argument("--first", type=int, default=0, help="from this one on")
    parser.add_argument(
        "--results", type=Path, required=True, help="file of results, one JSON object a line"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    options = parser.parse_args()
    done = _seeds_in(options.results)
    start, outcomes = time.monotonic(), []

    def report():
        failed = sum(outcome.failed for outcome in outcomes)
        unsettled = sum(not outcome.smooth for outcome in outcomes)
        seconds = time.monotonic() - start
        print(
            f"{len(outcomes)} seeds, {failed} failed, {unsettled} unsettled, {seconds:.0f} s",
            flush=True,
        )

    for seed in (seed for seed in range(options.first, options.seeds) if seed not in done):
        if time.monotonic() - start > options.seconds:
            break
        before = time.process_time()
        outcome = check(draw(seed))
        outcomes.append(outcome)
        record = {"seed": seed} | dataclasses.asdict(outcome) | {"failed": outcome.failed}
        record["program"] = repr(outcome.program)
        record["cpu_seconds"] = round(time.process_time() - before, 3)
        with options.results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if outcome.failed:
            print(f"seed {seed}: {outcome.ratio:.3g} times the bound {outcome.error}")
            print(f"  {outcome.program!r}\n  smallest: {shrunk(outcome.program)!r}", flush=True)
        if len(outcomes) % 50 == 0:
            jax.clear_caches()
            report()
    report()


if __name__ == "__main__":
    main()
