"""RandLoRA in PEFT's files: two matrices for each module, and the random bases once, or their seed.

PEFT writes the bases once for the model and again for every module, the same numbers each time, and
warns of keys that are missing. So do we, but with `save_projection=False`, which leaves the seed
alone. They are read once; copies that differ are an error.
"""

from __future__ import annotations

import numpy as np

from lowrank_jax.adapters.base import Site
from lowrank_jax.adapters.families.rand_lora import RandLora, torch_banks
from lowrank_jax.interop._peft_config import PREFIX
from lowrank_jax.interop._peft_family import Family, Shared, common, largest

BANKS = {"randlora_A": "base_model.randlora_A", "randlora_B": "base_model.randlora_B"}


class RandLoraFamily(Family):
    """RandLoRA: `randlora_lambda (r, N)` and `randlora_gamma (N, p)` are ours as they are."""

    peft_type, adapters, bias = "RANDLORA", (RandLora,), "randlora_only"
    required = ("r", "randlora_alpha")
    reads = frozenset(
        {"projection_prng_key", "randlora_dropout", "save_projection", "sparse", "very_sparse"}
    )
    options = Family.options | {"save_projection"}

    def alpha(self, config, module):
        del module
        return config["randlora_alpha"]

    def make(self, config, host, size):
        del host
        # of both flags PEFT follows the second
        sparse = "sparse" if config.get("sparse") else "uniform"
        return RandLora(
            rank=size,
            alpha=config["randlora_alpha"],
            bases="very_sparse" if config.get("very_sparse") else sparse,
            seed=config.get("projection_prng_key") or 0,
            dropout=config.get("randlora_dropout") or 0.0,
        )

    def shapes(self, config, host, size):
        del config
        shorter = min(host.n, host.m)
        count = -(-shorter // size)
        return {"randlora_lambda": (size, count), "randlora_gamma": (count, shorter)}

    def read(self, adapter, host, tensors, kernel):
        del adapter, host, kernel
        return {name: tensors[f"randlora_{name}"] for name in ("lambda", "gamma")}, {}

    def copies(self, config):
        return BANKS if config.get("save_projection", True) else {}

    def shared_shapes(self, config, hosts):
        if not config.get("save_projection", True):
            return {}
        rank, count, shorter, longer = sizes_of(config["r"], hosts)
        return {
            BANKS["randlora_A"]: (rank, 1, shorter),
            BANKS["randlora_B"]: (longer, count, rank),
        }

    def shared(self, config, hosts, tensors, order):
        del order
        if config.get("save_projection", True):
            # (r, 1, p) there, (r, p) here
            bank_a = tensors[BANKS["randlora_A"]][:, 0]
            return Shared(frozen={"bank_a": bank_a, "bank_b": tensors[BANKS["randlora_B"]]})
        adapter = self.make(config, None, config["r"])
        bank_a, bank_b = torch_banks(adapter.bases, adapter.seed, *sizes_of(config["r"], hosts))
        return Shared(frozen={"bank_a": bank_a, "bank_b": bank_b})

    def fields(self, made, options):
        bases = common("bases", (adapter.bases for adapter, _ in made))
        return {
            "randlora_dropout": common("dropout", (adapter.dropout for adapter, _ in made)),
            "projection_prng_key": common("seed", (adapter.seed for adapter, _ in made)),
            "sparse": bases == "sparse",
            "very_sparse": bases == "very_sparse",
            "save_projection": bool(options.get("save_projection", True)),
        }

    def sizes(self, sizes, alphas):
        return {
            "r": common("rank", sizes.values()),
            "randlora_alpha": common("alpha", alphas.values()),
        }

    def write(self, adapter, host, p, rank, fold):
        del rank
        # PEFT multiplies by alpha / r; whatever else our scale holds goes into lambda
        scaling = adapter.scaling(Site(shape=(host.n, host.m)))
        extra = scaling / (adapter.alpha / adapter.rank) * (1.0 if fold is None else fold)
        return {
            "randlora_lambda": (p["lambda"] * extra).astype(np.float32),
            "randlora_gamma": p["gamma"],
        }

    def write_shared(self, adapter, hosts, p, shared, options, order):
        del p, order
        rank, count, shorter, longer = sizes_of(adapter.rank, hosts)
        if "key" in shared:
            whole = Site(shape=(shorter, longer), bank=(shorter, longer))
            bank_a, bank_b = (np.asarray(x) for x in adapter.banks(whole, {"shared": shared}))
        else:
            bank_a = shared["bank_a"][:rank, :shorter]
            bank_b = shared["bank_b"][:longer, :count, :rank]
        if options.get("save_projection", True):
            banks = {"randlora_A": bank_a[:, None], "randlora_B": bank_b}
            # PEFT wants them in the model and in every module
            starts = ("base_model.", *(f"{PREFIX}{module}." for module in hosts))
            return {f"{start}{end}": bank for start in starts for end, bank in banks.items()}
        drawn = torch_banks(adapter.bases, adapter.seed, rank, count, shorter, longer)
        if not all(map(np.array_equal, (bank_a, bank_b), drawn)):
            raise ValueError(
                f"save_projection=False: PEFT would draw other bases with "
                f"projection_prng_key={adapter.seed}; leave them in the file"
            )
        return {}


def sizes_of(rank: int, hosts) -> tuple[int, int, int, int]:
    """`(r, N, p, q)` of the bases that serve all modules."""
    shorter, longer = sorted(largest(hosts))
    return rank, -(-shorter // rank), shorter, longer
