"""Kernels in divided programs against XLA's own, compiled for four chips not there.

The chips are a v5e:2x2.

    python -m experiments.benchmarks.divided_kernels     with `.venv-tpu/bin/python`: needs libtpu

Replaces "divided" in `experiments/results/kernels.json`, a row for each program; nothing is run.
XLA's program is the library's own with implementation="xla", under the same `meshes.use`.

    moved_bytes       of one chip, as in `experiments.benchmarks.kernels`; not of programs with a
                      loop over layers
    temporary_bytes   of one chip, `memory_analysis`
    sent_bytes        what one chip's collectives give, by kind
    calls             kernels in the program; 0 where the default choice leaves it to XLA
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import lowrank_jax as lrx
from experiments.benchmarks import commandline
from experiments.benchmarks import kernels as single
from experiments.benchmarks.kernel_cases import lora_linear
from experiments.harness import collectives, outputs
from experiments.planning import hlo, targets
from lowrank_jax import kernels, linalg, sharding
from lowrank_jax.interop import documents
from lowrank_jax.sharding import meshes
from lowrank_jax.typing import Pytree

TARGET, CHIP, LENGTH, RANK = "v5e:2x2", "v5e", 1024, 16
# mesh, shape and partition entries of W; sequences of 1024 tokens
PRODUCTS: list[tuple[Any, Any, Any, int]] = [
    ({"data": 4}, (4096, 11008), (None, None), 16),
    ({"data": 4}, (4096, 11008), (None, None), 4),
    ({"data": 2, "tensor": 2}, (4096, 11008), (None, "tensor"), 8),
    ({"data": 2, "tensor": 2}, (11008, 4096), ("tensor", None), 8),
    ({"fsdp": 4}, (4096, 11008), ("fsdp", None), 16),
]
# mesh, leaf, its partition entries, rank, moments
STEPS: list[tuple[Any, Any, Any, int, Any]] = [
    ({"data": 4}, (4096, 11008), (None, None), 1024, lrx.inner.adam()),
    ({"tensor": 4}, (4096, 11264), (None, "tensor"), 1024, lrx.inner.adam()),
    ({"fsdp": 4}, (4096, 4096), ("fsdp", None), 1024, lrx.inner.adam()),
    ({"fsdp": 4}, (4096, 4096), ("fsdp", None), 1024, lrx.inner.stored8()),
    ({"fsdp": 4}, (4096, 11008), ("fsdp", None), 256, lrx.inner.adam()),
    ({"fsdp": 4}, (16, 4096, 4096), (None, "fsdp", None), 1024, lrx.inner.adam()),
]
SCORES: list[tuple[Any, Any]] = [({"fsdp": 4}, (4096, 4096)), ({"fsdp": 4}, (4096, 11008))]


def measured(
    function: Callable, operands: tuple[Any, ...], places: Any, donate: tuple[int, ...] = ()
) -> dict:
    """The columns of one program."""
    program: Any = (
        jax.jit(function, out_shardings=places, donate_argnums=donate).lower(*operands).compile()
    )
    text = program.as_text()
    found = collectives.read(hlo.once(hlo.with_trips(text)))
    columns = {} if " while(" in text else {"moved_bytes": single.traffic(text)[0]}
    return columns | {
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "sent_bytes": collectives.by_kind(found),
        "calls": text.count('custom_call_target="tpu_custom_call"'),
    }


def abstract(mesh: Any, shape: tuple[int, ...], dtype: str, *spec: Any) -> jax.ShapeDtypeStruct:
    """An operand on the mesh."""
    return jax.ShapeDtypeStruct(
        shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )


def rows(devices: Any) -> Iterator[dict[str, Any]]:
    """Both programs of every case."""
    for sizes, shape, spec, batch in PRODUCTS:
        put = functools.partial(abstract, mesh := meshes.make_mesh(devices=devices, **sizes))
        for name, case in (("lora_linear", _thin), ("nf4_linear", _nf4)):
            own = {form: case(put, mesh, shape, spec, batch, form) for form in ("xla", "pallas")}
            yield {
                "kernel": name,
                "mesh": sizes,
                "shape": shape,
                "rows": batch * LENGTH,
                "part": "training",
            } | own
    for sizes, shape, spec, rank, inner in STEPS:
        mesh = meshes.make_mesh(devices=devices, **sizes)
        for part in ("projected", "full"):
            own = {
                form: _step(mesh, shape, spec, rank, inner, part, form)
                for form in ("xla", "pallas")
            }
            moments = "8 bits" if hasattr(inner, "block") else "float32"
            yield {
                "kernel": "low_rank_adam",
                "mesh": sizes,
                "shape": shape,
                "rank": rank,
                "moments": moments,
                "part": part,
            } | own
    for sizes, shape in SCORES:
        mesh = meshes.make_mesh(devices=devices, **sizes)
        own = {form: _scores(mesh, shape, form) for form in ("xla", "pallas")}
        yield {"kernel": "dct_scores", "mesh": sizes, "shape": shape} | own


def _activations(put, shape, spec, batch):
    """x and dy; their last axes lie as the dimensions of W do, but over axes of the batch."""
    own = [entry if entry == "tensor" else None for entry in spec]
    return (
        put((batch, LENGTH, size), "bfloat16", ("data", "fsdp"), None, entry)
        for size, entry in zip(shape, own, strict=True)
    )


def _thin(put, mesh, shape, spec, batch, form):
    (n, m), (x, dy) = shape, _activations(put, shape, spec, batch)
    w, a = put(shape, "bfloat16", *spec), put((n, RANK), "bfloat16", spec[0])
    b = put((RANK, m), "bfloat16", None, spec[1])
    kernel = functools.partial(kernels.lora_linear, spec=spec, chip=CHIP)

    def run(*operands):
        with meshes.use(mesh):
            return lora_linear.training(lora_linear.xla if form == "xla" else kernel)(*operands)

    return measured(run, (x, w, a, b, dy), tuple(leaf.sharding for leaf in (dy, x, a, b)))


def _nf4(put, mesh, shape, spec, batch, form):
    (n, m), (x, dy) = shape, _activations(put, shape, spec, batch)
    codes, scales = put((n // 2, m), "uint8", *spec), put((n // 64, m), "float32", *spec)

    def run(x, codes, scales, dy):
        w = linalg.NormalFloat4(codes, scales, None, n, "xla")
        with meshes.use(mesh):
            y, pull = jax.vjp(
                lambda x: kernels.nf4_linear(x, w, spec=None if form == "xla" else spec, chip=CHIP),
                x,
            )
        return y, *pull(dy)

    return measured(run, (x, codes, scales, dy), (dy.sharding, x.sharding))


def _step(mesh, shape, spec, rank, inner, part, form):
    params = {"kernel": abstract(mesh, shape, "bfloat16", *spec)}
    views = lrx.Views(stacked=("kernel",)) if len(shape) > 2 else lrx.Views()
    side = lrx.projection.sides_for(params, views=views)
    view = lrx.resolution.resolve(params, views, rank=rank, side=side).projected[0]
    # the values are the state's; this one only says their shape
    basis = lrx.projectors.given(matrix=np.zeros((view.shrunk, rank), np.float32))
    tx = lrx.galore(1e-3, projector=basis, inner=inner, weight_decay=0.1, views=views, side=side)
    places = lrx.state_shardings(tx, params, spread=True)
    optimizer = lrx.fused(tx, implementation="xla" if form == "xla" else "pallas")
    state = jax.tree.map(
        lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own),
        jax.eval_shape(tx.init, params),
        places,
    )
    grads: Pytree = params
    if part == "projected":
        place = jax.tree.leaves(places.projection.matrices["kernel"].inner.mu)[0]
        low = jax.ShapeDtypeStruct((*view.batch, rank, view.kept), jnp.float32, sharding=place)
        grads = {
            "kernel": jax.tree.map(lambda _: low, jax.eval_shape(lrx.projection.Projected, low))
        }

    def run(own, grads, state):
        with meshes.use(mesh, parameters=params):
            return optimizer.step(
                own, grads, state, taps=lrx.taps(state) if part == "projected" else None
            )

    return measured(
        run, (params, grads, state), ({"kernel": params["kernel"].sharding}, places), (0, 2)
    )


def _scores(mesh, shape, form):
    def run(x):
        with meshes.use(mesh):
            x = sharding.unshard_rows(x)  # as a refresh does
            return (
                linalg.row_scores(linalg.dct(x, 3), "l1")
                if form == "xla"
                else kernels.dct_scores(x, 3, chip=CHIP)
            )

    return measured(
        run, (abstract(mesh, shape, "float32", "fsdp", None),), NamedSharding(mesh, PartitionSpec())
    )


@commandline.command
def main(arguments: Sequence[str]) -> None:
    """Compiles every program and replaces the rows."""
    parser = commandline.parser(__doc__)
    commandline.add_replace(parser)
    options = parser.parse_args(arguments)
    outputs.check("output", single.RESULTS, is_folder=False)
    target = targets.parse(TARGET)
    single.with_environment(target, "experiments.benchmarks.divided_kernels")
    found = []
    for row in rows(target.devices()):
        found.append({"target": TARGET} | row)
        print(json.dumps(found[-1]), flush=True)
    data = documents.read(single.RESULTS, {"rows": [dict]})
    data["divided"] = {"command": "python -m experiments.benchmarks.divided_kernels", "rows": found}
    outputs.write_result(single.RESULTS, data, replace=options.replace)


if __name__ == "__main__":
    sys.exit(main())
