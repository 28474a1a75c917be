"""Launch configurations of global response normalisation: data, and the rules that pick among them."""

from __future__ import annotations

# 32 tokens x 64 channels: one 128-bit load of 16-bit values for each of 256 threads.
BLOCK_TOKENS = 32
BLOCK_CHANNELS = 64
WARPS = 8

# Sums over an image's tokens: one split for so many tokens, at most so many.
TOKENS_PER_SPLIT = 256
MAXIMUM_SPLITS = 64


def split_count(tokens: int) -> int:
    """In how many parts the sums over an image's tokens are taken; from their number alone, so runs agree."""
    return max(1, min(MAXIMUM_SPLITS, -(-tokens // TOKENS_PER_SPLIT)))
