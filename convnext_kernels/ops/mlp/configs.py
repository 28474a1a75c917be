"""Launch configurations of the MLP in one kernel: data, and the rule that says where it is taken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from convnext_kernels.ops.common.tuning import Tunable

# A program reads all weights from L2, 16 C^2 bytes: for 128 tokens that takes about as long as their arithmetic, for 64
# twice as long. Eight warps hold 128 tokens of 192 float32 sums in 96 registers each.
TOKENS = 128
WARPS = 8


class Step(NamedTuple):
    """Hidden channels of a step, and warps."""

    hidden: int
    warps: int = WARPS


# By compute capability's first number: up to so many channels, which step. Where matrix instructions read registers
# (sm_80, sm_120) every warp loads all weights from shared memory: with 8 warps that takes 1.4 of the multiplication's
# clocks at 96 channels and 1.3 at 128, and one program fits; with 4 0.9, and two do, of 255 registers. At 128 channels
# up to 104 bytes spill then, none in the loop; at 160 in the loop, or 232. At 160 channels 8 warps take 255 registers
# with 64 hidden channels and 188 with 32. At 192, 48 to 96 bytes spill with 64, 8 with 32 (tanh); with 16 shared memory
# takes 1.7 of the clocks: two products are predicted to be a quarter faster. sm_120 spills 8 bytes more. sm_90 and
# sm_100 read weights from shared memory as they multiply, 145 KB of it at 192 channels, where sm_90 takes 217 to 255
# registers. There a loop with 4 warps has 14% fewer instructions, which limit it at 96 channels, and two programs fit
# with up to 255 registers; at 128 300 bytes spill so, and at 64 and fewer two programs of 8 warps fit.
STEPS = {
    8: {96: Step(64, 4), 128: Step(32, 4), 160: Step(32)},
    9: {64: Step(64), 96: Step(64, 4), 192: Step(64)},
    10: {192: Step(64)},
    12: {48: Step(32), 128: Step(64), 160: Step(32)},
}


@dataclass(frozen=True)
class FusedConfig:
    """Channels in two powers of two, the second one or 0, hidden channels of a step, tokens of a tile, and warps.

    With `registers` a thread takes at most so many: with 128 two programs of 8 warps fit on a multiprocessor.
    """

    low: int
    high: int
    hidden: int
    tokens: int = TOKENS
    warps: int = WARPS
    registers: int | None = None


def fused_config(channels: int, architecture: int) -> FusedConfig | None:
    """The configuration for one kernel, or None where two products are better or channels do not split well.

    Products are of powers of two: 96 = 64 + 32 and 192 = 128 + 64 waste nothing.
    """
    low = 1 << (channels.bit_length() - 1)
    high = channels - low
    splits = low >= 32 and (high == 0 or (high >= 16 and high & (high - 1) == 0))
    steps = STEPS.get(architecture // 10, {})
    step = next((step for widest, step in steps.items() if channels <= widest), None)
    if not splits or step is None:
        return None
    return FusedConfig(low, high, step.hidden, warps=step.warps)


def fused_candidates(channels: int, architecture: int) -> list[FusedConfig | None]:
    """Steps of as many hidden channels as the rule's or fewer; half the warps, for as many tokens or half of them; two
    programs where the sums leave registers for that."""
    rule = fused_config(channels, architecture)
    if rule is None:
        return []
    steps = [
        replace(rule, hidden=hidden, tokens=tokens, warps=warps)
        for tokens, warps in ((TOKENS, WARPS), (TOKENS, WARPS // 2), (TOKENS // 2, WARPS // 2))
        for hidden in (16, 32, 64)
        if hidden <= rule.hidden
    ]
    limited = [replace(step, registers=128) for step in steps if step.warps == WARPS and channels <= 128]
    return [*steps, *limited]


FUSED = Tunable("mlp.fused_kernel", fused_config, fused_candidates)
