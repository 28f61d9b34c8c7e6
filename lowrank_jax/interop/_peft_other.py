"""The PEFT methods without two factors for each module: VeRA, LoHa, OFT, MiSS, FourierFT, SHiRA."""

from __future__ import annotations

import re

import numpy as np

from lowrank_jax.adapters.base import Group, Site
from lowrank_jax.adapters.families.fourierft import FourierFT
from lowrank_jax.adapters.families.loha import Loha
from lowrank_jax.adapters.families.miss import Miss
from lowrank_jax.adapters.families.oft import Oft
from lowrank_jax.adapters.families.shira import Shira
from lowrank_jax.adapters.families.vera import Vera
from lowrank_jax.adapters.positions import TORCH_LIMIT, torch_permutation
from lowrank_jax.interop._peft_config import by_pattern, most, pattern_of
from lowrank_jax.interop._peft_family import Family, Shared, common, folded, largest


class VeraFamily(Family):
    """VeRA: two vectors for each module, and both banks once, or the seed they are drawn from."""

    peft_type, adapters, bias = "VERA", (Vera,), "vera_only"
    reads = frozenset({"save_projection", "projection_prng_key", "vera_dropout", "d_initial"})
    banks = ("base_model.vera_A", "base_model.vera_B")

    def make(self, config, host, size):
        return Vera(
            rank=size,
            seed=config.get("projection_prng_key") or 0,
            dropout=config.get("vera_dropout", 0.0),
            initial=config.get("d_initial") or 0.1,
        )

    def shapes(self, config, host, size):
        return {"vera_lambda_d": (size,), "vera_lambda_b": (host.m,)}

    def read(self, adapter, host, tensors, kernel):
        return {name: tensors[f"vera_{name}"] for name in ("lambda_d", "lambda_b")}, {}

    def shared_shapes(self, config, hosts):
        if not config.get("save_projection", True):
            return {}
        n, m = largest(hosts)
        return {"base_model.vera_A": (config["r"], n), "base_model.vera_B": (m, config["r"])}

    def shared(self, config, hosts, tensors, order):
        if config.get("save_projection", True):
            return Shared(
                frozen={"bank_a": tensors[self.banks[0]].T, "bank_b": tensors[self.banks[1]].T}
            )
        adapter, site = (
            self.make(config, None, config["r"]),
            Site(shape=largest(hosts), rank=config["r"]),
        )
        return Shared(frozen=adapter.init_shared(None, Group(sites={"": site}, order=()))[1])

    def fields(self, made, options):
        first = common("adapters", (adapter for adapter, _ in made))
        return {
            "vera_dropout": first.dropout,
            "projection_prng_key": first.seed,
            "d_initial": first.initial,
            "save_projection": True,
        }

    def write(self, adapter, host, p, rank, fold):
        return {"vera_lambda_d": folded(p["lambda_d"], fold), "vera_lambda_b": p["lambda_b"]}

    def write_shared(self, adapter, hosts, p, shared, options, order):
        n, m = largest(hosts)
        if "key" in shared:
            site = Site(shape=(n, m), rank=adapter.rank, bank=(n, m))
            a, b = (np.asarray(bank) for bank in adapter.banks(site, {"shared": shared}))
        else:
            a, b = shared["bank_a"][:n], shared["bank_b"][:, :m]
        return dict(zip(self.banks, (a.T, b.T), strict=True))


class LohaFamily(Family):
    """LoHa: `hada_w1_a (m, r) = b1ᵀ`, `hada_w1_b (r, n) = a1ᵀ`, and so the second pair."""

    peft_type, adapters, hosts = "LOHA", (Loha,), ("linear", "conv")
    required = ("r", "alpha")
    reads = frozenset({"rank_pattern", "alpha_pattern"})
    free = frozenset({"init_weights"})
    options = frozenset()

    def alpha(self, config, module):
        return by_pattern(config.get("alpha_pattern"), module, config["alpha"])

    def make(self, config, host, size):
        return Loha(rank=size, alpha=config["alpha"])

    def shapes(self, config, host, size):
        return {
            f"hada_w{i}_{s}": shape
            for i in (1, 2)
            for s, shape in (("a", (host.m, size)), ("b", (size, host.n)))
        }

    def read(self, adapter, host, tensors, kernel):
        found = {}
        for i in (1, 2):
            found[f"a{i}"] = host.flax_rows(tensors[f"hada_w{i}_b"].T)
            found[f"b{i}"] = tensors[f"hada_w{i}_a"].T
        return found, {}

    def fields(self, made, options):
        return {}

    def sizes(self, sizes, alphas):
        size, alpha = most(sizes.values()), most(alphas.values())
        return {
            "r": size,
            "rank_pattern": pattern_of(sizes, size),
            "alpha": alpha,
            "alpha_pattern": pattern_of(alphas, alpha),
        }

    def write(self, adapter, host, p, rank, fold):
        found = {}
        for i, weight in ((1, fold), (2, None)):
            found[f"hada_w{i}_a"] = folded(p[f"b{i}"][:rank], weight).T
            found[f"hada_w{i}_b"] = host.torch_rows(p[f"a{i}"][:, :rank]).T
        return found


