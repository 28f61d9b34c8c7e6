"""The PEFT methods with two factors: LoRA and its kin, HiRA, Uni-LoRA.

Torch stores the transposes: `lora_A (r, n) = aᵀ`, `lora_B (m, r) = bᵀ`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.adapters.families.dora import Dora
from lowrank_jax.adapters.families.dylora import DyLora
from lowrank_jax.adapters.families.hira import Hira
from lowrank_jax.adapters.families.lora import INITS, Lora
from lowrank_jax.adapters.families.uni_lora import UniLora, draw_indices
from lowrank_jax.interop._peft_config import PREFIX, by_pattern, most, pattern_of
from lowrank_jax.interop._peft_family import Family, Shared, common, folded, unfoldable
from lowrank_jax.interop._torch_layout import Host

EVERY_HOST = ("linear", "embedding", "conv")
# the base of these was changed by something that the file does not hold
_LOST = {
    "corda": "the base it belongs to was changed with the covariance of data",
    "lora_ga": "the base it belongs to was changed with gradients of data",
    "loftq": "the base it belongs to was quantised",
}


class LoraFamily(Family):
    """LoRA, rsLoRA, DoRA, and DyLoRA as the LoRA of its largest rank.

    PiSSA and OLoRA with their offset, or, as written here, converted to rank 2 r.
    """

    peft_type, adapters, bias, hosts = "LORA", (Lora, Dora, DyLora), "lora_only", EVERY_HOST
    required = ("r", "lora_alpha")
    reads = frozenset(
        {
            "lora_dropout",
            "use_rslora",
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
            "init_lora_weights",
            "ensure_weight_tying",
        }
    )
    free = frozenset(
        {
            "fan_in_fan_out",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "qalora_group_size",
            "megatron_core",
        }
    )

    def problems(self, config):
        init = config.get("init_lora_weights", True)
        if init in _LOST or str(init).startswith("pissa_niter"):
            reason = _LOST.get(init, "the base it belongs to was changed by a randomised SVD")
            return [
                f"init_lora_weights={init!r} ({reason}: convert it with "
                "path_initial_model_for_weight_conversion)"
            ]
        if init in ("pissa", "olora") and config.get("use_dora"):
            return [
                f"init_lora_weights={init!r} with use_dora=True (the norm would be that of a "
                "changed base)"
            ]
        return []

    def alpha(self, config, module):
        return by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])

    def make(self, config, host, size):
        init = config.get("init_lora_weights", True)
        family = Dora if config.get("use_dora") else Lora
        return family(
            rank=size,
            alpha=config["lora_alpha"],
            rank_stabilized=bool(config.get("use_rslora")),
            dropout=config.get("lora_dropout", 0.0),
            trains="a" if init == "mica" else "both",
            init=init if init in ("pissa", "olora") and host.kind == "linear" else "kaiming",
        )

    def shapes(self, config, host, size):
        if host.kind == "embedding":
            found = {
                "lora_embedding_A": host.down_shape(size),
                "lora_embedding_B": host.up_shape(size),
            }
        else:
            found = {"lora_A.weight": host.down_shape(size), "lora_B.weight": host.up_shape(size)}
        return found | (
            {"lora_magnitude_vector": host.vector_shape} if config.get("use_dora") else {}
        )

    def read(self, adapter, host, tensors, kernel):
        down, up = (tensors[key] for key in ends(host, "lora"))
        factors = {"a": host.from_down(down), "b": host.from_up(up)}
        train = {name: factors.pop(name) for name in ("a", "b") if adapter.trains in ("both", name)}
        if isinstance(adapter, Dora):
            train["magnitude"] = tensors["lora_magnitude_vector"].reshape(host.m)
        if not adapter.start_of.offset:
            return train, factors
        # PEFT starts again from the base when it loads such a file, and then replaces the factors
        site = adapter.site((host.n, host.m))
        scale = jnp.full((adapter.rank,), adapter.scaling(site), jnp.float32)
        a0, b0 = INITS[adapter.init](jax.random.key(0), site, jnp.asarray(kernel()), scale)
        return train, factors | {"a0": np.asarray(a0), "b0": np.asarray(b0)}

    def fields(self, made, options):
        del options
        return {
            "lora_dropout": common("dropout", (adapter.dropout for adapter, _ in made)),
            "use_rslora": common(
                "rank_stabilized", (adapter.rank_stabilized for adapter, _ in made)
            ),
            "use_dora": common("use_dora", (isinstance(adapter, Dora) for adapter, _ in made)),
            "init_lora_weights": True,
        }

    def sizes(self, sizes, alphas):
        size, alpha = most(sizes.values()), most(alphas.values())
        return {
            "r": size,
            "rank_pattern": pattern_of(sizes, size),
            "lora_alpha": alpha,
            "alpha_pattern": pattern_of(alphas, alpha),
        }

    def write(self, adapter, host, p, rank, fold):
        a, b = p["a"][:, :rank], folded(p["b"][:rank], fold)
        if "a0" in p:
            a = np.concatenate([a, p["a0"][:, :rank]], axis=1)
            b = np.concatenate([b, -folded(p["b0"][:rank], fold)])
        found = dict(zip(ends(host, "lora"), (host.down(a), host.up(b)), strict=True))
        if isinstance(adapter, Dora):
            found["lora_magnitude_vector"] = p["magnitude"].reshape(host.vector_shape)
        return found

    def written(self, adapter, p, rank, alpha):
        # both pairs where there is an offset
        if "a0" not in p:
            return rank, alpha
        return 2 * rank, alpha * (math.sqrt(2) if adapter.rank_stabilized else 2)


class HiraFamily(Family):
    """HiRA. PEFT 0.21 gives every module rank r whatever `rank_pattern` says: smaller ranks are
    padded with zeros."""

    peft_type, adapters, hosts = "HIRA", (Hira,), EVERY_HOST
    reads = frozenset({"rank_pattern"})

    def stored_size(self, config, module, shapes):
        said = self.size_of(config, module)
        keys = [f"{PREFIX}{module}.{end}" for end in ("hira_A", "hira_embedding_A")]
        found = [shapes[key].shape[0] for key in keys if key in shapes]
        return config["r"] if found == [config["r"]] else said

    def make(self, config, host, size):
        return Hira(rank=size)

    def shapes(self, config, host, size):
        return dict(
            zip(ends(host, "hira", ""), (host.down_shape(size), host.up_shape(size)), strict=True)
        )

    def read(self, adapter, host, tensors, kernel):
        down, up = (tensors[key] for key in ends(host, "hira", ""))
        return {"a": host.from_down(down), "b": host.from_up(up)}, {}

    def fields(self, made, options):
        return {}

    def sizes(self, sizes, alphas):
        return {"r": max(sizes.values()), "rank_pattern": {}}

    def evened(self, tensors, sizes):
        found = {}
        for key, x in tensors.items():
            axis = 0 if key.endswith("_A") else 1
            widths = [
                (0, max(sizes.values()) - size if i == axis else 0)
                for i, size in enumerate(x.shape)
            ]
            found[key] = np.pad(x, widths)
        return found

    def write(self, adapter, host, p, rank, fold):
        tensors = host.down(p["a"][:, :rank]), host.up(folded(p["b"][:rank], fold))
        return dict(zip(ends(host, "hira", ""), tensors, strict=True))


class UniLoraFamily(Family):
    """Uni-LoRA: one vector, and for each module the indices of its factors, or the seed they are
    drawn from."""

    peft_type, adapters, bias = "UNILORA", (UniLora,), "unilora_only"
    required = ("r", "theta_d_length")
    reads = frozenset({"proj_seed", "save_indices", "init_theta_d_bound"})
    options = Family.options | {"save_indices"}
    vector = "base_model.unilora_theta_d"

    def make(self, config, host, size):
        return UniLora(
            rank=size,
            size=config["theta_d_length"],
            seed=config.get("proj_seed", 42),
            bound=config.get("init_theta_d_bound", 0.02),
        )

    def shapes(self, config, host, size):
        if not config.get("save_indices"):
            return {}
        a, b = (size, host.n), (host.m, size)
        return {
            f"unilora_{x}_{side}": shape
            for x in ("indices", "scales")
            for side, shape in (("A", a), ("B", b))
        }

    def read(self, adapter, host, tensors, kernel):
        return {}, {}

    def shared_shapes(self, config, hosts):
        return {self.vector: (config["theta_d_length"],)}

    def shared(self, config, hosts, tensors, order):
        if config.get("save_indices"):
            sides = {
                m: tuple(tensors[f"{PREFIX}{m}.unilora_indices_{side}"] for side in "AB")
                for m in hosts
            }
        else:
            sides = drawn(self.make(config, None, config["r"]), hosts, order())
        counts = np.zeros(config["theta_d_length"], np.int64)
        for pair in sides.values():
            for side in pair:
                counts += np.bincount(side.reshape(-1), minlength=len(counts))
        # an entry that nothing reads has no norm
        norm = np.where(counts > 0, 1 / np.sqrt(np.maximum(counts, 1)), 0)
        if config.get("save_indices"):
            check_scales(norm, sides, tensors)
        modules = {
            m: {"ia": a.T.astype(np.int32), "ib": b.T.astype(np.int32)}
            for m, (a, b) in sides.items()
        }
        return Shared({"theta": tensors[self.vector]}, {"norm": norm.astype(np.float32)}, modules)

    def fields(self, made, options):
        first = common("adapters", (adapter for adapter, _ in made))
        return {
            "theta_d_length": first.size,
            "proj_seed": first.seed,
            "init_theta_d_bound": first.bound,
            "save_indices": bool(options.get("save_indices", True)),
        }

    def write(self, adapter, host, p, rank, fold):
        unfoldable(fold, self)
        return {}

    def write_shared(self, adapter, hosts, p, shared, options, order):
        found = {self.vector: shared["theta"]}
        if not options.get("save_indices", True):
            wanted = drawn(adapter, hosts, order())
            wrong = [
                m
                for m, pair in wanted.items()
                if any(
                    not np.array_equal(*x)
                    for x in zip(pair, (p[m]["ia"].T, p[m]["ib"].T), strict=True)
                )
            ]
            if wrong:
                raise ValueError(
                    "save_indices=False: PEFT would draw other indices for "
                    f"{wrong[:4]}{' ...' * (len(wrong) > 4)}; adapt in torch's order (order=), or "
                    "leave the indices in the file"
                )
            return found
        for m in hosts:
            for side, name in (("A", "ia"), ("B", "ib")):
                indices = np.ascontiguousarray(p[m][name].T)
                found[f"{PREFIX}{m}.unilora_indices_{side}"] = indices.astype(np.int64)
                found[f"{PREFIX}{m}.unilora_scales_{side}"] = shared["norm"][indices]
        return found


def check_scales(norm, sides, tensors) -> None:
    """ValueError for scales other than by the uses of an entry, to the precision of bfloat16."""
    for module, pair in sides.items():
        for side, indices in zip("AB", pair, strict=True):
            scales = tensors[f"{PREFIX}{module}.unilora_scales_{side}"].astype(np.float32)
            if not np.allclose(scales, norm[indices], rtol=2**-7, atol=0):
                raise ValueError(
                    f"{module}.unilora_scales_{side} is not 1 / sqrt(uses) of the indices in the "
                    "file"
                )


def drawn(adapter: UniLora, hosts, order) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`{module: (indices of A (r, n), of B (m, r))}` that the seed draws for modules in this
    order."""
    sizes = [(m, (adapter.rank, hosts[m].n), (hosts[m].m, adapter.rank)) for m in order]
    indices = draw_indices(
        adapter.size, sum(math.prod(a) + math.prod(b) for _, a, b in sizes), adapter.seed
    )
    start, found = 0, {}
    for module, *shapes in sizes:
        pair = []
        for shape in shapes:
            pair.append(indices[start : start + math.prod(shape)].reshape(shape))
            start += math.prod(shape)
        found[module] = pair[0], pair[1]
    return found


def ends(host: Host, name: str, end: str = ".weight") -> tuple[str, str]:
    """Ends of the keys of both factors. Those of an embedding are bare parameters."""
    if host.kind == "embedding":
        return f"{name}_embedding_A", f"{name}_embedding_B"
    return f"{name}_A{end}", f"{name}_B{end}"
