"""Random numbers that depend on where in the training they are drawn, and on nothing drawn before.

What a resumed run draws is then what the run would have drawn, whichever worker or process draws it, and no state of a
generator has to be saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*key: int) -> int:
    """A seed of 32 bits for a place, such as (seed, epoch, index); other places get unrelated ones."""
    # Without the length, zeros at a key's end would count for nothing.
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1)[0])


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Draws on the CPU inside are those of this place; the generator's state outside is left as it was."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed_of(*key))
    try:
        yield
    finally:
        torch.set_rng_state(state)
