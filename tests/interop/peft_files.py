"""PEFT folders written by hand, with each method's effect on a torch weight in NumPy."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_jax as lrx
from lowrank_jax.interop import llama, peft, safetensors

GENERATOR = np.random.default_rng(0)
PREFIX = "base_model.model."
Q, V = (f"model.layers.{{}}.self_attn.{name}_proj" for name in "qv")
MODULES = [name.format(layer) for layer in range(2) for name in (Q, V)]
SHAPES = {
    name.format(layer): shape for layer in range(2) for name, shape in ((Q, (8, 4)), (V, (4, 4)))
}
WEIGHTS = {name: GENERATOR.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
VIEWS = lrx.Views(stacked=("layers/.*",))
FORMS = {"stacked": VIEWS, "unstacked": None}


def normal(*shape):
    return (0.3 * GENERATOR.normal(size=shape)).astype(np.float32)


def tree(weights, form):
    """A Flax tree of torch weights, of the LLaMA layout."""
    kernel = lambda layer, name: jnp.asarray(weights[name.format(layer)].T)  # noqa: E731
    layers = [
        {"attention": {f"{k}_proj": {"kernel": kernel(i, n)} for k, n in (("q", Q), ("v", V))}}
        for i in range(2)
    ]
    if form == "unstacked":
        return {f"layer_{i}": layer for i, layer in enumerate(layers)}
    return {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def write(folder, config, tensors):
    whole = {
        key if key.startswith("base_model.") else PREFIX + key: x for key, x in tensors.items()
    }
    safetensors.write(folder / "adapter_model.safetensors", whole)
    general = {
        "task_type": None,
        "base_model_name_or_path": "somewhere",
        "inference_mode": True,
        "revision": None,
    }
    text = json.dumps(general | {"target_modules": ["q_proj", "v_proj"]} | config)
    (folder / "adapter_config.json").write_text(text)
    return folder


def modules(shapes, names=MODULES):
    """`{module.end: random tensor}` from `shapes(module, m, n) -> {end: shape}`."""
    return {
        f"{m}.{end}": normal(*shape) for m in names for end, shape in shapes(m, *SHAPES[m]).items()
    }


# Of each method: its configuration, its tensors, and the weight (m, n) that they make of W; r of
# some modules is 1.


def lora(config, scale):
    rank = {m: 1 if m == MODULES[2] else 2 for m in MODULES}
    tensors = modules(
        lambda m, o, i: {"lora_A.weight": (rank[m], i), "lora_B.weight": (o, rank[m])}
    )

    def change(m, w, t):
        s = scale({MODULES[3]: 5}.get(m, 3), rank[m])
        return w + s * t["lora_B.weight"] @ t["lora_A.weight"]

    patterns = {
        "rank_pattern": {MODULES[2]: 1},
        "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 5},
    }
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 3} | patterns | config, tensors, change


def dora():
    config, tensors, inner = lora(
        {"use_dora": True, "lora_dropout": 0.1}, lambda alpha, r: alpha / r
    )
    tensors |= {f"{m}.lora_magnitude_vector": 1 + normal(SHAPES[m][0]) for m in MODULES}

    def change(m, w, t):
        new = inner(m, w, t)
        return new * (t["lora_magnitude_vector"] / np.linalg.norm(new, axis=1))[:, None]

    return config, tensors, change


def hira(obeyed=False):
    """PEFT 0.21 ignores the pattern; a file whose tensors obey it is read, too."""
    rank = {m: 3 if m == MODULES[1] and obeyed else 2 for m in MODULES}
    tensors = modules(lambda m, o, i: {"hira_A": (rank[m], i), "hira_B": (o, rank[m])})
    config = {"peft_type": "HIRA", "r": 2, "rank_pattern": {MODULES[1]: 3}}
    return config, tensors, lambda m, w, t: w * (1 + t["hira_B"] @ t["hira_A"])


def loha():
    rank = {m: 1 if m == MODULES[0] else 2 for m in MODULES}
    ends = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    shapes = lambda m, o, i: dict(zip(ends, ((o, rank[m]), (rank[m], i)) * 2, strict=True))  # noqa: E731

    def change(m, w, t):
        w1a, w1b, w2a, w2b = (t[end] for end in ends)
        return w + (w1a @ w1b) * (w2a @ w2b) * 6 / rank[m]

    return (
        {"peft_type": "LOHA", "r": 2, "alpha": 6, "rank_pattern": {MODULES[0]: 1}},
        modules(shapes),
        change,
    )


def unilora(save):
    theta, d = normal(20), 20
    sides = {m: ((2, SHAPES[m][1]), (SHAPES[m][0], 2)) for m in MODULES}
    total = sum(a * b for pair in sides.values() for a, b in pair)
    generator = np.random.default_rng(42)
    indices = np.repeat(np.arange(d), total // d)
    indices = np.concatenate([indices, generator.choice(d, size=total % d, replace=False)])
    generator.shuffle(indices)
    norm = 1 / np.sqrt(np.bincount(indices, minlength=d))
    cut = iter(
        np.split(indices, np.cumsum([a * b for pair in sides.values() for a, b in pair])[:-1])
    )
    maps = {m: [next(cut).reshape(shape) for shape in pair] for m, pair in sides.items()}

    def change(m, w, t):
        a, b = ((theta * norm)[indices] for indices in maps[m])
        return w + b @ a

    tensors = {
        f"{m}.unilora_indices_{s}": x for m in MODULES for s, x in zip("AB", maps[m], strict=True)
    }
    scales = {
        k.replace("indices", "scales"): norm[x].astype(np.float32) for k, x in tensors.items()
    }
    config = {
        "peft_type": "UNILORA",
        "r": 2,
        "theta_d_length": d,
        "proj_seed": 42,
        "save_indices": save,
    }
    return (
        config,
        (tensors | scales if save else {}) | {"base_model.unilora_theta_d": theta},
        change,
    )


def vera():
    a, b = normal(3, 4), normal(8, 3)
    tensors = modules(lambda m, o, i: {"vera_lambda_d": (3,), "vera_lambda_b": (o,)})

    def change(m, w, t):
        o, i = w.shape
        return w + np.diag(t["vera_lambda_b"]) @ b[:o] @ np.diag(t["vera_lambda_d"]) @ a[:, :i]

    banks = {"base_model.vera_A": a, "base_model.vera_B": b}
    return (
        {"peft_type": "VERA", "r": 3, "save_projection": True, "vera_dropout": 0.1},
        tensors | banks,
        change,
    )


def rand_lora():
    """Bases for 8 x 4 and 4 x 4: r = 3, p = 4, q = 8, N = 2."""
    tensors = modules(lambda m, o, i: {"randlora_lambda": (3, 2), "randlora_gamma": (2, 4)})
    bank_a, bank_b = normal(3, 1, 4), normal(8, 2, 3)

    def change(m, w, t):
        # update_A (r N, p), update_B (q, N r), in torch's orders
        small = t["randlora_lambda"][:, :, None] * bank_a * t["randlora_gamma"]
        small, large = small.reshape(6, 4), bank_b[: max(w.shape)].reshape(-1, 6)
        delta = large @ small
        return w + 7 / 3 * (delta if w.shape[1] <= w.shape[0] else delta.T)

    banks = {"base_model.randlora_A": bank_a, "base_model.randlora_B": bank_b}
    copies = {
        f"{m}.{end[len('base_model.') :]}": bank for m in SHAPES for end, bank in banks.items()
    }
    config = {"peft_type": "RANDLORA", "r": 3, "randlora_alpha": 7, "save_projection": True}
    return config, tensors | banks | copies, change


def oft(neumann):
    def change(m, w, t):
        q = np.zeros((2, 2, 2))
        q[:, 0, 1] = t["oft_R.weight"][:, 0]
        q = q - np.swapaxes(q, 1, 2)
        if neumann:
            r = np.eye(2) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        else:
            r = (np.eye(2) - q) @ np.linalg.inv(np.eye(2) + q)
        whole = np.zeros((4, 4))
        whole[:2, :2], whole[2:, 2:] = r
        return (whole @ w.T).T

    # 3 divides no input dimension: the nearest divisor of 4, and the smaller of two, is 2
    config = {
        "peft_type": "OFT",
        "r": 0,
        "oft_block_size": 3,
        "use_cayley_neumann": neumann,
        "peft_version": "0.21.2",
    }
    return config, modules(lambda m, o, i: {"oft_R.weight": (2, 1)}), change


def miss(mode):
    shape = {True: lambda o: (3, o), "mini": lambda o: (3, 2), "bat": lambda o: (o // 2, 2, 2)}[
        mode
    ]

    def change(m, w, t):
        block, (o, i) = t["miss_block"], w.shape
        if mode == "bat":
            new = w.copy()
            for j, k in itertools.product(range(o // 2), range(i // 2)):
                old = w[2 * j : 2 * j + 2, 2 * k : 2 * k + 2]
                new[2 * j : 2 * j + 2, 2 * k : 2 * k + 2] += old @ block[j] + block[j]
            return new
        return w + np.stack([np.resize(block[k % 3], o) for k in range(i)], axis=1)

    sizes = {"r": 2 if mode == "bat" else 3, "mini_r": 2 if mode == "mini" else 1}
    tensors = modules(lambda m, o, i: {"miss_block": shape(o)})
    return {"peft_type": "MISS", "init_weights": mode} | sizes, tensors, change


def fourierft():
    tensors = modules(lambda m, o, i: {"fourierft_spectrum": (5,)})

    def change(m, w, t):
        spectrum = np.zeros(w.size)
        # torch.randperm(32 or 16, generator=torch.Generator().manual_seed(777))[:5]
        spectrum[{32: [7, 1, 3, 14, 19], 16: [7, 15, 11, 14, 1]}[w.size]] = t["fourierft_spectrum"]
        return w + 40 * np.fft.ifft2(spectrum.reshape(w.shape)).real

    return (
        {"peft_type": "FOURIERFT", "n_frequency": 5, "scaling": 40.0, "random_loc_seed": 777},
        tensors,
        change,
    )


def shira():
    tensors = modules(lambda m, o, i: {"shira_weight": (o + i,)})
    for m, (o, i) in SHAPES.items():
        flat = np.sort(GENERATOR.choice(o * i, size=o + i, replace=False))
        tensors[f"{m}.shira_indices"] = np.stack([flat // i, flat % i]).astype(np.int32)

    def change(m, w, t):
        new = w.copy()
        new[tuple(t["shira_indices"])] += t["shira_weight"]
        return new

    return {"peft_type": "SHIRA", "r": 1, "mask_type": "random"}, tensors, change


CASES = {
    "lora": lora({}, lambda alpha, r: alpha / r),
    "rslora": lora({"use_rslora": True}, lambda alpha, r: alpha / r**0.5),
    "dora": dora(),
    "hira": hira(),
    "loha": loha(),
    "unilora": unilora(False),
    "unilora, indices": unilora(True),
    "vera": vera(),
    "randlora": rand_lora(),
    "oft": oft(False),
    "oft, neumann": oft(True),
    "miss": miss(True),
    "miss, mini": miss("mini"),
    "miss, bat": miss("bat"),
    "fourierft": fourierft(),
    "shira": shira(),
}


def of_module(tensors, module):
    return {
        key.removeprefix(f"{module}."): x
        for key, x in tensors.items()
        if key.startswith(f"{module}.")
    }


def load(folder, form, **options):
    return peft.load(folder, tree(WEIGHTS, form), llama.torch_name, views=FORMS[form], **options)


def plain_lora(names=MODULES, rank=2):
    return modules(lambda m, o, i: {"lora_A.weight": (rank, i), "lora_B.weight": (o, rank)}, names)


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}


def whole_params():
    dense = lambda n, m: {"kernel": jnp.asarray(normal(n, m)), "bias": jnp.asarray(normal(m))}  # noqa: E731
    norm = {"scale": jnp.ones(6), "bias": jnp.zeros(6)}
    return {"body": {"up": dense(4, 6), "norm": norm, "down": dense(6, 4)}, "head": dense(4, 3)}
