"""The PEFT methods that are ours too, by `peft_type`."""

from __future__ import annotations

from lowrank_jax.interop._peft_family import Family
from lowrank_jax.interop._peft_low_rank import HiraFamily, LoraFamily, UniLoraFamily
from lowrank_jax.interop._peft_other import (
    FourierFamily,
    LohaFamily,
    MissFamily,
    OftFamily,
    ShiraFamily,
    VeraFamily,
)
from lowrank_jax.interop._peft_rand_lora import RandLoraFamily

FAMILIES: dict[str, Family] = {
    family.peft_type: family
    for family in (
        LoraFamily(), HiraFamily(), UniLoraFamily(), VeraFamily(), LohaFamily(), OftFamily(), MissFamily(),
        FourierFamily(), ShiraFamily(), RandLoraFamily(),
    )
}  # fmt: skip
