"""What the loop of `experiments.harness.training` trains: a `Task`; and the first of them, pre-training.

The loop knows batches, updates, evaluations and checkpoints. A task says where the state comes
from, what the loss is, what is evaluated, and what checkpoint and summary hold besides.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_jax as lrx
from experiments.data import Dataset, ngram
from experiments.harness import distributed, evaluated, optimizers, updates
from experiments.harness import workdir as folder
from experiments.models import axes, llama
from experiments.models.sampling import sample
from experiments.settings.configuration import MeshConfig, RunConfig
from experiments.settings.sections import ConfigurationError
from lowrank_jax.sharding import meshes
from lowrank_jax.typing import Kernel

# `watch(title, number of batches, batches)` gives the batches of an evaluation back, one by one;
# whoever takes one has read what the one before gave. It may raise `distributed.Stopped` between
# two.
Watch = Callable[[str, int, Iterator[Any]], Iterator[Any]]


def unwatched(title: str, total: int, batches: Iterator[Any]) -> Iterator[Any]:
    """The batches themselves."""
    del title, total
    return batches


class Task:
    """One kind of training: what the loop asks for.

    A subclass sets the attributes in `__init__`, before any work, and fulfils the methods.

    Attributes:
      config: a name and the sections data (with batch_size), optimizer, schedule, checkpoint, run
        and mesh.
      dataset: `dataset.train.batch(step, process, processes)` gives the rows of an update.
      rate: the learning rate by update.
      work: floating-point operations of an update, for the MFU.
      exact: products are counted in float32.
      shapes, places: shapes and shardings of the state's parts: "params" (what trains), and what
        the task adds.
      stacked: the model's layers lie along a leading axis of each kernel under `layers`.
      frozen: arguments of every update after state and batch; not saved.
      evaluates_first: also before the first update.
      mesh: of all devices, with the axes of `lrx.meshes`.
      rows: sharding of batches.
      optimizer, abstract: of `choose`: what updates "params", and the whole state with "opt_state",
        abstract. All of it is saved, and donated to the update.
    """

    config: Any
    dataset: Dataset
    rate: Callable[[int], Any]
    work: float
    exact: bool
    shapes: dict[str, Any]
    places: dict[str, Any]
    stacked: bool
    frozen: tuple = ()
    evaluates_first: bool = False
    optimizer: optax.GradientTransformation
    abstract: dict[str, Any]
    _sides: tuple[tuple[str, str], ...] = ()  # what optimizer.side = "sharding" comes to

    def __init__(self, config: MeshConfig, devices: Sequence[Any] | None = None):
        try:
            sizes: dict[str, Any] = config.sizes
            self.mesh = meshes.make_mesh(**sizes, devices=devices, explicit=config.explicit)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
        self.rows = jax.NamedSharding(self.mesh, meshes.spec(("batch",), self.mesh))

    def headline(self) -> str:
        """One line: what trains on what."""
        raise NotImplementedError

    def initial(self) -> dict[str, Any]:
        """The state before the first update."""
        raise NotImplementedError

    def sums(self, params, batch, rest, *frozen):
        """`updates.step`'s loss: (sum of weighted losses, sum of weights)."""
        raise NotImplementedError

    def evaluate(self, state, watch: Watch = unwatched) -> tuple[dict[str, Any], str]:
        """The figures of an evaluation and a line on them; loops take batches from `watch`."""
        raise NotImplementedError

    def evaluated(self) -> dict[str, Any]:
        """What is evaluated: the entries of `evaluated.identity`, equal where losses compare.

        Reads all of it.
        """
        return evaluated.identity(self.dataset, self.config.run.evaluation_tokens)

    def summary(self, state, evaluations: list[dict]) -> dict[str, Any]:
        """Entries of summary.json besides the loop's own; "sample" is also printed."""
        raise NotImplementedError

    def memory(self, compiled) -> list[dict]:
        """Rows {"component", "bytes_formula", "bytes_measured"} of the memory ledger."""
        # without clipping in front, so that the ledger sees the projection itself
        settings = dataclasses.replace(self.config.optimizer, clip_norm=None)
        optimizer = self.optimizer_of(settings)
        return list(lrx.memory.ledger(optimizer, self.abstract["params"], compiled).rows)

    def optimizer_of(self, settings) -> optax.GradientTransformation:
        """The optimizer that these settings describe."""
        # "sharding" is resolved once: shapes of the state follow from it
        if settings.side == "sharding" and not self._sides:
            self._sides = lrx.projection.sides_for(
                self.shapes["params"], self.places["params"], views=optimizers.views(self.stacked)
            )
        return optimizers.build(
            settings, self.rate, stacked=self.stacked, seed=self.config.run.seed, sides=self._sides
        )

    def choose(self) -> None:
        """The optimizer, and the state that follows from it; after the other attributes."""
        settings, params = self.config.optimizer, self.shapes["params"]
        self.optimizer = self.optimizer_of(settings)
        try:
            opt_state = jax.eval_shape(
                lambda params: without_weak_types(self.optimizer.init(params)), params
            )
        except ValueError as error:
            raise ConfigurationError(f"optimizer.name={settings.name!r}: {error}") from error
        # the state is placed where its parameters are
        state_places = lrx.state_shardings(
            self.optimizer, params, self.places["params"], spread=self.config.mesh.spreads
        )
        shapes = {**self.shapes, "opt_state": opt_state}
        places = {**self.places, "opt_state": state_places}
        self.abstract = jax.tree.map(placed, shapes, places)

    def keep_sides(self, sides: dict[str, tuple[str, int]]) -> None:
        """Take the (side, rank) of the matrices of a stored state, before anything is compiled."""
        own = tuple((path, side) for path, (side, _) in sides.items())
        if self._sides and own:
            self._sides = own
            self.choose()

    def update(self) -> Callable:
        """The update to compile: `(state, batch, *frozen) -> (state, metrics)`.

        Metrics are "loss", "grad_norm", "tokens" and "skipped".
        """
        accumulation, backprop = self.config.schedule.accumulation, self.config.optimizer.backprop
        if backprop is None:
            update = updates.step(self.sums, self.optimizer, accumulation)
        else:
            update = updates.fused(self.sums, self.optimizer, accumulation, backprop)
        if self.mesh.size == 1 and not self.config.mesh.explicit:
            return update
        # the new state is placed as the old one was, whatever the compiler would choose
        stored = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        parameters = self.abstract["params"] if self.config.mesh.spreads else None
        is_explicit = self.config.mesh.explicit
        place = jax.sharding.reshard if is_explicit else jax.lax.with_sharding_constraint

        def run(state, batch, *frozen):
            with meshes.use(self.mesh, parameters=parameters):
                state, measured = update(state, batch, *frozen)
            return place(state, stored), measured

        return run

    def check(self, state) -> str | None:
        """Compares projected gradients with full ones, before the first update.

        On a row of each part of a batch.
        """
        if self.config.optimizer.backprop != "projected":
            return None
        if lrx.projection.gradient_mode(self.optimizer.projection) == "full":
            return None
        begin = time.perf_counter()
        # one row for each part that a batch is cut into
        own = self.mesh.shape["data"] * self.mesh.shape["fsdp"] // distributed.part(self.rows)[1]
        batch = self.on_devices({name: array[:own] for name, array in self.host_batch(0).items()})
        share = 1.0 / max(float(jnp.sum(batch["weights"])), 1.0)
        loss = updates.projected_loss(self.sums, self.frozen)
        taps = lrx.taps(state["opt_state"])
        tolerance = 1e-3 if self.exact else 5e-2  # float32 products, or bfloat16 ones
        lrx.check_taps(loss, taps, state["params"], batch, share, tolerance=tolerance)
        return f"projected gradients agree with the full ones ({time.perf_counter() - begin:.1f} s)"

    def record(self) -> dict[str, tuple[Any, str, str]]:
        """Surroundings that a resumed run must share: {key: (value, what changed, remedy)}."""
        subject = f"data.name={self.config.data.name!r}: its tokens changed"
        return {
            "data": (self.dataset.fingerprint, subject, "restore them, or give another workdir")
        }

    def meaning(self) -> dict[str, dict[str, Any]]:
        """{section: {key: value}} without which a checkpoint's arrays mean nothing."""
        raise NotImplementedError

    def files(self) -> dict[str, Any]:
        """{name: JSON, or the content itself} of what the run folder holds from the start."""
        tokenizer = self.dataset.tokenizer
        return {} if tokenizer is None else dict(tokenizer.files)

    def host_batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of an update."""
        return self.dataset.train.batch(step, *distributed.part(self.rows))

    def evaluation_batches(
        self, part, title: str, watch: Watch, limit: int | None
    ) -> Iterator[dict[str, jax.Array]]:
        """The batches of `part` for an evaluation of `limit` tokens, watched, on the devices."""
        size = self.config.run.evaluation_batch_size or self.config.data.batch_size
        own = part.evaluation(size, limit, *distributed.part(self.rows))
        count = -(-part.evaluated(limit) // size)  # rounded up: the last batch may be padded
        return watch(title, count, map(self.on_devices, own))

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The batch of an update, abstract."""
        rows, own = self.config.data.batch_size, self.host_batch(0)
        whole = {
            name: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype)
            for name, array in own.items()
        }
        return {name: placed(shape, self.rows) for name, shape in whole.items()}

    def on_devices(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """The batch of which these are this process's rows."""
        return {
            name: jax.make_array_from_process_local_data(self.rows, array)
            for name, array in batch.items()
        }


def placed(leaf: Kernel, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """The leaf's shape and dtype, where it is placed."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def without_weak_types(tree):
    """Weak types, which a restored state cannot have, become ordinary ones."""
    is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(
        lambda leaf: leaf if is_key(leaf) else jax.lax.convert_element_type(leaf, leaf.dtype), tree
    )


def trigram_loss(config, dataset: Dataset, length: int) -> float:
    """Loss of a trigram model of the training text on the tokens that the evaluation sees."""
    tokens, limit = dataset.validation.tokens, config.run.evaluation_tokens
    if limit is not None:  # whole rows, and one token more, which is the last target
        tokens = tokens[: max(1, limit // length) * length + 1]
    return ngram.trigram_loss(dataset.train.tokens, tokens, dataset.vocabulary_size)


def sampled(config, tokenizer, model, params) -> str:
    """Text drawn from a language model after `run.sample_prompt`."""
    settings = config.run
    prompt = tokenizer.encode(settings.sample_prompt)[-model.config.sequence_length :]
    tokens = sample(
        model,
        meshes.on_auto_axes(params),  # sampling does not say where things go
        jnp.asarray(prompt, jnp.int32)[None],
        settings.sample_tokens,
        jax.random.key(settings.seed),
        settings.temperature,
    )
    # a vocabulary may be larger than the tokenizer's
    known = np.asarray(tokens[0])
    return settings.sample_prompt + tokenizer.decode(known[known < tokenizer.vocabulary_size])


class Pretraining(Task):
    """A LLaMA from scratch, on text."""

    def __init__(self, config: RunConfig, devices: Sequence[Any] | None = None):
        super().__init__(config.mesh, devices)
        self.config, self.dataset = config, self.open_dataset(config)
        self.model, self.stacked = llama.Llama(config.model), config.model.scan
        self.rate = optimizers.schedule(config.schedule, config.optimizer.learning_rate)
        # shapes and places first: nothing is made before the whole run is known to fit together
        params = jax.eval_shape(self._params, jax.random.key(0))
        self.shapes = {"params": params}
        self.places = {"params": meshes.shardings(params, axes.LLAMA, self.mesh)}
        self.choose()
        length = config.data.sequence_length
        tokens = config.data.batch_size * length
        self.work = llama.flops_per_token(config.model, length) * tokens
        self.exact = config.model.dtype == "float32"
        self.evaluation_step = jax.jit(lambda params, batch: self.sums(params, batch, {}))

    def open_dataset(self, config: RunConfig) -> Any:
        """The tokens that the run trains on."""
        return folder.open_dataset(config)

    def meaning(self):
        return {"model": dataclasses.asdict(self.config.model)}

    def headline(self):
        parameters = llama.parameter_count(self.config.model)
        name = self.config.optimizer.name
        return (
            f"{self.config.preset}: {parameters:,} parameters; {name}; {self.dataset.description}"
        )

    def _params(self, key):
        tokens = jnp.zeros((1, self.config.data.sequence_length), jnp.int32)
        return without_weak_types(self.model.init(key, tokens)["params"])

    def initial(self):
        def init(key):
            params = self._params(key)
            return {"params": params, "opt_state": without_weak_types(self.optimizer.init(params))}

        places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        return jax.jit(init, out_shardings=places)(jax.random.key(self.config.run.seed))

    def sums(self, params, batch, rest, *frozen):
        with meshes.use(self.mesh):
            return updates.loss_sums(self.model, params, batch)

    def evaluate(self, state, watch=unwatched):
        limit = self.config.run.evaluation_tokens
        batches = self.evaluation_batches(self.dataset.validation, "validation", watch, limit)
        found = updates.evaluate(self.evaluation_step, state["params"], batches)
        return found, f"validation loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}"

    def summary(self, state, evaluations):
        config, last = self.config, evaluations[-1] if evaluations else {}
        wants_trigram, length = config.run.trigram, config.data.sequence_length
        entries = {
            "preset": config.preset,
            "parameters": llama.parameter_count(config.model),
            "validation_loss": last.get("loss"),
            "perplexity": last.get("perplexity"),
            "script_perplexity": last.get("script_perplexity"),
            "trigram_loss": trigram_loss(config, self.dataset, length) if wants_trigram else None,
        }
        if state is not None and config.run.sample_tokens:
            entries["sample"] = sampled(config, self.dataset.tokenizer, self.model, state["params"])
        return entries
