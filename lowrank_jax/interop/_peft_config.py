"""`adapter_config.json`: which torch modules it names, and what in it is understood.

A field that a family reads is read; one that only says where a run came from or how arrays started
is free; one that changes training alone is passed over with a warning; any other must be off (null,
false, zero, empty), as an unknown one that a newer PEFT wrote, or it is refused.
"""

from __future__ import annotations

import difflib
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lowrank_jax.interop import documents

NAME = "adapter_config.json"
PREFIX = "base_model.model."
ALL_LINEAR = "all-linear"
HEADS = ("lm_head", "score", "classifier")
INFORMATION = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    }
)
# what draws or saves memory while it trains, and is nothing in the function of a trained adapter
TRAINING = frozenset(
    {
        "hira_dropout",
        "loftq_config",
        "megatron_config",
        "module_dropout",
        "rank_dropout",
        "rank_dropout_scale",
        "runtime_config",
        "unilora_dropout",
    }
)
TARGETING = frozenset(
    {
        "bias",
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "target_modules",
        "target_parameters",
    }
)
_NAMES = (str, [str], None)
_FLAG = (bool, None)
_NUMBER = (float, None)
_SIZE = (int, None)
# Of the fields that any family reads; `documents` says what the words mean.
SHAPE = {
    "peft_type": str,
    "target_modules?": _NAMES,
    "target_parameters?": ([str], None),
    "exclude_modules?": _NAMES,
    "modules_to_save?": ([str], None),
    "layers_to_transform?": (int, [int], None),
    "layers_pattern?": _NAMES,
    "rank_pattern?": ({str: int}, None),
    "alpha_pattern?": ({str: float}, None),
    "n_frequency_pattern?": ({str: int}, None),
    "peft_version?": (str, None),
    "bias?": (str, None),
    **{
        f"{name}?": _FLAG
        for name in ("use_dora", "use_rslora", "fan_in_fan_out", "use_cayley_neumann")
    },
    **{f"{name}?": _FLAG for name in ("save_indices", "save_projection", "sparse", "very_sparse")},
    **{
        f"{name}?": _NUMBER
        for name in (
            "lora_alpha",
            "alpha",
            "scaling",
            "lora_dropout",
            "vera_dropout",
            "randlora_alpha",
            "randlora_dropout",
        )
    },
    **{f"{name}?": _NUMBER for name in ("miss_dropout", "d_initial", "init_theta_d_bound")},
    **{
        f"{name}?": _SIZE
        for name in ("r", "mini_r", "oft_block_size", "theta_d_length", "n_frequency")
    },
    **{f"{name}?": _SIZE for name in ("proj_seed", "projection_prng_key", "random_loc_seed")},
}


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The configuration of a folder.

    Raises:
      FileNotFoundError: there is none.
      documents.DocumentError: it is no JSON object with a `peft_type`, or a field is of another
        type.
    """
    file = folder / NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: give the folder that PEFT's save_pretrained wrote"
        )
    return documents.read(file, SHAPE, remedy="give the folder that PEFT's save_pretrained wrote")


def unsupported(config: Mapping[str, Any], understood: Collection[str]) -> list[str]:
    """`field=value` of every field that is set and not understood."""
    known = INFORMATION | TARGETING | TRAINING | set(understood)
    return [
        f"{field}={value!r}"
        for field, value in sorted(config.items())
        if value and field not in known
    ]


def of_training(config: Mapping[str, Any]) -> list[str]:
    """`field=value` of every field that is set, is not understood, and changes training alone."""
    return [
        f"{field}={value!r}"
        for field, value in sorted(config.items())
        if value and field in TRAINING
    ]


def matches(targets: Any, module: str) -> bool:
    """Whether a list of names and suffixes, or one regular expression, takes a module: PEFT's rule.

    >>> (
    ...     matches(["q_proj"], "layers.0.q_proj"),
    ...     matches(["q_proj"], "xq_proj"),
    ...     matches(r".*\\.[qv]", "layers.0.v"),
    ... )
    (True, False, True)
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets or ())


def parameter_of(module: str) -> str:
    """The parameter that a matrix of experts is part of; the name itself of any other module.

    >>> parameter_of("mlp.experts.down_proj[3]"), parameter_of("self_attn.q_proj")
    ('mlp.experts.down_proj', 'self_attn.q_proj')
    """
    return re.sub(r"\[\d+\]$", "", module)


