"""Fine-tuning as a task of the training loop: adapters or the whole model, from a base.

The base stays as it is.

Beside the files of every run, the folder holds model.json: what the tuned model is (architecture,
tokenizer, classes). A checkpoint holds what trains, the optimizer's state and the frozen arrays of
the adapters; the base is named in config.json by its folder and in the checkpoint by a digest of
its parameters, which a resumed run compares.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax

import lowrank_jax as lrx
from experiments.data import Dataset
from experiments.data.tuning import TuningDataConfig, load_tuning
from experiments.finetuning.base import parameter_digest
from experiments.finetuning.model import MODEL, Model, size
from experiments.finetuning.sources import open_base
from experiments.harness import objectives, optimizers, runs
from experiments.harness.tasks import (
    Task,
    placed,
    sampled,
    trigram_loss,
    unwatched,
    without_weak_types,
)
from experiments.harness.workdir import tree_bytes
from experiments.models import llama, vit
from experiments.settings.configuration import smallest_dimension
from experiments.settings.finetuning_configuration import TuningConfig
from experiments.settings.sections import ConfigurationError
from lowrank_jax.sharding import meshes


class Finetuning(Task):
    """A base on new data."""

    evaluates_first = True

    def __init__(self, config: TuningConfig, devices: Sequence[Any] | None = None):
        super().__init__(config.mesh, devices)
        self.config = config
        # only what describes the base is read; its parameters come when all else is known to fit
        self.base = open_base(config.base, config.run.seed, config.data.tokenizer)
        self.dataset = open_data(config.data, self.base.tokenizer, config.run.seed)
        self._check_base()
        self.model = Model(config, self.base, self.dataset.classes)
        self._check_optimizer()
        self.domain = self._open_domain()
        self.parts, self.exact = self.model.parts, self.model.config.dtype == "float32"
        self.rate = optimizers.schedule(config.schedule, config.optimizer.learning_rate)
        self.place, self.stacked = self.base.placing(self.mesh), self.model.config.scan
        kernels = self.place(self.model.shapes)
        self.shapes, self.places = self.parts.abstract, self.parts.shardings(kernels)
        self.choose()
        # kernels of adapters run where the mesh knows how the frozen matrices lie
        self._known = (
            jax.tree.map(placed, self.model.shapes, kernels) if self.parts.adapts else None
        )
        self.work = self._work()
        self._digest: str | None = None
        self.objective = objectives.classes if self.dataset.classes else objectives.language
        self._run = lrx.adapted(self._loss) if self.parts.adapts else self._loss
        self._check_types(jax.tree.map(placed, self.model.shapes, kernels))
        if self.parts.needs_base:
            self.frozen = self.parts.cut_off(self._read_base())
        self._measure = {name: jax.jit(self._sums_of(name)) for name in ("own", "domain")}

    # what can be wrong, before any work

    def _check_base(self):
        config, base, data = self.config, self.base, self.dataset
        if config.data.has_images != base.is_vit:
            kind = "images" if config.data.has_images else "text"
            remedy = "a vision transformer" if config.data.has_images else "a language model"
            raise ConfigurationError(
                f"data.name={config.data.name!r}: holds {kind}, the base {base.source!r} is "
                f"another kind of model; give base.source or base.preset {remedy}, or other data"
            )
        if base.is_vit:
            shape = data.train.images.shape[1:]
            wanted = (base.config.image, base.config.image, base.config.channels)
            if shape != wanted:
                raise ConfigurationError(
                    f"data.name={config.data.name!r}: images {shape}, the base takes {wanted}"
                )
            return
        room, longest = base.config.vocabulary_size, base.config.sequence_length
        if data.vocabulary_size > room:
            raise ConfigurationError(
                f"data.tokenizer={config.data.tokenizer!r}: has {data.vocabulary_size} tokens, the "
                f"base {room}; give the base's own tokenizer"
            )
        if config.data.length > longest:
            raise ConfigurationError(
                f"data.sequence_length={config.data.sequence_length!r}: {config.data.length} "
                f"tokens, the base takes {longest}; shorten it"
            )

    def _check_optimizer(self):
        settings, model = self.config.optimizer, self.model.config
        smallest = min(model.width, model.hidden) if self.base.is_vit else smallest_dimension(model)
        if isinstance(settings.rank, int) and settings.rank > smallest:
            raise ConfigurationError(
                f"optimizer.rank={settings.rank}: the base's smallest matrix dimension is "
                f"{smallest}; go no higher"
            )

    def _check_types(self, base):
        """Trace the update on an explicit mesh, before the base is read.

        Not every adapter says what is placed where.
        """
        if not self.config.mesh.explicit:
            return
        frozen = self.parts.cut_off(base) if self.parts.needs_base else ()
        try:
            jax.eval_shape(self.update(), self.abstract, self.batch_shapes(), *frozen)
        except Exception as error:  # jax's own has no public name
            raise ConfigurationError(
                f"mesh.explicit=True: adapter.method={self.config.adapter.method!r} on these "
                f"kernels does not say where its results lie ({str(error).splitlines()[0]}); set "
                "mesh.explicit=False"
            ) from error

    def _open_domain(self) -> Dataset | None:
        """The base's own data, where the tuned model can still be measured on it."""
        config = self.base.domain
        if config is None or not self.config.run.forgetting:
            return None
        try:
            domain = open_data(config, self.base.tokenizer, self.config.run.seed, trains=False)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"base.domain={self.config.base.domain!r}: {error}; run.forgetting=False does "
                "without it"
            ) from error
        return None if domain.classes and domain.classes != self.dataset.classes else domain

    # what is trained

    def _read_base(self):
        """The base's parameters, with the head that the data needs; the digest is of the former."""
        params = self.base.read(self.place)
        self._digest = parameter_digest(params)
        return self.model.with_head(params, self.config.run.seed, self.place)

    def _work(self) -> float:
        """Operations of an update.

        Of a frozen kernel's three products adapters need two; their own are not counted.
        """
        config, data = self.model.config, self.config.data
        if self.base.is_vit:
            all_products = vit.flops_per_image(config) * data.batch_size
        else:
            tokens = data.batch_size * data.length
            all_products = llama.flops_per_token(config, data.length) * tokens
        # without the gradient of the frozen kernels
        return all_products * 2 / 3 if self.parts.adapts else all_products

    def meaning(self):
        return self.model.meaning()

    def headline(self):
        report = self.parts.report.replace("\n", "\n  ")
        measured = "; forgetting is not measured"
        if self.domain is not None:
            measured = f"; forgetting on {self.domain.description}"
        elif self.base.domain is not None and self.config.run.forgetting:
            measured += ", because the base's domain has other classes"
        name = self.config.optimizer.name
        return f"{self.base.source}; {name}; {self.dataset.description}{measured}\n  {report}"

    def initial(self):
        tree = self.frozen[0] if self.parts.adapts else self._read_base()
        parts = self.parts.cut(tree, jax.random.key(self.config.run.seed), self.places)
        init = jax.jit(
            lambda params: without_weak_types(self.optimizer.init(params)),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.abstract["opt_state"]),
        )
        return without_weak_types({**parts, "opt_state": init(parts["params"])})

    def _loss(self, tree, batch):
        return self.objective(self.model.net, tree, batch)

    def sums(self, params, batch, rest, *frozen):
        with meshes.use(self.mesh, parameters=self._known):
            return self._run(self.parts.tree(params, rest, *frozen), batch)[:2]

    def record(self):
        if self._digest is None:
            self._read_base()
        remedy = "name the base that the run began with, or give another workdir"
        subject = f"base.source={self.config.base.source!r}: its parameters changed"
        return super().record() | {"base": (self._digest, subject, remedy)}

    def files(self):
        return super().files() | {MODEL: self.model.describe(self.config.data)}

    # what is measured

    def _sums_of(self, name: str):
        """`(params, rest, batch, *frozen)`, without dropout."""
        measured = self.domain if name == "domain" else self.dataset
        has_classes = measured is not None and bool(measured.classes)
        function = objectives.classes if has_classes else objectives.language
        run = lambda tree, batch: function(self.model.net, tree, batch)  # noqa: E731
        run = lrx.adapted(run) if self.parts.adapts else run

        def sums(params, rest, batch, *frozen):
            with meshes.use(self.mesh, parameters=self._known):
                return run(self.parts.tree(params, rest, *frozen), batch)

        return sums

    def _figures(self, name: str, state, batches) -> dict[str, float]:
        """Means over all tokens, or rows, of the batches."""
        rest = {key: value for key, value in state.items() if key == "fixed"}  # no dropout's key
        total, weight, right = 0.0, 0.0, 0.0
        for batch in batches:
            loss_sum, weight_sum, right_sum = self._measure[name](
                state["params"], rest, batch, *self.frozen
            )
            total, weight = total + float(loss_sum), weight + float(weight_sum)
            right += float(right_sum)
        weight = max(weight, 1.0)
        return {"loss": total / weight, "accuracy": right / weight, "tokens": int(weight)}

    def evaluate(self, state, watch=unwatched):
        own, limit = self.dataset.validation, self.config.run.evaluation_tokens
        found = self._figures(
            "own", state, self.evaluation_batches(own, "validation", watch, limit)
        )
        if self.dataset.classes:
            line = f"validation loss {found['loss']:.4f}, accuracy {found['accuracy']:.2%}"
        else:
            del found["accuracy"]
            found["perplexity"] = math.exp(min(found["loss"], 700.0))  # a double ends there
            line = f"validation loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}"
        if self.domain is not None:
            part = self.domain.validation
            batches = self.evaluation_batches(
                part, "base's domain", watch, self._domain_limit(own, part)
            )
            domain = self._figures("domain", state, batches)
            found |= {"domain_loss": domain["loss"], "domain_tokens": domain["tokens"]}
            line += f"; base's domain {domain['loss']:.4f}"
            if self.domain.classes:
                found["domain_accuracy"] = domain["accuracy"]
                line += f", accuracy {domain['accuracy']:.2%}"
        return found, line

    def _domain_limit(self, own, part) -> int:
        """How many tokens of the base's domain an evaluation takes.

        Where the configuration says none, so many that they are neither more rows nor more
        tokens than the evaluation of the run's own data, and forgetting costs at most as
        much.
        """
        settings = self.config.run
        rows = own.evaluated(settings.evaluation_tokens)
        return settings.domain_tokens or rows * min(own.length, part.length)

    def memory(self, compiled):
        rows = super().memory(compiled)
        more = {"frozen model": self.frozen, "frozen arrays": self.abstract.get("fixed", {})}
        sizes = {name: tree_bytes(tree) for name, tree in more.items()}
        extra = [
            {"component": name, "bytes_formula": n, "bytes_measured": n}
            for name, n in sizes.items()
            if n
        ]
        return [rows[0], *extra, *rows[1:]]

    def summary(self, state, evaluations):
        config, last = self.config, evaluations[-1] if evaluations else {}
        first = evaluations[0] if evaluations and evaluations[0]["step"] == 0 else {}
        # figures of the last evaluation, and of the first, from before any update
        kept = ("loss", "accuracy", "perplexity", "domain_loss", "domain_accuracy")
        named = {
            name: name if name.startswith(("domain", "perplexity")) else f"validation_{name}"
            for name in kept
        }
        entries: dict[str, Any] = {
            "base": config.base.source or config.base.preset,
            "base_digest": self._digest,
            "adapter": config.adapter.method or None,
            "parameters": size(self.model.shapes),
            "trainable_parameters": self.parts.count,
        }
        entries |= {named[name]: last.get(name) for name in kept}
        is_same_domain = first in runs.on_one_domain(evaluations)
        for name in kept:
            is_comparable = is_same_domain or not name.startswith("domain")
            entries[f"{named[name]}_before"] = first.get(name) if is_comparable else None
        wants_trigram, length = config.run.trigram, config.data.length
        entries["trigram_loss"] = (
            trigram_loss(config, self.dataset, length) if wants_trigram else None
        )
        if state is not None and config.run.sample_tokens:
            rest = {"fixed": state.get("fixed")}
            plain = jax.jit(self.parts.plain)(state["params"], rest, *self.frozen)
            entries["sample"] = sampled(config, self.dataset.tokenizer, self.model.net, plain)
        return entries


