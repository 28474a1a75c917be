"""Launch configurations of the MLP in one kernel: data, and the rule that says where it is taken."""

from __future__ import annotations

from dataclasses import dataclass, replace

from convnext_kernels.ops.common.tuning import Tunable

# A program reads all weights from L2, 16 C^2 bytes: for 128 tokens that takes about as long as their arithmetic, for 64
# twice as long. Eight warps hold 128 tokens of 192 float32 sums in 96 registers each.
TOKENS = 128
WARPS = 8

# By compute capability's first number: up to so many channels, so many hidden channels of a step. Compiled for sm_80,
# 160 channels take 255 registers with 64 hidden channels and 188 with 32; 192 spill 48 to 96 bytes with 64, 8 with 32
# (tanh) and none with 16, but for sm_120 8 even then, as do 48 with 64. The matrix units of sm_90 and sm_100 read
# weights from shared memory, 145 KB of it at 192 channels, where sm_90 takes 217 to 255 registers.
STEPS = {
    8: {128: 64, 160: 32, 192: 16},
    9: {192: 64},
    10: {192: 64},
    12: {48: 32, 128: 64, 160: 32},
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
    hidden = next((hidden for widest, hidden in steps.items() if channels <= widest), None)
    if not splits or hidden is None:
        return None
    return FusedConfig(low, high, hidden)


def fused_candidates(channels: int, architecture: int) -> list[FusedConfig | None]:
    """Steps of as many hidden channels as the rule's or fewer; half the tokens for half the warps; two programs where
    the sums leave registers for that."""
    rule = fused_config(channels, architecture)
    if rule is None:
        return []
    steps = [
        replace(rule, hidden=hidden, tokens=tokens, warps=warps)
        for tokens, warps in ((TOKENS, WARPS), (TOKENS // 2, WARPS // 2))
        for hidden in (16, 32, 64)
        if hidden <= rule.hidden
    ]
    limited = [replace(step, registers=128) for step in steps if step.warps == WARPS and channels <= 128]
    return [*steps, *limited]


FUSED = Tunable("mlp.fused_kernel", fused_config, fused_candidates)
