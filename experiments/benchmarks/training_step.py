"""What a whole training step costs, with full gradients and with projected ones.

    python -m experiments.benchmarks.training_step --preset 60M --output experiments/results/training_step_60M.json

Every case trains the same LLaMA preset on the same tokens, as one jitted step with parameters and
state donated, in one process; the cases of a rank and AdamW are interleaved, and times are medians
of steps that refresh nothing. AdamW is `optax.adamw`.
`optax.contrib.galore` gets unscanned layers, because it skips stacks. "blocks" is the stack of
layers alone, without embedding, head and loss; "head too" projects the output layer like a block's
matrix, which the papers do not.

Beside each clock ratio stands the ratio of the operations, by formula: of N tokens a matrix (m, n)
costs 6 N m n, with a tap of rank r `4 N m n + 2 N r (m + n)`; `12 L D S` a token for attention, 6 V
D for the head; an optimizer's own products are 2 m n r each. Bytes are parameters plus the
program's temporaries, which hold the gradients.

"projected backprop" takes full gradients at a refresh, for its exact SVD; "alternating" never does:
its basis is the orthonormalised product of the gradient and the first moment, taken by a second
tap. `amortised` spreads one refresh over 200 steps. `losses` runs 200 updates of the nano preset on
the standard library's source twice, with projected and with full gradients and the same clip rule.
"""

import dataclasses
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_jax as lrx
from experiments.benchmarks import commandline, timing, workload
from experiments.harness import outputs, updates, workdir
from experiments.harness.methods import METHODS
from experiments.models import llama
from experiments.settings import configuration
from lowrank_jax.typing import Pytree

PERIOD = workload.PERIOD
AIMS = {("60M", 4): 0.82, ("60M", 8): 0.76}
CLOCK_OVER_FLOPS = 1.05


class Blocks(nn.Module):
    """The stack of layers alone."""

    config: llama.LlamaConfig

    @nn.compact
    def __call__(self, x):
        """Of x (B, S, D)."""
        stack = nn.scan(
            llama.Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.layers,
        )
        return stack(self.config, name="layers")(x, None)[0]


@dataclasses.dataclass
class Work:
    """What a step trains: parameters, a loss and one batch.

    All cases of one model pass the parameters on to each other.
    """

    params: Pytree
    loss: Callable[..., Any]
    batch: Any


def work(config: llama.LlamaConfig, batch: int, *, head: bool = True) -> Work:
    """A model with random parameters and tokens; `head=False` is the blocks alone."""
    key = jax.random.key(0)
    if head:
        model: nn.Module = llama.Llama(config)
        data: Any = jax.random.randint(
            key, (batch, config.sequence_length), 0, config.vocabulary_size
        )

        def loss(params, tokens):
            logits = model.apply({"params": params}, tokens)
            return llama.loss_and_metrics(logits, tokens, jnp.ones(tokens.shape))[0]
    else:
        model = Blocks(config)
        data = jax.random.normal(key, (batch, config.sequence_length, config.width))

        def loss(params, x):
            return jnp.mean(jnp.square(jnp.asarray(model.apply({"params": params}, x))))

    params = jax.jit(model.init)(key, data[:1])["params"]
    return Work(params, loss, data)


def operations(
    config: llama.LlamaConfig,
    tokens: int,
    *,
    head: bool,
    rank: int = 0,
    tapped: bool = False,
    head_tapped: bool = False,
) -> int:
    """Floating-point operations of a step by the formulas above; rank 0 is AdamW.

    >>> config = llama.preset("60M")
    >>> operations(config, 256, head=True) == 256 * llama.flops_per_token(config)
    True
    """
    D, F, L = config.width, config.hidden, config.layers
    KV = config.kv_heads * config.head_size
    # forward and backward of the two products of attention
    total = 12 * L * D * config.sequence_length * tokens
    for m, n in ((D, D), (D, KV), (D, KV), (D, D), (D, F), (D, F), (F, D)):
        # forward, and the gradient of the inputs
        products = 4 * tokens * m * n
        # the gradient of the weight, or its projection by thin products
        products += 2 * tokens * rank * (m + n) if tapped else 2 * tokens * m * n
        # down and up of the update; a tap has done the former
        total += L * (products + 2 * m * n * rank * (1 if tapped else 2))
    if head:
        m, n = D, config.vocabulary_size
        thin = 2 * tokens * rank * (m + n) + 2 * m * n * rank
        total += 4 * tokens * m * n + thin if head_tapped else 6 * tokens * m * n
    return total


@dataclasses.dataclass
class Case:
    """One row: a compiled step with its own state."""

    name: str
    rank: int
    tapped: bool
    head_tapped: bool
    refresh: int
    compiled: Any
    of: Work
    state: Pytree
    bytes: int
    state_bytes: int

    def run(self) -> float:
        """Seconds of one step."""

        def once():
            self.of.params, self.state, value = self.compiled(
                self.of.params, self.state, self.of.batch
            )
            return self.of.params, self.state, value

        return timing.seconds(once)


