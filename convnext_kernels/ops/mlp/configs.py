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
    """Hidden channels of a step, warps, and bytes of an output's row that are stored at a time."""

    hidden: int
    warps: int = WARPS
    part_bytes: int = 128


# By compute capability, or its first number: up to so many channels, which step. Where matrix instructions read
# registers (sm_80, sm_120) every warp loads all weights from shared memory: with 8 warps that takes 1.4 of the
# multiplication's clocks at 96 channels and 1.3 at 128 and 160, and one program fits; with 4 0.9, and two do, of 255
# registers. From 128 channels on up to 128 bytes spill then where 128 of a row are stored at a time, with 64 up to 16;
# sm_86 has no room for two at 160. At 192 4 warps spill up to 200 in the loop; with 8 and 16 hidden channels shared
# memory takes 1.7 of the clocks, and two products are predicted to be a quarter faster. sm_90 and sm_100 read weights
# from shared memory as they multiply, 145 KB of it at 192 channels. There a loop with 4 warps has 14% fewer
# instructions, which limit it at 96 channels, and two programs fit with up to 255 registers; at 128 48 to 72 bytes
# spill so, in the loop, and at 64 and fewer two programs of 8 warps fit.
STEPS = {
    80: {96: Step(64, 4), 160: Step(32, 4, 64)},
    8: {96: Step(64, 4), 128: Step(32, 4, 64), 160: Step(32)},
    9: {64: Step(64), 96: Step(64, 4), 192: Step(64)},
    10: {192: Step(64)},
    12: {48: Step(32), 128: Step(64), 160: Step(32)},
}


@dataclass(frozen=True)
class FusedConfig:
    """Channels in two powers of two, the second one or 0, hidden channels of a step, tokens of a tile, warps, and bytes
    of an output's row that are stored at a time.

    With `registers` a thread takes at most so many: with 128 two programs of 8 warps fit on a multiprocessor.
    """

    low: int
    high: int
    hidden: int
    tokens: int = TOKENS
    warps: int = WARPS
    registers: int | None = None
    part_bytes: int = 128


def fused_config(channels: int, architecture: int) -> FusedConfig | None:
    """The configuration for one kernel, or None where two products are better or channels do not split well.

    Products are of powers of two: 96 = 64 + 32 and 192 = 128 + 64 waste nothing.
    """
    low = 1 << (channels.bit_length() - 1)
    high = channels - low
    splits = low >= 32 and (high == 0 or (high >= 16 and high & (high - 1) == 0))
    steps = STEPS.get(architecture) or STEPS.get(architecture // 10, {})
    step = next((step for widest, step in steps.items() if channels <= widest), None)
    if not splits or step is None:
        return None
    return FusedConfig(low, high, step.hidden, warps=step.warps, part_bytes=step.part_bytes)


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