class OftFamily(Family):
    """OFT: of each block the upper triangle of Q, row by row."""

    peft_type, adapters, bias = "OFT", (Oft,), "oft_only"
    required = ("r", "oft_block_size")
    reads = frozenset({"use_cayley_neumann", "num_cayley_neumann_terms"})
    free = Family.free | {"eps"}

    def sits_on(self, host):
        # with a larger window PEFT turns overlapping windows of the input and adds them up, which
        # is no kernel
        return host.kind == "linear" or host.window == (1, 1)

    def problems(self, config):
        if not config.get("use_cayley_neumann", True):
            return []
        found = []
        if config.get("num_cayley_neumann_terms", 5) != 5:
            found.append(
                f"num_cayley_neumann_terms={config['num_cayley_neumann_terms']} (5 are supported)"
            )
        version = re.match(r"(\d+)\.(\d+)", config.get("peft_version") or "0.0")
        if version is None or (int(version[1]), int(version[2])) < (0, 18):
            found.append(
                "use_cayley_neumann=True without peft_version of at least 0.18, which changed the "
                "series"
            )
        return found

    def size_of(self, config, module):
        return config["oft_block_size"] or config["r"]

    def block(self, config, host, size):
        """β of a module: PEFT takes the nearest divisor of n, of β or of the number of blocks."""
        near = nearest_divisor(host.n, size)
        return near if config["oft_block_size"] else host.n // near

    def make(self, config, host, size):
        cayley = "neumann" if config.get("use_cayley_neumann", True) else "exact"
        return Oft(block=self.block(config, host, size), cayley=cayley)

    def shapes(self, config, host, size):
        block = self.block(config, host, size)
        return {"oft_R.weight": (host.n // block, block * (block - 1) // 2)}

    def read(self, adapter, host, tensors, kernel):
        return {"skew": tensors["oft_R.weight"]}, {}

    def fields(self, made, options):
        blocks = [(host.n, adapter.block) for adapter, host in made]
        for size in range(2, max(n for n, _ in blocks) + 1):
            if all(nearest_divisor(n, size) == block for n, block in blocks):
                break
        else:
            raise ValueError(
                "block: PEFT has one for all modules, and takes the nearest divisor of n; not "
                f"{blocks}"
            )
        cayley = common("cayley", (adapter.cayley for adapter, _ in made))
        # the version says which series is meant
        return {
            "oft_block_size": size,
            "use_cayley_neumann": cayley == "neumann",
            "peft_version": "0.18.0",
        }

    def sizes(self, sizes, alphas):
        return {"r": 0}

    def write(self, adapter, host, p, rank, fold):
        return {"oft_R.weight": folded(p["skew"], fold)}


class MissFamily(Family):
    """MiSS, its "mini" and Bone ("bat")."""

    peft_type, adapters, bias = "MISS", (Miss,), "MiSS_only"
    required = ("r", "mini_r")
    reads = frozenset({"miss_dropout", "init_weights"})
    free = options = frozenset()

    def mode(self, config):
        init = config.get("init_weights", True)
        return init if init in ("bat", "mini") else "miss"

    def make(self, config, host, size):
        mode = self.mode(config)
        return Miss(
            rank=size,
            mode=mode,
            mini_rank=config["mini_r"] if mode == "mini" else None,
            dropout=0.0 if mode == "bat" else config.get("miss_dropout", 0.0),
        )

    def shapes(self, config, host, size):
        return {
            "miss_block": self.make(config, host, size).block_shape(Site(shape=(host.n, host.m)))
        }

    def read(self, adapter, host, tensors, kernel):
        return {"block": tensors["miss_block"]}, {}

    def fields(self, made, options):
        mode = common("mode", (adapter.mode for adapter, _ in made))
        return {
            "miss_dropout": common("dropout", (adapter.dropout for adapter, _ in made)),
            "mini_r": common("mini_rank", (adapter.mini_rank or 1 for adapter, _ in made)),
            "init_weights": True if mode == "miss" else mode,
        }

    def write(self, adapter, host, p, rank, fold):
        return {"miss_block": folded(p["block"], fold)}


class FourierFamily(Family):
    """FourierFT. A file holds no positions, only the seed that PEFT draws them with."""

    peft_type, adapters, bias = "FOURIERFT", (FourierFT,), "fourier_only"
    required = ("n_frequency", "scaling")
    reads = frozenset({"n_frequency_pattern", "random_loc_seed"})

    def size_of(self, config, module):
        # not the rule of the other patterns: a name, or the end of a name after a dot
        patterns = config.get("n_frequency_pattern") or {}
        ends = [
            value for pattern, value in patterns.items() if re.match(rf".*\.{pattern}$", module)
        ]
        return ends[0] if ends else patterns.get(module, config["n_frequency"])

    def alpha(self, config, module):
        return config["scaling"]

    def make(self, config, host, size):
        return FourierFT(
            frequencies=size, alpha=config["scaling"], seed=config.get("random_loc_seed", 777)
        )

    def shapes(self, config, host, size):
        return {"fourierft_spectrum": (size,)}

    def read(self, adapter, host, tensors, kernel):
        rows, cols = drawn(adapter, host)
        return {"spectrum": tensors["fourierft_spectrum"]}, {"rows": rows, "cols": cols}

    def fields(self, made, options):
        return {"random_loc_seed": common("seed", (adapter.seed for adapter, _ in made))}

    def sizes(self, sizes, alphas):
        size = most(sizes.values())
        found = {"n_frequency": size, "scaling": common("alpha", alphas.values())}
        # longer names first: the end of one may be another
        own = {
            module: sizes[module]
            for module in sorted(sizes, key=len, reverse=True)
            if sizes[module] != size
        }
        config = found | {"n_frequency_pattern": own}
        wrong = [module for module in sizes if self.size_of(config, module) != sizes[module]]
        if wrong:
            raise ValueError(
                f"frequencies: PEFT cannot tell {wrong} from modules whose names end alike; give "
                "them one"
            )
        return config

    def write(self, adapter, host, p, rank, fold):
        if not all(
            np.array_equal(*pair)
            for pair in zip((p["rows"], p["cols"]), drawn(adapter, host), strict=True)
        ):
            raise ValueError(
                f"positions: PEFT files hold none, and these are not those of seed={adapter.seed}"
            )
        return {"fourierft_spectrum": folded(p["spectrum"], fold)}

    def written(self, adapter, p, rank, alpha):
        return adapter.frequencies, alpha


class ShiraFamily(Family):
    """SHiRA: values, and their places in the torch weight."""

    peft_type, adapters = "SHIRA", (Shira,)
    free = Family.free | {"mask_type", "random_seed"}

    def make(self, config, host, size):
        return Shira(rank=size)

    def shapes(self, config, host, size):
        count = size * (host.n + host.m)
        return {"shira_weight": (count,), "shira_indices": (2, count)}

    def read(self, adapter, host, tensors, kernel):
        cols, rows = tensors["shira_indices"].astype(np.int32)  # floats in files of PEFT on Windows
        return {"values": tensors["shira_weight"]}, {"rows": rows, "cols": cols}

    def fields(self, made, options):
        return {"mask_type": "random"}

    def write(self, adapter, host, p, rank, fold):
        indices = np.stack([p["cols"], p["rows"]]).astype(np.int32)
        return {"shira_weight": folded(p["values"], fold), "shira_indices": indices}


def drawn(adapter: FourierFT, host) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns that PEFT draws."""
    if host.n * host.m >= TORCH_LIMIT:
        raise ValueError(
            f"a kernel of {host.n} x {host.m} has too many entries for torch's draw to be repeated "
            "here"
        )
    flat = torch_permutation(host.n * host.m, adapter.frequencies, adapter.seed)
    return (flat % host.n).astype(np.int32), (flat // host.n).astype(np.int32)


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n that PEFT takes for a number that may be none: the nearest, the smaller of
    two.

    >>> nearest_divisor(48, 32), nearest_divisor(8, 32), nearest_divisor(12, 5)
    (24, 8, 4)
    """
    if wanted >= n:
        return n
    below = max(d for d in range(1, wanted + 1) if n % d == 0)
    above = min(d for d in range(wanted, n + 1) if n % d == 0)
    return below if wanted - below <= above - wanted else above