def optax_step(tx: Any, loss: Callable[..., Any]) -> Callable[..., Any]:
    """The usual step: gradients, updates, their addition."""

    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def at(state: Pytree, step: int) -> Any:
    """The state as the refresh schedule sees it at this step."""
    count = jnp.asarray(step, jnp.int32)
    if hasattr(state, "projection"):
        return state._replace(projection=state.projection._replace(step=count))
    if hasattr(state[0], "projector"):
        return (state[0]._replace(count=count), *state[1:])
    return state


def make(
    name: str,
    step: Callable[..., Any],
    tx: Any,
    of: Work,
    *,
    rank: int = 0,
    tapped: bool = False,
    head_tapped: bool = False,
) -> Case:
    """Compiles a case and puts its state past the first refresh."""
    print(f"compiling {name}", file=sys.stderr, flush=True)
    # a normal step: at step 1 nothing is due
    state = at(jax.jit(tx.init)(of.params), 1)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(of.params, state, of.batch).compile()
    program = lrx.memory.measure(compiled)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (of.params, state)]
    # the step of the next refresh: at the beginning of a period, or after its last update
    schedule = getattr(getattr(tx, "projection", None), "refresh_schedule", None)
    refresh = PERIOD - 1 if schedule is not None and schedule.phase else 0
    sizes[0] += program.temporaries  # what the step needs besides its arguments
    return Case(name, rank, tapped, head_tapped, refresh, compiled, of, state, *sizes)


def cases(
    preset: str, batch: int, length: int, part: int, *, head: bool, contrib: bool
) -> list[Case]:
    """AdamW and the rows of one rank, the width over `part`."""
    config = llama.preset(preset, sequence_length=length)
    rank, of = config.width // part, work(config, batch, head=head)
    adamw = optax.adamw(1e-3)
    rows = [make("optax.adamw", optax_step(adamw, of.loss), adamw, of)]
    if contrib:  # which leaves stacked layers unprojected
        flat = work(dataclasses.replace(config, scan=False), batch)
        tx = METHODS["optax_galore"].build(1e-2, rank=rank)
        rows.append(make("optax.contrib.galore", optax_step(tx, flat.loss), tx, flat, rank=rank))
    plain = lrx.galore(1e-2, rank=rank, views=workload.VIEWS)
    rows.append(make(f"galore, rank {rank}", optax_step(plain, of.loss), plain, of, rank=rank))
    name = f"galore, rank {rank}, projected backprop"
    rows.append(make(name, lrx.train_step(of.loss, plain), plain, of, rank=rank, tapped=True))
    # refreshes after the update, by thin products: no full gradient at any step
    after: dict[str, Any] = {
        "projector": lrx.projectors.alternating(rank=rank),
        "refresh_schedule": lrx.refresh_schedules.every(
            period=PERIOD, phase=PERIOD - 1, first=False, when="after"
        ),
    }
    tx = lrx.galore(1e-2, views=workload.VIEWS, **after)
    rows.append(
        make(f"{name}, alternating", lrx.train_step(of.loss, tx), tx, of, rank=rank, tapped=True)
    )
    if head:
        views = dataclasses.replace(workload.VIEWS, rules=((r"lm_head/kernel", lrx.MatrixView()),))
        tx = lrx.galore(1e-2, views=views, **after)
        name = f"{name}, alternating, head too"
        rows.append(
            make(
                name, lrx.train_step(of.loss, tx), tx, of, rank=rank, tapped=True, head_tapped=True
            )
        )
    return rows


def table(
    preset: str,
    batch: int,
    length: int,
    repetitions: int,
    *,
    head: bool,
    contrib: bool,
    parts: tuple[int, ...],
) -> dict[str, Any]:
    """Times, operations and bytes of every case; each rank has its own AdamW to compare with."""
    lines: list[dict[str, Any]] = []
    for part in parts:
        rows = cases(preset, batch, length, part, head=head, contrib=contrib and not lines)
        for row in rows:
            row.run()  # loads the program and fills the caches
        seconds = timing.interleave({row.name: row.run for row in rows}, repetitions)
        measured = [line(row, seconds, preset, batch, length, head) for row in rows]
        lines += measured if not lines else measured[1:]  # AdamW is shown once
    return {"part": "whole model" if head else "blocks alone", "rows": lines}


def line(
    row: Case, seconds: dict[str, float], preset: str, batch: int, length: int, head: bool
) -> dict[str, Any]:
    """What is recorded of one case after the timed steps; a tapped one pays a refresh here."""
    config = llama.preset(preset, sequence_length=length)
    own, adamw = seconds[row.name], seconds["optax.adamw"]
    kind = {"tapped": row.tapped, "head_tapped": row.head_tapped}
    counted = operations(config, batch * length, head=head, rank=row.rank, **kind)
    work_ratio = counted / operations(config, batch * length, head=head)
    found = {
        "case": row.name,
        "rank": row.rank,
        **kind,
        "seconds": own,
        "adamw_seconds": adamw,
        "clock_ratio": own / adamw,
        "operations": counted,
        "operations_ratio": work_ratio,
        "clock_over_operations": own / adamw / work_ratio,
        "bytes": row.bytes,
        "state_bytes": row.state_bytes,
    }
    if row.tapped:
        row.state = at(row.state, row.refresh)
        # one refresh a period, the rest normal steps
        refresh = row.run()
        mean = (refresh + (PERIOD - 1) * own) / PERIOD
        found |= {"refresh_seconds": refresh, "amortised_ratio": mean / adamw}
    return found


