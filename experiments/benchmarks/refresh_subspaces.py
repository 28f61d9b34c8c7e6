"""The subspaces that refreshes find in a run, against the exact SVD's of its gradients.

    python -m experiments.benchmarks.refresh_subspaces --budget_minutes 24

trains the nano preset on the standard library's source with GaLore and projected backprop, once for
each refresh, period and seed, everything else being equal; all refreshes follow their update. With
the gradient `G` of a step, the bases `P` before and after it, and `U` of the r leading singular
vectors of `G`:

    svd           U
    power         qr(G GᵀP)                          one step of block power iteration from the last basis
    randomized    qr(G GᵀΩ)                          the same from a fresh Gaussian block
    alternating   qr(G Q), Q = qr(m̂ᵀ), m̂ ~ PᵀG      no full gradient: m̂ is the first moment, debiased
    sketch        qr(GΩ)                             no full gradient: Ω is Gaussian

What theory says. If the moment were the projected gradient of this step, `m̂ = PᵀG`, then `G Q`
would span `G GᵀP`, and alternating would be power: one half of a power step is done by the training
steps, the other by one thin product. In fact m̂ averages the gradients `Ḡ` of the last ten steps or
so (1 / (1 - b1)), so that a refresh is one power step on `G Ḡᵀ`, with a warm start by the first
moment. The noise of a batch is squared in `G Gᵀ`, while in `G Ḡᵀ` two nearly independent noises
meet: no bias, but what m̂ spans is half its own noise. A power step shrinks the error towards the
leading subspace by `(sigma_{r+1} / sigma_r)²`: where singular values lie close together, it turns
slowly, and the largest angle to U stays near 90 degrees among directions of nearly equal energy.
The sketch is half a step without memory: of the energy beyond the q-th singular value it loses
`1 + q / (r - q - 1)` times at most in the mean, for the best q below r - 1 (Halko, Martinsson and
Tropp 2011, theorem 10.5).

What is measured at a refresh, for each matrix, and then averaged over matrices (angles: the median)
and refreshes:

* principal angles between P and U in degrees, the largest and the median one;
* the energy `|PᵀG|² / |G|²` of this step's gradient, over that of U, which no basis of rank r
  exceeds;
* the same of gradients of the steps that the basis serves, over that of U: what training lives on.

The first refresh is left out of the averages (no moment yet). Rank is a quarter of the width, as in
the papers. Periods: 200 is GaLore's, where parameters go far between two refreshes; 10 is the
memory of the moment, and the period of `make train`: one power step a refresh has many refreshes to
converge.

About a minute on one core for a run. A finished run is kept under `--root` and not repeated; after
the budget none starts, and the table says what is missing.
"""

import io
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_jax as lrx
from experiments.benchmarks import commandline, timing
from experiments.harness import optimizers, outputs, updates, workdir
from experiments.models import llama
from experiments.settings import configuration
from lowrank_jax.interop import documents
from lowrank_jax.typing import Pytree

REFRESHES = {
    "svd": "full",
    "power": "full",
    "randomized": "full",
    "alternating": "thin",
    "sketch": "thin",
}
PERIODS, SEEDS, RANK = (10, 200), (0, 1), 32
SHARES = (
    "largest_angle",
    "median_angle",
    "step_share",
    "step_energy_svd",
    "window_share",
    "window_energy_svd",
)


def configured(refresh: str, period: int, seed: int, steps: int) -> configuration.RunConfig:
    """The run: GaLore at the learning rate that was best in `experiments.study`."""
    return configuration.from_dict(
        {
            "model": {"preset": "nano"},
            "data": {"sequence_length": 64, "batch_size": 8},
            "optimizer": {
                "name": "galore",
                "rank": RANK,
                "projector": refresh,
                "refresh_every": period,
                "refresh_when": "after",
                "backprop": "projected",
                "learning_rate": 1e-2,
                "weight_decay": 0.0,
            },
            "schedule": {"steps": steps},
            "run": {"seed": seed, "evaluation_tokens": 64 * 1024, "evaluation_batch_size": 64},
        }
    )


