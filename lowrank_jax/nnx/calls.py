"""Calls of models that hold their adapters: attach, then adapted(call), then write back.

    values   = of every Variable; a kernel's is a node with the adapters beside it
    program  = merge the values, call, split                        read by `lrx.adapted`
    model    <- what the call wrote: statistics, counts, caches, what it sowed

Within the program the adapters themselves have no values: scans slice and return none of them.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from lowrank_jax.adapters.hosts import AdaptedKernel
from lowrank_jax.functions.adapted import adapted as read_nodes
from lowrank_jax.nnx.variables import AdaptedParam, FrozenParam

ADAPTERS, GROUPS = "_adapters", "adapter_groups"
_TAG = "lowrank_jax.nnx"

Path = tuple[Any, ...]
Groups = dict[tuple[str, str], dict[str, jax.Array]]

_LENT: contextvars.ContextVar[Groups | None] = contextvars.ContextVar("lent", default=None)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Structure:
    """A model without its values: what `nnx.split` says of it, and the paths of its Variables."""

    graphdef: Any
    paths: tuple[Path, ...]


def adapted(
    function: Callable[..., Any], *, aux: bool = False, dense: str | tuple[str, ...] = ()
) -> Callable[..., Any]:
    """`function(model, *args, **kwargs)` of a model that holds its adapters: for what is not its call.

    The call of the model itself is this already. `function` is another method, or a part of the
    model: `lrx.nnx.adapted(Model.encode)(model, x)`, `lrx.nnx.adapted(lambda model, x:
    model.head(x))(model, x)`. What it writes, to the model or to other objects of nnx that it is given,
    is written. It may leave kernels of the model unused.

    Args:
      function: of a model that `lrx.nnx.insert` gave adapters, or of a part of one.
      aux, dense: as of `lrx.adapted`.

    Raises:
      ValueError: as `lrx.adapted` does; if adapters of a part share arrays that live on the model.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> import lowrank_jax as lrx
    >>> model = nnx.Embed(9, 4, rngs=nnx.Rngs(0))
    >>> params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    >>> rules = {"embedding": lrx.adapters.lora(rank=2)}
    >>> lrx.nnx.insert(model, lrx.adapt(params, rules, jax.random.key(0)))
    >>> model(jnp.arange(3)).shape
    (3, 4)
    >>> lrx.nnx.adapted(nnx.Embed.attend)(model, jnp.ones((3, 4))).shape
    (3, 9)
    """

    def program(before: _Structure, values: list[Any], others: Any) -> Any:
        state = nnx.from_flat_state(zip(before.paths, values, strict=True))
        with nnx.merge_context(_TAG, inner=True) as context:
            objects = context.merge(before.graphdef, state)
        args, kwargs = _with_objects(others, objects)
        start = nnx.graphdef(objects)
        with _bare(objects):
            result = function(*args, **kwargs)
        same = nnx.graphdef(objects) == start
        with nnx.split_context(_TAG) as context:
            graphdef, state = context.split(objects)
        paths, found = _flat(state)
        given = dict(zip(before.paths, map(id, values), strict=True))
        changed = [
            None if id(x) == given.get(path) else x for path, x in zip(paths, found, strict=True)
        ]
        return result, _Structure(graphdef, paths), same, changed

    read = read_nodes(program, partial=True, aux=aux, dense=dense)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        objects, others = _objects_of((args, kwargs))
        with nnx.update_context(_TAG):
            nodes = attached(objects)
            with nnx.split_context(_TAG) as context:
                graphdef, state = context.split(objects)
            paths, values = _flat(state)
            given = [
                None if _is_adapters(path) else nodes.get(path, x)
                for path, x in zip(paths, values, strict=True)
            ]
            found = read(_Structure(graphdef, paths), given, others)
            (result, after, same, changed), *beside = found if aux else (found,)
            if not same or any(x is not None for x in changed):
                before = dict(zip(paths, values, strict=True))
                state = nnx.from_flat_state(
                    (path, before[path] if x is None or isinstance(x, AdaptedKernel) else x)
                    for path, x in zip(after.paths, changed, strict=True)
                )
                with nnx.merge_context(_TAG, inner=False) as context:
                    context.merge(after.graphdef, state)
        return (result, *beside) if beside else result

    return run


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an object of nnx stood, by its number."""

    number: int


def _objects_of(tree: Any) -> tuple[list[Any], Any]:
    """The objects of nnx in a tree, and the tree without them."""
    is_object = lambda x: isinstance(x, nnx.Pytree | nnx.Variable)  # noqa: E731
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_object)
    objects = [leaf for leaf in leaves if is_object(leaf)]
    places = map(_Place, range(len(objects)))
    others = [next(places) if is_object(x) else x for x in leaves]
    return objects, jax.tree.unflatten(treedef, others)


