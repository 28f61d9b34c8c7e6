"""The model of a fine-tuning run, and what of it trains: all of it, or adapters.

Both ways cut plain parameters into the part of a state that trains and the arguments that do not, and
put them together again: with adapters attached for the model to run, or as plain parameters.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_jax as lrx
from experiments.data.tuning import TuningDataConfig
from experiments.finetuning.base import EXPORTED, Base, Place, parameter_shapes
from experiments.harness import objectives
from experiments.models import llama, vit
from experiments.settings.finetuning_configuration import AdapterConfig, TuningConfig
from experiments.settings.sections import ConfigurationError

MODEL = "model.json"  # what the tuned model is, in the folder of a run
LAYERS = r"layers/.*"  # the stack of a scanned model


PATCHES = "patch_embed/kernel"  # of a vision transformer: (P, P, C, D)


def size(tree) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


class Parts:
    """The two ways to train share this interface.

    Attributes:
      abstract: shapes of the parts of a state: "params", what trains, and what else it must keep.
      count: numbers that train.
      report: what trains, in words.
      adapts: the tree to run the model with holds adapters.
      needs_base: there are frozen arguments.
    """

    abstract: dict[str, Any]
    count: int
    report: str
    adapts: bool
    needs_base: bool

    def shardings(self, kernels) -> dict[str, Any]:
        """Where the parts of a state lie when plain parameters lie as these NamedShardings say."""
        raise NotImplementedError

    def cut(self, tree, key, places) -> dict[str, Any]:
        """The parts of a state that starts from plain parameters, which lie as `shardings` says."""
        raise NotImplementedError

    def cut_off(self, tree) -> tuple:
        """The frozen arguments."""
        raise NotImplementedError

    def tree(self, params, rest, *frozen):
        """Parameters to run the model with; `rest` is what the state holds beside "params"."""
        raise NotImplementedError

    def plain(self, params, rest, *frozen):
        """Plain parameters, the adapters worked in."""
        raise NotImplementedError

    def merged(self, params, rest, *frozen):
        """As `plain`, matrix by matrix and only if all of it is finite; not under jit."""
        raise NotImplementedError


class Whole(Parts):
    """Every leaf trains, but those that the loss does not reach, which are the frozen argument."""

    adapts = False

    def __init__(self, shapes, unreached: tuple[str, ...]):
        self.unreached = tuple(name for name in unreached if name in shapes)
        self.abstract = {
            "params": {name: leaf for name, leaf in shapes.items() if name not in self.unreached}
        }
        self.count = size(self.abstract["params"])
        self.needs_base = bool(self.unreached)
        rest = f" (the loss does not reach {', '.join(self.unreached)})" if self.unreached else ""
        self.report = f"all {self.count:,} of {size(shapes):,} parameters train{rest}"

    def shardings(self, kernels):
        return {"params": {name: kernels[name] for name in self.abstract["params"]}}

    def cut(self, tree, key, places):
        """The given leaves themselves, not copies."""
        del key, places
        return {"params": {name: leaf for name, leaf in tree.items() if name not in self.unreached}}

    def cut_off(self, tree):
        return ({name: tree[name] for name in self.unreached},) if self.unreached else ()

    def tree(self, params, rest, *frozen):
        del rest
        return {**params, **(frozen[0] if frozen else {})}

    plain = merged = tree


class Adapted(Parts):
    """Adapters of a frozen model, and what trains beside them.

    The state also has "fixed", the frozen arrays of the adapters, and "key", which dropout draws
    from. The one frozen argument is the plain tree.
    """

    adapts = needs_base = True

    def __init__(self, config: AdapterConfig, shapes, *, scan: bool, new: tuple[str, ...]):
        """`new` holds patterns of leaves that train in full because the base has none of them."""
        rules = config.parsed()
        # a convolution of patches is a matrix of (pixels, width), where a rule asks for it
        is_targeted = any(re.fullmatch(pattern, PATCHES) for pattern, _ in rules)
        patches = ((PATCHES, lrx.MatrixView(rows=(0, 1, 2), cols=(3,))),) if is_targeted else ()
        self.views = lrx.Views(stacked=(LAYERS,) if scan else (), rules=patches)
        self._options: dict[str, Any] = {
            "rules": rules,
            "exclude": config.exclude,
            "layers": config.layers,
            "trainable": (*config.whole, *new),
            "bias": config.bias,
            "views": self.views,
        }
        # abstract: what it trains is known, and checked, before any parameter is read
        try:
            self._adaptation = jax.eval_shape(self._adapt, shapes, jax.random.key(0))
        except ValueError as error:
            raise ConfigurationError(f"adapter.method={config.method!r}: {error}") from error
        key = jax.eval_shape(jax.random.key, 0)
        self.abstract = {
            "params": self._adaptation.train,
            "fixed": self._adaptation.frozen,
            "key": key,
        }
        self.count = self._adaptation.trained
        self.report = str(self._adaptation)

    def _adapt(self, tree, key):
        return lrx.adapt(tree, key=key, **self._options)

    def shardings(self, kernels):
        train, fixed = lrx.adapters.shardings(self._adaptation, kernels)
        mesh = jax.tree.leaves(kernels)[0].mesh
        return {"params": train, "fixed": fixed, "key": jax.NamedSharding(mesh, jax.P())}

    def cut(self, tree, key, places):
        """Leaves that train in full are copies, because a state is donated to its update."""

        def make(tree, key):
            made, left = jax.random.split(key)  # for the factors; for dropout
            adaptation = self._adapt(tree, made)
            in_full = {path: leaf.copy() for path, leaf in adaptation.train["trainable"].items()}
            return {
                "params": adaptation.train | {"trainable": in_full},
                "fixed": adaptation.frozen,
                "key": left,
            }

        return jax.jit(make, out_shardings=places)(tree, key)

    def cut_off(self, tree):
        return (tree,)

    def adaptation(self, params, rest) -> lrx.adapters.Adaptation:
        """The adapters with the arrays of a state."""
        return self._adaptation.replace(train=params, frozen=rest["fixed"])

    def tree(self, params, rest, *frozen):
        """With dropout where `rest` has a key."""
        return lrx.attach(frozen[0], self.adaptation(params, rest), key=rest.get("key"))

    def plain(self, params, rest, *frozen):
        return lrx.effective(frozen[0], self.adaptation(params, rest))

    def merged(self, params, rest, *frozen):
        return lrx.merge(frozen[0], self.adaptation(params, rest))


class Model:
    """The network that is tuned, its parts that train, and what its head is for.

    Attributes:
      config, net: of the model.
      parts: `Whole` or `Adapted`.
      shapes: of the plain parameters.
      classes: of the head, () for a language model.
      is_new_head: the base has no head for these classes.
    """

    def __init__(self, config: TuningConfig, base: Base, classes: tuple[str, ...]):
        self.base, self.classes, self.adapter = base, classes, dataclasses.asdict(config.adapter)
        self.is_new_head = bool(classes) and base.classes != classes
        unreached: tuple[str, ...] = ()
        self.net: vit.Vit | llama.Llama
        if base.is_vit:  # its head is for classes, and of the base's own configuration
            self.config = dataclasses.replace(base.config, classes=len(classes))
            self.net, self.head = vit.Vit(self.config), "head"
            self.shapes = parameter_shapes(self.config)
        else:  # a classifier stands beside the head for tokens, which it does not need
            self.config = base.config
            self.net, self.head = llama.Llama(self.config), objectives.CLASSIFIER
            self.shapes = parameter_shapes(self.config, len(classes))
            unreached = ("lm_head",) if classes else ()
        if config.adapter.method:
            new = (f"{self.head}/.*",) if self.is_new_head else ()
            self.parts: Parts = Adapted(config.adapter, self.shapes, scan=self.config.scan, new=new)
        else:
            self.parts = Whole(self.shapes, unreached)

    def with_head(self, params, seed: int, place: Place):
        """The base's parameters with a new head, drawn from the seed, where it needs one."""
        if not self.is_new_head:
            return params
        wanted = {self.head: self.shapes[self.head]}

        def draw(key):
            """Kernels as the model's own, biases zero."""

            def one(leaf):
                if leaf.ndim < 2:
                    return jnp.zeros_like(leaf)
                return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

            return jax.tree.map(one, wanted)

        return params | jax.jit(draw, out_shardings=place(wanted))(jax.random.key(seed))

    def meaning(self) -> dict[str, dict[str, Any]]:
        """{section: {key: value}} without which the arrays of a run mean nothing."""
        own = {
            "model": dataclasses.asdict(self.config),
            "description": {"classes": list(self.classes)},
        }
        return own | {"adapter": self.adapter}

    def describe(self, data: TuningDataConfig) -> dict[str, Any]:
        """What `experiments.finetuning.base.read_description` reads back."""
        return {
            "format": EXPORTED,
            "architecture": "vit" if self.base.is_vit else "llama",
            "model": dataclasses.asdict(self.config),
            "tokenizer": data.tokenizer or self.base.tokenizer,
            "classes": list(self.classes),
            "domain": dataclasses.asdict(
                dataclasses.replace(data, tokenizer=data.tokenizer or self.base.tokenizer)
            ),
        }