def losses(steps: int = 200) -> dict[str, Any]:
    """The largest difference between the losses of projected and of full gradients."""
    config = configuration.from_dict(
        {
            "data": {"sequence_length": 64, "batch_size": 8},
            "optimizer": {
                "name": "galore",
                "rank": 32,
                "learning_rate": 1e-2,
                "refresh_every": 50,
                "backprop": "projected",
            },
            "schedule": {"steps": steps},
        }
    )
    dataset, model = workdir.open_dataset(config), llama.Llama(config.model)
    options: dict[str, Any] = {
        "rank": 32,
        "refresh_every": 50,
        "clip_norm": 1.0,
        "views": workload.VIEWS,
    }
    tx = lrx.galore(1e-2, **options)
    key = jax.random.key(0)
    params = model.init(key, jnp.zeros((1, 64), jnp.int32))["params"]
    runs: dict[str, list[float]] = {}
    for name, update in (
        ("projected", updates.fused_step(model, tx, 1, "projected")),
        ("full", updates.train_step(model, tx, 1)),
    ):
        state: Pytree = {"params": params, "opt_state": tx.init(params)}
        step = jax.jit(update)
        runs[name] = []
        for number in range(steps):
            state, measured = step(
                state, jax.tree.map(jnp.asarray, dataset.train.batch(number, 0, 1))
            )
            runs[name].append(float(measured["loss"]))
    difference = np.abs(np.subtract(runs["projected"], runs["full"]))
    last = {f"{name}_last": values[-1] for name, values in runs.items()}
    return {"steps": steps, "largest_difference": float(difference.max()), **last}


def aims(preset: str, tables: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each aim with its value, its bound and whether it is met."""
    width, found = llama.preset(preset).width, []

    def add(aim: str, of: str, value: float, bound: float) -> None:
        found.append({"aim": aim, "of": of, "value": value, "bound": bound, "met": value <= bound})

    for part in tables:
        adamw = part["rows"][0]
        for row in part["rows"]:
            if not row["tapped"]:
                continue
            name = f"{part['part']}: {row['case']}"
            bound = AIMS.get((preset, width // row["rank"]))
            if bound is not None:
                add("clock, of AdamW's", name, row["clock_ratio"], bound)
            add(
                "clock ratio over operations ratio",
                name,
                row["clock_over_operations"],
                CLOCK_OVER_FLOPS,
            )
            add("memory, of AdamW's", name, row["bytes"] / adamw["bytes"], 1.0)
    return found


@commandline.command
def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark, prints it and writes the JSON."""
    parser = commandline.parser(__doc__, "experiments/results/training_step_60M.json")
    parser.add_argument("--preset", type=commandline.preset, default="60M")
    parser.add_argument("--batch", type=commandline.count, default=4, help="sequences")
    parser.add_argument(
        "--length", type=commandline.count, default=256, help="tokens of a sequence"
    )
    parser.add_argument("--repetitions", type=commandline.count, default=9)
    parser.add_argument(
        "--parts",
        type=commandline.count,
        nargs="+",
        default=[4, 8, 16],
        help="ranks: the width over these",
    )
    parser.add_argument("--nolosses", action="store_true", help="leave out the 200 updates of nano")
    options = parser.parse_args(arguments)
    size = (options.preset, options.batch, options.length, options.repetitions)
    parts = tuple(options.parts)
    tables = [table(*size, head=head, contrib=head, parts=parts) for head in (True, False)]
    words = " ".join(arguments)
    result = {
        "command": f"python -m experiments.benchmarks.training_step {words}".strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": timing.machine(),
        "preset": options.preset,
        "tokens": options.batch * options.length,
        "length": options.length,
        "repetitions": options.repetitions,
        "tables": tables,
        "losses": None if options.nolosses else losses(),
        "aims": aims(options.preset, tables),
    }
    for part in tables:
        print(part["part"])
        for row in part["rows"]:
            print(
                f"  {row['case']:<40}{1e3 * row['seconds']:>9.1f} ms {row['clock_ratio']:>6.3f} of "
                f"AdamW, operations {row['operations_ratio']:.3f}, {row['bytes'] / 2**20:.0f} + "
                f"{row['state_bytes'] / 2**20:.0f} MiB"
            )
    print(json.dumps(result["losses"]))
    for aim in result["aims"]:
        print(
            f"{aim['aim']:<36}{aim['of']:<70}{aim['value']:.3f} <= {aim['bound']} "
            f"{'met' if aim['met'] else 'missed'}"
        )
    outputs.write_result(options.output, result, replace=options.replace)


if __name__ == "__main__":
    sys.exit(main())
