"""Adapters in the files of Hugging Face PEFT: a folder with `adapter_model.safetensors` and
`adapter_config.json`.

    adaptation = lrx.interop.peft.load(folder, params, lrx.interop.llama.torch_name, views=views)
    lrx.interop.peft.save(folder, adaptation, params, lrx.interop.llama.torch_name, views=views)

    PEFT        ours            key after base_model.model.<module>.         shape, for a kernel (n, m)
    LORA        lora, dora      lora_A.weight, lora_B.weight                 (r, n), (m, r)
                                lora_embedding_A, lora_embedding_B           (r, V), (d, r)
                                lora_magnitude_vector                        (m,)
    HIRA        hira            hira_A, hira_B                               (r, n), (m, r)
    UNILORA     uni_lora        unilora_indices_{A,B}, unilora_scales_{A,B}  (r, n), (m, r); base_model.unilora_theta_d
    VERA        vera            vera_lambda_d, vera_lambda_b                 (r,), (m,); base_model.vera_{A,B}
    LOHA        loha            hada_w{1,2}_a, hada_w{1,2}_b                 (m, r), (r, n)
    OFT         oft             oft_R.weight                                 (n / β, β (β - 1) / 2)
    MISS        miss            miss_block                                   (r, m), (r, mini_r) or (m / r, r, r)
    FOURIERFT   fourierft       fourierft_spectrum                           (k,)
    SHIRA       shira           shira_weight, shira_indices                  (r (n + m),), (2, r (n + m))
    RANDLORA    rand_lora       randlora_lambda, randlora_gamma              (r, N), (N, p); base_model.randlora_{A,B}

Convolutions have `lora_A (r, c_in, window...)` and `lora_B (c_out, r, 1, ...)`. A stack of layers
is one leaf here and a module for each layer there. What PEFT trains in full (`modules_to_save`,
`bias`) is what `lrx.adapt` trains in full.

Of a table that the output layer shares (no leaf of its own here, `head` there) PEFT adapts the
look-up alone, which is `uses=("gather",)`; only LoRA with `ensure_weight_tying` adapts both, which
is an adapter that all products see. `load` and `save` keep them apart, the printed adaptation says
which, and what one leaf cannot say is refused.

Nothing is passed over: a tensor that is missing, unexpected or of another shape, and a field of the
configuration that would change the function and is not understood, is an error that lists all of
them. One that changes training alone, as a dropout that we do not have, is passed over with a
warning.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lowrank_jax.adapters.adaptation import Adaptation
from lowrank_jax.adapters.base import Adapter, Arrays
from lowrank_jax.checks import as_python
from lowrank_jax.interop import (
    _peft_config,
    _peft_parameters,
    _peft_tied,
    _peft_whole,
    _peft_writing,
    documents,
    llama,
    safetensors,
)
from lowrank_jax.interop._peft_config import PREFIX
from lowrank_jax.interop._peft_family import Family
from lowrank_jax.interop._peft_reading import TENSORS, Source, as_float
from lowrank_jax.interop._torch_layout import Host, Names, Tree, linen_name
from lowrank_jax.resolution import Views
from lowrank_jax.typing import Pytree


def load(
    folder: str | os.PathLike,
    params: Pytree,
    names: Names = linen_name,
    *,
    views: Views | None = None,
    convolutions: Sequence[str] = (),
    order: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    head: str | None = "lm_head",
    name: str = "default",
) -> Adaptation:
    """The adaptation of `params` that a folder of PEFT holds.

    Factors come as float32, leaves trained in full in their own dtype. The base is not changed: of a
    PiSSA or OLoRA that was saved without conversion the offset is found again from `params`, as
    PEFT does it.

    Args:
      folder: what PEFT's `save_pretrained` wrote.
      params: the base, as for `lrx.adapt`.
      names: `(path, index) -> torch's name` of a leaf's parameter,
        "model.layers.3.self_attn.q_proj.weight"; the index counts along the batch axes of a stack
        and is None for other leaves. A matrix of a parameter that holds all experts of a layer is
        "model.layers.3.mlp.experts.down_proj[7]", which PEFT adapts by `target_parameters`.
        `lrx.interop.llama.torch_name` for the LLaMA family, scanned
        or not; by default that of a linen tree, with dots for slashes.
      views: which axes are inputs, outputs and layers, as for `lrx.adapt`.
      convolutions: patterns of kernels `(window, c_in, c_out)` of one-dimensional convolutions,
        which look like a projection `(heads, head_dim, d)`. Those with more window axes need no
        word.
      order: for a Uni-LoRA without saved indices, the adapted modules in the order of torch's
        `named_modules()`; known where names is that of the LLaMA family. Of several adapted
        parameters of a module of experts their names, as torch makes them; known of transformers'
        gate_up_proj and down_proj.
      ignore: fields of the configuration to pass over, such as a dropout that we do not have.
      head: torch's name of the output layer. A tree with a table and no kernel of that name, nor of
        one called score, classifier or head, is one whose table the output layer shares, but for
        tables of positions and of token types; None if no output layer shares it, as of an encoder.
      name: of the adaptation.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: an unknown method; fields that are not understood; targets that take no module;
        missing, unexpected or misshapen tensors (all of a kind are listed); an output layer that
        shares a table and is adapted by itself, or a copy of the table that only the look-up reads.

    >>> import jax, jax.numpy as jnp, tempfile
    >>> import lowrank_jax as lrx
    >>> params = {"dense": {"kernel": jnp.ones((4, 6))}}
    >>> adaptation = lrx.adapt(params, lrx.adapters.lora(rank=2), jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files = save(folder, adaptation, params)
    ...     back = load(folder, params)
    >>> bool(
    ...     jnp.array_equal(
    ...         back.train["sites"]["dense/kernel"]["a"],
    ...         adaptation.train["sites"]["dense/kernel"]["a"],
    ...     )
    ... )
    True
    """
    tree = Tree.of(params, names, views or Views(), convolutions)
    source = Source.open(pathlib.Path(folder), tree, ignore, head, order)
    experts = {_peft_config.parameter_of(module) for module in source.hosts} - {*source.hosts}
    order = [module for module in order or () if module not in experts] or None
    in_order = lambda: _order(order, names, source.hosts)  # noqa: E731
    shared = source.family.shared(source.config, source.hosts, source.tensors, in_order)
    known = order is not None or names is llama.torch_name
    layout, matrices = source.layout(views or Views(), name, in_order() if known else None)
    train: dict[str, Pytree] = {
        "shared": {},
        "sites": {},
        "trainable": {path: source.leaf(path) for path in layout.trainable},
    }
    frozen: dict[str, Pytree] = {"shared": {}, "sites": {}}
    for group in layout.groups:
        for arrays, tree_of in ((shared.train, train), (shared.frozen, frozen)):
            if arrays:
                own = {name: jnp.asarray(as_float(x)) for name, x in arrays.items()}
                tree_of["shared"] |= {group: own}
    for path, (adapter, site) in layout.by_path.items():
        site_train, site_frozen = source.arrays(site, shared)
        # a family may train nothing of its own at a site
        train["sites"] |= {path: site_train} if site_train else {}
        scale = matrices[path].scale(adapter, site)
        frozen["sites"][path] = {"scale": scale} | site_frozen
    return Adaptation(train, frozen, layout, tuple(matrices.items()))


def save(
    folder: str | os.PathLike,
    adaptation: Adaptation,
    params: Pytree,
    names: Names = linen_name,
    *,
    views: Views | None = None,
    convolutions: Sequence[str] = (),
    order: Sequence[str] | None = None,
    head: str | None = "lm_head",
    **config: Any,
) -> list[pathlib.Path]:
    """Writes an adaptation as PEFT loads it onto the same base, and returns the files.

    Scales other than alpha / r (weights, masked ranks) are worked into the tensors. Starts with an
    offset (PiSSA, OLoRA) are written as LoRA of rank 2 r, which is exact; after
    `lrx.adapters.absorb` there is no offset, the rank stays, and the file belongs to the absorbed
    base. Which factor trains is not written.

    Args:
      folder: made when missing.
      adaptation: of one method.
      params: the base; of its values only those of modules that are trained in part are read.
      names, views, convolutions: as for `load`.
      order: with `save_indices=False`, and of parameters of experts, as for `load`.
      head: as for `load`. A table that the output layer shares, with an adapter that both see, or
        trained in full, is written with `ensure_weight_tying` and the tensors of both.
      config: further fields: base_model_name_or_path, revision, task_type, inference_mode,
        peft_version, auto_mapping; fan_in_fan_out=True where torch's base has transposed Conv1D
        modules (GPT-2); of Uni-LoRA save_indices=False, and of RandLoRA save_projection=False,
        which leave the drawing of indices and bases to PEFT.

    Raises:
      ValueError: several methods, or settings of which PEFT has one for all modules; a kind of
        module that PEFT does not adapt so; candidates; an adapter that is switched off by its
        scale; a field that follows from the adaptation, or that JSON cannot say; views that differ
        from the adaptation's.

    >>> import jax, jax.numpy as jnp, tempfile
    >>> import lowrank_jax as lrx
    >>> params = {"table": {"embedding": jnp.ones((7, 4))}}
    >>> adaptation = lrx.adapt(
    ...     params, {"table/embedding": lrx.adapters.lora(rank=2)}, jax.random.key(0)
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tensors, config = save(folder, adaptation, params, head=None, task_type="CAUSAL_LM")
    ...     sorted(safetensors.read(tensors)), json.loads(config.read_text())["target_modules"]
    (['base_model.model.table.lora_embedding_A', 'base_model.model.table.lora_embedding_B'], ['table'])
    """
    folder, family = pathlib.Path(folder), _peft_writing.family_of(adaptation, config)
    tree = Tree.of(params, names, views or Views(), convolutions)
    trained = adaptation.train["trainable"]
    made = _modules(adaptation, family, tree, head)
    hosts = {module: host for module, (_, host) in made.adapters.items()}

    # what all modules share
    shared = _peft_writing.shared_arrays(adaptation)
    (first, _), *_ = made.adapters.values()
    in_order = lambda: _order(order, names, hosts)  # noqa: E731
    tensors = family.evened(made.tensors, made.sizes)
    tensors |= family.write_shared(first, hosts, made.arrays, shared, config, in_order)

    # leaves that are trained in full, and tables that the output layer shares
    entries, in_full = _peft_whole.write(trained, family.bias, tree, hosts, config)
    tied_in_full = _peft_tied.write_whole(family, tree, trained, head)

    fields = family.fields(list(made.adapters.values()), config)
    fields |= family.sizes(made.sizes, made.alphas)
    experts = [module for module in hosts if _peft_config.parameter_of(module) != module]
    if experts:
        tensors = _peft_parameters.closed(tensors, tree, experts, order)
        fields |= {_peft_parameters.FIELD: _peft_parameters.targets(experts, tree)}
    modules = [module for module in hosts if module not in experts]
    targets = _peft_config.target_modules(modules, tree.modules)
    if made.tied:
        targets = _peft_tied.ties(targets)
    if made.tied or tied_in_full:
        fields |= {_peft_tied.FIELD: True}
    general = {
        "peft_type": family.peft_type,
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "target_modules": targets,
    }
    # before any file is written, since a field may be none that JSON can say
    text = _json(general | entries | fields | config)
    files = safetensors.write(folder / TENSORS, tensors | in_full | made.tied | tied_in_full)
    return [*files, documents.write(folder / _peft_config.NAME, text.encode())]


class _Modules(NamedTuple):
    """What torch's modules are given, most by the name of the module.

    Attributes:
      tensors: by key of the file.
      adapters: adapter and host.
      arrays: what the adapter holds.
      sizes, alphas: as PEFT has them.
      tied: tensors of output layers that share an adapted table, by key.
    """

    tensors: dict[str, np.ndarray]
    adapters: dict[str, tuple[Adapter, Host]]
    arrays: dict[str, Arrays]
    sizes: dict[str, int]
    alphas: dict[str, Any]
    tied: dict[str, np.ndarray]


def _modules(adaptation: Adaptation, family: Family, tree: Tree, head: str | None) -> _Modules:
    """The adapted modules, a matrix of a stack after the other."""
    tensors, adapters, arrays, sizes, alphas, tied = made = _Modules({}, {}, {}, {}, {}, {})
    for path, (adapter, site) in adaptation.layout.by_path.items():
        _peft_writing.check_site(family, tree, site)
        host = tree.host(path)
        shares = _peft_tied.check_site(family, tree, site, head)
        for place, own, p, fold in _peft_writing.matrices(adaptation, tree, adapter, site):
            module, rank = place.module, getattr(own, "rank", 1)
            written = family.write(own, host, p, rank, fold)
            tensors.update({f"{PREFIX}{module}.{end}": x for end, x in written.items()})
            adapters[module] = own, host
            arrays[module] = p
            alpha = getattr(own, "alpha", None)
            sizes[module], alphas[module] = family.written(own, p, rank, alpha)
            if shares is not None:
                # the output layer is written as a module of its own
                tied.update(_peft_tied.pair_of(shares, module, own, written))
                sizes[shares], alphas[shares] = sizes[module], alphas[module]
    return made


def _json(fields: Mapping[str, Any]) -> str:
    """The text of a configuration, NumPy's numbers as Python's; ValueError for a field that JSON
    cannot say."""
    for field, value in fields.items():
        try:
            json.dumps(value, default=_number)
        except TypeError as error:
            raise ValueError(
                f"{field}={value!r} cannot be written as JSON: {error}; leave it out"
            ) from error
    return json.dumps(fields, indent=2, sort_keys=True, default=_number) + "\n"


def _number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return as_python(value)
    raise TypeError(f"{value!r} is of {type(value).__name__}")


def _order(order: Sequence[str] | None, names: Names, hosts: Mapping[str, Host]) -> list[str]:
    """The adapted modules in the order of torch's traversal."""
    if order is None and names is llama.torch_name:
        return sorted(hosts, key=lambda module: llama._order(f"{module}.weight"))
    if order is None:
        raise ValueError(
            "order: indices depend on the order of the modules: give their names as "
            "named_modules() does"
        )
    if sorted(order) != sorted(hosts):
        raise ValueError(
            f"order: names {sorted(order)[:8]}, the adapted modules are {sorted(hosts)[:8]}"
        )
    return list(order)


__all__ = ["linen_name", "load", "save"]
__dir__ = functools.partial(sorted, __all__)