def is_whole(config: Mapping[str, Any], module: str) -> bool:
    """Whether `modules_to_save` takes a module, by itself or by one that it is part of."""
    parts = module.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(
        name.endswith(target) for target in config.get("modules_to_save") or () for name in above
    )


def is_targeted(config: Mapping[str, Any], module: str, is_linear: bool) -> bool:
    """Whether an adapter sits on a module."""
    targets: Any = config.get("target_modules")
    if parameter_of(module) != module:
        return matches(config.get("target_parameters"), parameter_of(module))
    if matches(config.get("exclude_modules"), module) or is_whole(config, module):
        return False
    if isinstance(targets, str):
        return is_linear if targets.lower() == ALL_LINEAR else matches(targets, module)
    if not matches(targets, module):
        return False
    layers = config.get("layers_to_transform")
    if (
        layers is None or layers == [] or module in targets
    ):  # PEFT takes a module named in full whatever its layer
        return True
    patterns = config.get("layers_pattern")
    if patterns:  # also at the root, where PEFT looks for no pattern of its own
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns]
    else:
        found = [re.match(r".*?\.[^.]*\.(\d+)\.", module)]
    numbers = [int(match[1]) for match in found if match is not None][:1]
    return bool(numbers) and numbers[0] in ([layers] if isinstance(layers, int) else layers)


def targeted(
    config: Mapping[str, Any], modules: Mapping[str, bool], present: Collection[str]
) -> list[str]:
    """The modules with an adapter, out of `{module: whether it is linear}`.

    Of "all-linear" PEFT leaves out the output layer, which it knows and we do not: a head without
    tensors is no target.

    Raises:
      ValueError: `target_modules` is empty or takes none of them, with the nearest.
    """
    targets = config.get("target_modules")
    if not targets and not config.get("target_parameters"):
        raise ValueError(
            f"target_modules={targets!r} in {NAME}: write the names of the adapted modules there"
        )
    found = [
        module for module, is_linear in modules.items() if is_targeted(config, module, is_linear)
    ]
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        found = [
            module
            for module in found
            if module in present or module.rsplit(".", 1)[-1] not in HEADS
        ]
    if not found:
        wanted = [targets] if isinstance(targets, str) else sorted(targets or ())
        ends = [*dict.fromkeys(module.rsplit(".", 1)[-1] for module in modules), *modules]
        near = dict.fromkeys(
            name for target in wanted for name in difflib.get_close_matches(target, ends, n=1)
        )
        raise ValueError(
            f"target_modules={wanted} takes none of the modules that names= gives"
            + (f" (near: {', '.join(near)})" if near else "")
            + f"; they are {list(modules)[:8]}{' ...' if len(modules) > 8 else ''}"
        )
    return found


def by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches a module, as PEFT reads `rank_pattern` and its
    like; of a matrix of experts, one that matches its parameter.

    >>> by_pattern({"layers.0.q": 4, "v": 2}, "model.layers.0.q", 8), by_pattern({"v": 2}, "k", 8)
    (4, 8)
    """
    module = parameter_of(module)
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def pattern_of(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """`{pattern: value}` for the modules that differ from the default, read back by
    `by_pattern`."""
    values = {parameter_of(module): value for module, value in values.items()}
    found = {f"^{module}": value for module, value in values.items() if value != default}
    if any(by_pattern(found, module, default) != value for module, value in values.items()):
        found = {
            f"^{re.escape(module)}": value for module, value in values.items() if value != default
        }
    return found


def target_modules(adapted: Sequence[str], modules: Iterable[str]) -> list[str] | str:
    """A `target_modules` that takes just the adapted ones: last names, whole names, or a regular
    expression.

    >>> target_modules(["layers.0.q", "layers.1.q"], ["layers.0.q", "layers.1.q", "head"])
    ['q']
    >>> target_modules(["layers.0.q"], ["layers.0.q", "layers.1.q"])
    ['layers.0.q']
    """
    every = list(modules)
    for targets in (sorted({module.rsplit(".", 1)[-1] for module in adapted}), sorted(adapted)):
        if sorted(module for module in every if matches(targets, module)) == sorted(adapted):
            return targets
    return "|".join(re.escape(module) for module in adapted)


def most(values: Iterable[Any]) -> Any:
    """The most frequent value, the first of several."""
    found = list(values)
    return max(dict.fromkeys(found), key=found.count)