def principal_angles(first: jax.Array, second: jax.Array) -> jax.Array:
    """Degrees `(..., r)`, ascending, between the column spaces of orthonormal `(..., s, r)`.

    >>> first, second = jnp.eye(3)[:, :2], jnp.eye(3)[:, 1:]
    >>> principal_angles(first, second).tolist()
    [0.0, 90.0]
    """
    # of PᵀQ, whose singular values are the cosines
    cosines = jnp.linalg.svd(jnp.swapaxes(first, -1, -2) @ second, compute_uv=False)
    return jnp.degrees(jnp.arccos(jnp.clip(cosines, 0, 1)))


def measured_steps(period: int, steps: int, apart: int = 100) -> dict[int, list[int]]:
    """{step of a measured refresh: steps of its window}, about `apart` steps apart.

    >>> measured_steps(200, 600)[200]
    [210, 230, 250, 270, 290, 310, 330, 350, 370, 390]
    >>> list(measured_steps(10, 600)), measured_steps(10, 600)[100]
    ([0, 100, 200, 300, 400, 500], [101, 103, 105, 107, 109])
    """
    # whole periods apart, and up to ten steps of the period that the basis serves
    apart, samples = period * max(1, apart // period), min(10, max(1, period // 2))
    windows = {
        refresh: [refresh + period * (2 * i + 1) // (2 * samples) for i in range(samples)]
        for refresh in range(0, steps, apart)
    }
    return {refresh: window for refresh, window in windows.items() if window[-1] < steps}


class Probe:
    """Compares bases on full gradients, all matrices of all leaves in one jitted call each."""

    def __init__(self, projection: lrx.projection.Projection, params: Pytree):
        self.projector: Any = projection.projector
        self.views = projection.report(params).projected
        self.exact = jax.jit(self._exact)
        self.angles = jax.jit(self._angles)
        self.energy = jax.jit(self._energy)

    def bases(self, opt_state: Pytree) -> list[Any]:
        """The bases of the optimizer's state, in the order of the views."""
        taps = lrx.taps(opt_state).taps
        return [taps[view.path].basis for view in self.views]

    def _oriented(self, grads: Pytree) -> list[jax.Array]:
        by_path = {
            "/".join(key.key for key in keys): leaf
            for keys, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]
        }
        return [view.orient(by_path[view.path]) for view in self.views]

    def _exact(self, grads: Pytree) -> list[jax.Array]:
        svd = lrx.projectors.svd(rank=1)  # ranks are those of the views
        pairs = zip(self.views, self._oriented(grads), strict=True)
        return [
            svd.refresh(view, None, (), lrx.projectors.RefreshInputs(target=x))[0]
            for view, x in pairs
        ]

    def _angles(self, bases: list[Any], exact: list[jax.Array]) -> list[jax.Array]:
        columns = [
            self.projector.columns(view, basis)
            for view, basis in zip(self.views, bases, strict=True)
        ]
        return [principal_angles(a, b) for a, b in zip(columns, exact, strict=True)]

    def _energy(self, bases: list[Any], grads: Pytree) -> jax.Array:
        """Captured energy of every matrix, flat."""
        found = [
            self.projector.measure(view, basis, x).reshape(-1)
            for view, basis, x in zip(self.views, bases, self._oriented(grads), strict=True)
        ]
        return jnp.concatenate(found)


def summary(
    step: int, angles: Sequence[Any], own: Sequence[Any], exact: Sequence[Any]
) -> dict[str, Any]:
    """One measured refresh: captured energies (matrices,) of the step, then of its window."""
    degrees = np.concatenate([np.asarray(x).reshape(-1, x.shape[-1]) for x in angles])
    # the first is of the refresh's own step, the others of the window that it serves
    (step_own, *window_own), (step_svd, *window_svd) = np.asarray(own), np.asarray(exact)
    window_own, window_svd = np.mean(window_own, axis=0), np.mean(window_svd, axis=0)
    return {
        "step": step,
        "largest_angle": float(np.median(degrees.max(axis=-1))),
        "median_angle": float(np.median(np.median(degrees, axis=-1))),
        "step_share": float(np.mean(step_own / step_svd)),
        "step_energy_svd": float(np.mean(step_svd)),
        "window_share": float(np.mean(window_own / window_svd)),
        "window_energy_svd": float(np.mean(window_svd)),
    }


def train(
    config: configuration.RunConfig, apart: int = 100, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """One whole run: what was measured at its refreshes, and its last validation loss."""
    dataset, model, seed = workdir.open_dataset(config), llama.Llama(config.model), config.run.seed
    rate = optimizers.schedule(config.schedule, config.optimizer.learning_rate)
    tx: Any = optimizers.build(config.optimizer, rate, stacked=config.model.scan, seed=seed)
    tokens = jnp.zeros((1, config.data.sequence_length), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(seed), tokens)["params"]
    state: Pytree = {"params": params, "opt_state": tx.init(params)}
    probe = Probe(tx.projection, params)
    # the run itself sees no full gradient; the probe takes one at the steps that it measures
    update = jax.jit(updates.fused_step(model, tx, 1, "projected"), donate_argnums=0)
    gradient = jax.jit(jax.grad(lambda params, batch: updates.loss_sums(model, params, batch)[0]))
    steps, period = config.schedule.steps, config.optimizer.refresh_every or 200
    windows = measured_steps(period, steps, apart)
    samples = {step: refresh for refresh, window in windows.items() for step in window}
    found: list[dict[str, Any]] = []
    measured: dict[str, Any] = {}
    for step in range(steps):
        batch = jax.tree.map(jnp.asarray, dataset.train.batch(step))
        grads = gradient(state["params"], batch) if step in windows or step in samples else None
        if step in samples:  # the basis of that refresh still serves
            measured["own"].append(probe.energy(probe.bases(state["opt_state"]), grads))
            measured["svd"].append(probe.energy(measured["exact"], grads))
            if step == windows[samples[step]][-1]:
                found.append(
                    summary(samples[step], measured["angles"], measured["own"], measured["svd"])
                )
        state, seen = update(state, batch)
        if step in windows:  # refreshed after this update, by what this step's gradient says
            bases, exact = probe.bases(state["opt_state"]), probe.exact(grads)
            measured = {
                "exact": exact,
                "angles": jax.device_get(probe.angles(bases, exact)),
                "own": [probe.energy(bases, grads)],
                "svd": [probe.energy(exact, grads)],
            }
        if (step + 1) % 100 == 0:
            say(f"  update {step + 1} of {steps}: loss {float(seen['loss']):.4f}")
    evaluation = jax.jit(lambda params, batch: updates.loss_sums(model, params, batch))
    size = config.run.evaluation_batch_size or config.data.batch_size
    batches = dataset.validation.evaluation(size, config.run.evaluation_tokens)
    loss = updates.evaluate(evaluation, state["params"], batches)["loss"]
    return {"validation_loss": loss, "skipped": int(seen["skipped"]), "measured": found}


Key = tuple[int, int, str]


def queue(
    root: Path,
    keys: Sequence[Key],
    steps: int,
    budget_minutes: float,
    run: Callable[..., Any] = train,
) -> float:
    """Makes the runs that `root` lacks until the budget is spent; CPU minutes of all runs."""
    root.mkdir(parents=True, exist_ok=True)
    for number, (seed, period, refresh) in enumerate(keys):
        path = _file(root, seed, period, refresh, steps)
        spent = sum(_read(other)["cpu_minutes"] for other in root.glob("*.json"))
        if path.exists():
            continue
        if spent > budget_minutes:
            print(
                f"{spent:.1f} of {budget_minutes:g} minutes are spent: {len(keys) - number} runs "
                "left",
                flush=True,
            )
            break
        print(
            f"[{spent:.1f} min] {number + 1} of {len(keys)}: {refresh} every {period}, seed {seed}",
            flush=True,
        )
        begin = time.process_time()  # the processor's time, whatever else runs here
        result = run(configured(refresh, period, seed, steps))
        outputs.write_json(path, result | {"cpu_minutes": (time.process_time() - begin) / 60})
    return sum(_read(other)["cpu_minutes"] for other in root.glob("*.json"))


def _read(path: Path) -> dict[str, Any]:
    """What one run measured."""
    shape = {"cpu_minutes": float, "measured": [{"step": int}], "validation_loss": (float, None)}
    return documents.read(path, shape, remedy="remove it, and the run is made again")


def _file(root: Path, seed: int, period: int, refresh: str, steps: int) -> Path:
    return root / f"{refresh}-period{period}-seed{seed}-steps{steps}.json"


def collect(root: Path, keys: Sequence[Key], steps: int) -> list[dict[str, Any]]:
    """A row for each refresh and period with a finished run.

    Means over seeds and over refreshes but the first.
    """
    rows = []
    for period in dict.fromkeys(period for _, period, _ in keys):
        for refresh, reads in REFRESHES.items():
            wanted = [seed for seed, p, name in keys if (p, name) == (period, refresh)]
            paths = [_file(root, seed, period, refresh, steps) for seed in wanted]
            runs = [_read(path) for path in paths if path.exists()]
            later = [entry for found in runs for entry in found["measured"] if entry["step"] > 0]
            if not later:
                continue
            rows.append(
                {
                    "refresh": refresh,
                    "reads": reads,
                    "period": period,
                    "runs": len(runs),
                    "wanted": len(wanted),
                    "refreshes": len(later),
                    **{name: statistics.mean(entry[name] for entry in later) for name in SHARES},
                    "validation_losses": [found["validation_loss"] for found in runs],
                    "measured": [found["measured"] for found in runs],
                }
            )
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Energy of the next window, over that of U, at the measured refreshes of the first seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from experiments.reporting import figures

    periods = list(dict.fromkeys(row["period"] for row in rows))
    figure = Figure(figsize=(5.0 * len(periods), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for place, period in enumerate(periods):
        axes = figure.add_subplot(1, len(periods), place + 1)
        for row in (row for row in rows if row["period"] == period):
            entries = row["measured"][0]
            axes.plot(
                [entry["step"] for entry in entries],
                [entry["window_share"] for entry in entries],
                marker="o",
                color=figures.colour(list(REFRESHES).index(row["refresh"])),
                label=row["refresh"],
            )
        axes.set(
            title=f"refresh every {period} updates",
            xlabel="update",
            ylabel="energy of the next window, of SVD's",
        )
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
        axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    outputs.write_bytes(path, buffer.getvalue())


@commandline.command
def main(arguments: Sequence[str]) -> None:
    """Makes what is missing, prints the rows, writes JSON and figure."""
    parser = commandline.parser(__doc__, "experiments/results/refresh_subspaces.json")
    parser.add_argument(
        "--root",
        type=commandline.folder,
        default="runs/refresh_subspaces",
        help="folder of the runs",
    )
    parser.add_argument("--steps", type=commandline.count, default=600, help="updates of a run")
    parser.add_argument(
        "--seeds", type=commandline.count, default=len(SEEDS), help="runs of each row"
    )
    parser.add_argument(
        "--budget_minutes", type=commandline.positive, default=12.0, help="no run starts after this"
    )
    options, words = parser.parse_args(arguments), [*arguments]
    workdir.use_compile_cache()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    keys = [
        (seed, period, name)
        for seed in range(options.seeds)
        for period in PERIODS
        for name in REFRESHES
    ]
    spent = queue(options.root, keys, options.steps, options.budget_minutes)
    rows = collect(options.root, keys, options.steps)
    command = f"python -m experiments.benchmarks.refresh_subspaces {' '.join(words)}".strip()
    result = {
        "command": command,
        "preset": "nano",
        "rank": RANK,
        "steps": options.steps,
        "tokens_per_update": 8 * 64,
        "cpu_minutes": round(spent, 1),
        "machine": timing.machine(),
        "rows": rows,
    }
    for row in rows:
        losses = ", ".join(f"{loss:.4f}" for loss in row["validation_losses"])
        print(
            f"{row['refresh']:<12}{row['period']:>4}  angles {row['largest_angle']:.1f}, "
            f"{row['median_angle']:.1f}  energy {row['step_share']:.3f}, window "
            f"{row['window_share']:.3f}  loss {losses}"
        )
    plot(rows, options.root / "subspaces.png")
    outputs.write_result(options.output, result, replace=options.replace)


if __name__ == "__main__":
    sys.exit(main())