def open_data(
    config: TuningDataConfig, tokenizer: str, seed: int, *, trains: bool = True
) -> Dataset:
    """The dataset, or its validation alone; whatever is wrong with it is a ConfigurationError."""
    try:
        if not (config.has_images or config.tokenizer or tokenizer):
            raise ValueError(
                "data.tokenizer='': the base's folder has no tokenizer.json or tokenizer.model; "
                "name one, or 'bytes'"
            )
        return load_tuning(config, tokenizer, seed, trains=trains)
    except (ValueError, OSError, ImportError) as error:
        raise ConfigurationError(str(error)) from error


def conclusion(summary: dict[str, Any]) -> str:
    """The last lines of a run that is over: what trained, and each figure before and after."""
    trained, total = summary["trainable_parameters"], summary["parameters"]
    lines = [f"trained {trained:,} of {total:,} parameters ({trained / total:.3%})"]

    def compare(title, key, show):
        before, after = summary[f"{key}_before"], summary[key]
        if before is not None and after is not None:
            lines.append(f"{title:<24} {show(before)} before, {show(after)} after")

    compare("validation loss", "validation_loss", "{:.4f}".format)
    if summary["trigram_loss"] is not None:
        lines.append(f"{'trigram loss':<24} {summary['trigram_loss']:.4f}")
    compare("validation accuracy", "validation_accuracy", "{:.2%}".format)
    compare("loss on base's domain", "domain_loss", "{:.4f}".format)
    compare("accuracy there", "domain_accuracy", "{:.2%}".format)
    return "\n".join(lines)
