"""Where a host's block keeps what ours reads, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockAdapter:
    """Attribute paths of a host's block, from the block itself, such as "mlp.fc1".

    A module is this host's block if it has a convolution, a norm, an activation and both linear layers at these paths:
    copies of a library's file in other repositories are found as well, and nothing needs to be imported. Whether it
    computes what ours does is examined before it is swapped.

    Attributes:
        library: whose block it is.
        conv, norm, linear1, activation, linear2: modules that the block must have.
        grn: global response norm; grn_parameters are its weight and bias. Where the block has none, V1.
        drop_path: stochastic depth, where the block has any.
        layer_scale: the parameter, where the block has any.
        class_name: the class or a base of it must have this name, for paths that say too little.
        checkpoint: an attribute of the block that tells whether its activations are computed again in backward.
        follows_input: the result is channels-last only if the input is; otherwise always.
    """

    library: str
    conv: str
    norm: str
    linear1: str
    activation: str
    linear2: str
    grn: str | None = None
    grn_parameters: tuple[str, str] = ("weight", "bias")
    drop_path: str | None = "drop_path"
    layer_scale: str | None = "gamma"
    class_name: str | None = None
    checkpoint: str | None = None
    follows_input: bool = True