def _with_objects(tree: Any, objects: list[Any]) -> Any:
    """The inverse of `_objects_of`."""
    is_place = lambda x: isinstance(x, _Place)  # noqa: E731
    put = lambda x: objects[x.number] if is_place(x) else x  # noqa: E731
    return jax.tree.map(put, tree, is_leaf=is_place)


def _flat(state: Any) -> tuple[tuple[Path, ...], list[Any]]:
    """`(paths, values)` of the Variables of a state."""
    flat = nnx.to_flat_state(state)
    raw = lambda x: x.get_raw_value() if isinstance(x, nnx.Variable) else x  # noqa: E731
    return tuple(tuple(path) for path, _ in flat), [raw(x) for _, x in flat]


def _is_adapters(path: Path) -> bool:
    """Whether a path is one of adapters, which go with their kernels."""
    return any(
        isinstance(name, str) and (name.endswith(ADAPTERS) or name == GROUPS) for name in path
    )


def attached(objects: list[Any]) -> dict[Path, AdaptedKernel]:
    """Their kernels with the adapters beside them, by their paths in the state of all."""
    groups = dict(_LENT.get() or {})
    for one in objects:
        groups |= groups_of(one)
    found = {}
    for path, places in holders(objects).items():
        module, name = places[0]
        own = tuple(one.bound(groups) for one in getattr(module, name + ADAPTERS, ()))
        if own:
            found[path] = AdaptedKernel(vars(module)[name].get_raw_value(), own)
    return found


def groups_of(model: Any) -> Groups:
    """What the groups of a model's adapters share."""
    return {
        (name, group): {
            key: value.get_value() for part in parts.values() for key, value in part.items()
        }
        for name, of_name in getattr(model, GROUPS, {}).items()
        for group, parts in of_name.items()
    }


def holders(model: Any) -> dict[Path, list[tuple[nnx.Module, str]]]:
    """Of every parameter that a module holds, by its path in the state, those modules and its name
    there."""
    found: dict[int, list[tuple[Path, nnx.Module, str]]] = {}
    for keys, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            for name, value in vars(node).items():
                if isinstance(value, nnx.Param | FrozenParam):
                    found.setdefault(id(value), []).append(((*keys, name), node, name))
    paths = set(map(tuple, parameter_paths(model)))
    named = {}
    for places in found.values():
        (path,) = {path for path, *_ in places} & paths
        named[path] = [(node, name) for _, node, name in places]
    return named


def parameter_paths(model: Any) -> list[Path]:
    """Of all parameters, in its state."""
    return [keys for keys, _ in nnx.to_flat_state(nnx.state(model, (nnx.Param, FrozenParam)))]


@contextlib.contextmanager
def _bare(objects: list[Any]) -> Iterator[None]:
    """Within it models are of their own classes, and their kernels, which a program is reading, can be
    read as arrays."""
    nodes = [node for _, node in nnx.iter_graph(objects)]
    kernels = [node for node in nodes if isinstance(node, AdaptedParam)]
    models = [(node, type(node)) for node in nodes if "calls" in vars(type(node))]
    for kernel in kernels:
        kernel.set_metadata(reading=True)
    for node, cls in models:
        set_class(node, cls.calls)
    yield
    for kernel in kernels:
        kernel.del_metadata("reading")
    for node, cls in models:
        set_class(node, cls)


@functools.cache
def holding(cls: Any) -> Any:
    """The class to which a model of a class changes that is given adapters; the same for all of them.

    It derives from it, and is to Flax what it is.
    """
    if "calls" in vars(cls):
        return cls
    attributes = {
        "__call__": adapted(cls.__call__),
        "__module__": cls.__module__,
        "calls": cls,
    }
    return type(cls)("Adapted" + cls.__name__, (cls,), attributes, pytree=cls._pytree__is_pytree)


def set_class(module: nnx.Module, cls: type) -> None:
    """Gives a module another class; Flax keeps no account of it among the module's attributes."""
    object.__setattr__(module, "__class__", cls)


@contextlib.contextmanager
def sharing(model: Any) -> Iterator[None]:
    """Within it `lrx.nnx.adapted(function)` of a part of a model knows what the adapters of the whole
    share.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> import lowrank_jax as lrx
    >>> model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    >>> params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    >>> uni_lora = lrx.adapters.uni_lora(rank=2, size=8)
    >>> lrx.nnx.insert(model, lrx.adapt(params, uni_lora, jax.random.key(0)))
    >>> with lrx.nnx.sharing(model):
    ...     y = lrx.nnx.adapted(nnx.Linear.__call__)(model.layers[0], jnp.ones((3, 4)))
    >>> y.shape
    (3, 6)
    """
    before = _LENT.set((_LENT.get() or {}) | groups_of(model))
    try:
        yield
    finally:
        _LENT.reset(before)
