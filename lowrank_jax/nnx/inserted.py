"""Models that hold their adapters: `lrx.nnx.insert` and what belongs to it."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from lowrank_jax.adapters.adaptation import Adaptation
from lowrank_jax.adapters.base import Adapter, Site
from lowrank_jax.adapters.hosts import Bound, axis_names
from lowrank_jax.adapters.tree import site_keys
from lowrank_jax.nnx import calls
from lowrank_jax.nnx.variables import AdaptedParam, AdapterConstant, AdapterParam, FrozenParam

_PLACING = ("eager_sharding", "sharding_rules", "mesh")


class AdapterOfLayer(nnx.Module):
    """One adapter of one layer, beside its kernel.

    Attributes:
      trained, frozen: its arrays, with the leading axes of the kernel.
      keys: of a stochastic adapter, or None before `seed_dropout`.
      deterministic: no dropout; `model.train()` and `model.eval()` set it where the adapter is
        stochastic.
      name: of the adaptation.
      adapter, site: static.
      shares: whether its group shares arrays, which live on the root.
    """

    def __init__(
        self, name: str, adapter: Adapter, site: Site, trained: dict, frozen: dict, shares: bool
    ):
        self.name, self.adapter, self.site, self.shares = name, adapter, site, shares
        self.trained, self.frozen = nnx.Dict(trained), nnx.Dict(frozen)
        self.keys: Any = nnx.data(None)
        if adapter.stochastic:
            self.deterministic = True

    def bound(self, groups: calls.Groups) -> Bound:
        """It, as a kernel with adapters holds it; `groups` share arrays."""
        shared = groups.get((self.name, self.site.group), {}) if self.shares else {}
        if self.shares and not shared:
            raise ValueError(
                f"adapters of {self.site.path!r}: {self.adapter.kind} shares arrays that live on "
                "the model, and a part of it is called on its own; call the model, or write "
                "`with lrx.nnx.sharing(model): ...` around the call"
            )
        keys = None
        if not getattr(self, "deterministic", True):
            if self.keys is None:
                raise ValueError(
                    f"adapters of {self.site.path!r}: the model trains with dropout that has no "
                    "keys; call lrx.nnx.seed_dropout(model, key) in each step, or model.eval()"
                )
            keys = self.keys.get_value()
        arrays = {
            name: value.get_value()
            for part in (self.trained, self.frozen)
            for name, value in part.items()
        }
        return Bound(arrays, shared, keys, None, self.adapter, self.site)


def insert(model: nnx.Module, adaptation: Adaptation) -> None:
    """Gives the layers of a model the adapters of an adaptation, in place; again, for one more that
    acts after it.

    Any parameter can be adapted. The model changes its class, to one whose call is `lrx.adapted`;
    everything keeps its path, and `nnx.split`, `nnx.jit`, `nnx.scan`, `nnx.grad` and their like work
    as before. Of Variables there are then four types, which filters tell apart, and no `nnx.Param`:

    - `AdapterParam`, what trains: `up/kernel_adapters/0/trained/a`, leaves trained in full in their
      places, and what a group shares, `adapter_groups/default/unilora/trained/theta`;
    - `AdapterConstant`: frozen arrays of adapters;
    - `FrozenParam`: the parameters of the base model; `AdaptedParam`, which derives from it, the
      adapted ones.

    Make optimizers and references to Variables afterwards. Call the model; another of its methods, or
    a part of it, by `lrx.nnx.adapted(function)(model, ...)`: outside of these, a kernel that is read is
    an error that names it. What a group shares (Uni-LoRA, VeRA) lives on the model: call a part alone
    within `lrx.nnx.sharing(model)`. Choices by row (`lrx.adapters.candidates`) are for `lrx.attach`.

    Args:
      model: of which `lrx.adapt(nnx.to_pure_dict(nnx.state(model, nnx.Param)), ...)` made the
        adaptation.
      adaptation: one.

    Raises:
      ValueError: naming the path: a leaf that is missing, or of another shape; parameters that no
        module of nnx holds directly; a name that is already there; candidates.

    >>> import jax, jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> import lowrank_jax as lrx
    >>> model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    >>> params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    >>> lrx.nnx.insert(model, lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(0)))
    >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=lrx.nnx.AdapterParam)
    >>> loss = lambda model: jnp.mean(model(jnp.ones((3, 4))) ** 2)
    >>> grads = nnx.grad(loss, argnums=nnx.DiffState(0, lrx.nnx.AdapterParam))(model)
    >>> _ = optimizer.update(model, grads)
    >>> [leaf.shape for leaf in jax.tree.leaves(nnx.state(model, lrx.nnx.AdapterParam))]
    [(4, 2), (2, 6)]
    """
    layout = adaptation.layout
    holders = {"/".join(map(str, path)): own for path, own in calls.holders(model).items()}
    _check(model, adaptation, holders)
    for path, places in holders.items():
        module, attribute = places[0]
        variable = vars(module)[attribute]
        kind, value, metadata = _retyped(variable, path, adaptation)
        new = kind.from_metadata(value, metadata)
        for module, attribute in places:
            setattr(module, attribute, new)
        if path not in layout.by_path:
            continue
        name = attribute + calls.ADAPTERS
        listed = getattr(module, name) if hasattr(module, name) else nnx.List([])
        listed.append(_adapter_of(adaptation, path, variable))
        for module, _ in places:
            setattr(module, name, listed)
    shared = _groups(adaptation)
    if shared:
        groups = getattr(model, calls.GROUPS, None)
        setattr(model, calls.GROUPS, nnx.Dict(dict(groups or {}) | {layout.name: nnx.Dict(shared)}))
    calls.set_class(model, calls.holding(type(model)))


def _check(
    model: nnx.Module, adaptation: Adaptation, holders: dict[str, list[tuple[nnx.Module, str]]]
) -> None:
    """ValueError, before anything is changed, if the adaptation does not fit the model."""
    layout = adaptation.layout
    paths = {"/".join(map(str, path)) for path in calls.parameter_paths(model)}
    if paths - set(holders):
        raise ValueError(
            f"parameters {sorted(paths - set(holders))} are in containers where they cannot be "
            "replaced; hold them in modules, nnx.List or nnx.Dict"
        )
    if layout.candidates:
        raise ValueError(
            f"{layout.name!r} holds candidates {layout.candidates} for rows; attach it to the "
            "parameters, lrx.attach, and call lrx.adapted(function)"
        )
    known = {one.name for _, one in nnx.iter_graph(model) if isinstance(one, AdapterOfLayer)}
    if layout.name in known:
        raise ValueError(
            f"the model has an adaptation {layout.name!r} already; give lrx.adapt another name="
        )
    missing = [path for path in (*layout.by_path, *layout.trainable) if path not in holders]
    if missing:
        raise ValueError(
            f"leaves {missing} are no parameters of the model, which has {sorted(holders)[:12]}"
        )
    for path, (_, site) in layout.by_path.items():
        for module, name in holders[path]:
            value = vars(module)[name].get_value()
            if tuple(value.shape) != site.shape:
                raise ValueError(
                    f"adapted leaf {path!r}, {site.shape}, is of shape {tuple(value.shape)} in the "
                    "model"
                )


def _retyped(
    variable: nnx.Variable, path: str, adaptation: Adaptation
) -> tuple[Any, Any, dict[str, Any]]:
    """Type, value and metadata of what stands in the place of a parameter."""
    metadata, value = variable.get_metadata(), variable.get_raw_value()
    if path in adaptation.layout.by_path:
        return AdaptedParam, value, metadata | {"adapted": path}
    if path in adaptation.layout.trainable:
        return AdapterParam, adaptation.train["trainable"][path], metadata
    return (type(variable) if isinstance(variable, FrozenParam) else FrozenParam), value, metadata


def _adapter_of(adaptation: Adaptation, path: str, kernel: nnx.Variable) -> AdapterOfLayer:
    """The module of one site; its arrays are named and placed along the axes of the kernel."""
    adapter, site = adaptation.layout.by_path[path]
    placing = {key: value for key, value in kernel.get_metadata().items() if key in _PLACING}
    names = kernel.get_metadata("out_sharding", None)

    def variables(kind: type, arrays: dict[str, jax.Array]) -> dict[str, nnx.Variable]:
        made = {}
        for key, x in arrays.items():
            own = (
                {}
                if names is None
                else {"out_sharding": axis_names(adapter, site, key, x.ndim, tuple(names))}
            )
            made[key] = kind(x, **placing, **own)
        return made

    trained = variables(AdapterParam, adaptation.train["sites"].get(path, {}))
    frozen = variables(AdapterConstant, adaptation.frozen["sites"].get(path, {}))
    shares = bool(adaptation.arrays(path)["shared"])
    return AdapterOfLayer(adaptation.layout.name, adapter, site, trained, frozen, shares)


def _groups(adaptation: Adaptation) -> dict[str, nnx.Dict]:
    """What the groups of an adaptation share, as modules of the root."""
    found = {}
    for group in adaptation.layout.groups:
        trained = {
            key: AdapterParam(x) for key, x in adaptation.train["shared"].get(group, {}).items()
        }
        frozen = {
            key: AdapterConstant(x) for key, x in adaptation.frozen["shared"].get(group, {}).items()
        }
        if trained or frozen:
            found[group] = nnx.Dict(trained=nnx.Dict(trained), frozen=nnx.Dict(frozen))
    return found


def _adapters(model: nnx.Module) -> list[AdapterOfLayer]:
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, AdapterOfLayer)]


def seed_dropout(model: nnx.Module, key: jax.Array) -> None:
    """Writes the keys of all stochastic adapters (dropout), of its own for each layer; call it in
    each training step.

    They draw while `model.train()` holds; `model.eval()` and a model as it is inserted are
    deterministic. The masks are those of `lrx.attach(params, adaptation, key=key)`.

    Raises:
      ValueError: if no adapter is stochastic.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> import lowrank_jax as lrx
    >>> model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    >>> params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    >>> lrx.nnx.insert(
    ...     model, lrx.adapt(params, lrx.adapters.lora(rank=2, dropout=0.5), jax.random.key(0))
    ... )
    >>> model.train()
    >>> seed_dropout(model, jax.random.key(1))
    """
    found = [one for one in _adapters(model) if hasattr(one, "deterministic")]
    if not found:
        raise ValueError(
            "no adapter of the model has dropout; adapt with lora(rank=..., dropout=0.1), or leave "
            "it out"
        )
    for one in found:
        keys = site_keys(key, one.name, one.adapter, one.site)
        if one.keys is None:
            one.keys = AdapterConstant(keys)
        else:
            one.keys.set_value(keys)


def extract(model: nnx.Module, adaptation: Adaptation) -> tuple[dict[str, Any], Adaptation]:
    """The parameters of the base model as a pure dict, and the adaptation with the arrays that the
    model holds.

    For `lrx.merge`, files, and another model. Leaves trained in full are in both.

    Raises:
      ValueError: if the model does not hold this adaptation.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> import lowrank_jax as lrx
    >>> model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    >>> params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    >>> adaptation = lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(0))
    >>> lrx.nnx.insert(model, adaptation)
    >>> sorted(lrx.merge(*lrx.nnx.extract(model, adaptation)))
    ['bias', 'kernel']
    """
    layout = adaptation.layout
    found = {one.site.path: one for one in _adapters(model) if one.name == layout.name}
    missing = [path for path in layout.by_path if path not in found]
    if missing:
        raise ValueError(
            f"adaptation {layout.name!r}: the model has no adapters of it at {missing}; insert it "
            "first"
        )

    def is_base(path: tuple[Any, ...], value: Any) -> bool:
        return isinstance(value, FrozenParam) or "/".join(map(str, path)) in layout.trainable

    base = nnx.to_pure_dict(nnx.state(model, is_base))
    flat = {
        "/".join(map(str, keys)): value
        for keys, value in nnx.to_flat_state(nnx.state(model, AdapterParam))
    }
    groups = getattr(model, calls.GROUPS, {}).get(layout.name, {})
    values = lambda variables: {key: value.get_value() for key, value in variables.items()}  # noqa: E731
    trees: dict[str, Any] = {"train": {}, "frozen": {}}
    for name, part in (("train", "trained"), ("frozen", "frozen")):
        before = getattr(adaptation, name)
        trees[name] = {
            "shared": {group: values(groups[group][part]) for group in before["shared"]},
            "sites": {path: values(getattr(found[path], part)) for path in before["sites"]},
        }
    trees["train"]["trainable"] = {path: flat[path].get_value() for path in layout.trainable}
    return base, adaptation.replace(train=trees["train"], frozen=trees["frozen"])
