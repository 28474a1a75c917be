"""The published sizes of ConvNeXt as data: V1, V2 and isotropic, under timm's base names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One size of the network.

    Attributes:
        name: timm's base name.
        depths: blocks per stage.
        dims: channels per stage.
        layer_scale_init_value: the layer scale's first value; None: the blocks have none.
        use_grn: whether the blocks have global response normalisation (V2).
        eps: the layer norms' epsilon.
        isotropic: one stage at stride 16 in place of four at strides 4 to 32.
    """

    name: str
    depths: tuple[int, ...]
    dims: tuple[int, ...]
    layer_scale_init_value: float | None = 1e-6
    use_grn: bool = False
    eps: float = 1e-6
    isotropic: bool = False


def _widths(first: int) -> tuple[int, ...]:
    return (first, 2 * first, 4 * first, 8 * first)


def _v1(size: str, depths: tuple[int, ...], width: int, eps: float = 1e-6) -> Variant:
    return Variant(f"convnext_{size}", depths, _widths(width), eps=eps)


def _v2(size: str, depths: tuple[int, ...], width: int) -> Variant:
    return Variant(f"convnextv2_{size}", depths, _widths(width), layer_scale_init_value=None, use_grn=True)


def _isotropic(size: str, depth: int, width: int, layer_scale_init_value: float | None) -> Variant:
    return Variant(f"convnext_isotropic_{size}", (depth,), (width,), layer_scale_init_value, isotropic=True)


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _v1("atto", (2, 2, 6, 2), 40),
        _v1("femto", (2, 2, 6, 2), 48),
        _v1("pico", (2, 2, 6, 2), 64),
        _v1("nano", (2, 2, 8, 2), 80),
        _v1("tiny", (3, 3, 9, 3), 96),
        _v1("small", (3, 3, 27, 3), 96),
        _v1("base", (3, 3, 27, 3), 128),
        _v1("large", (3, 3, 27, 3), 192),
        _v1("xlarge", (3, 3, 27, 3), 256),
        _v1("xxlarge", (3, 4, 30, 3), 384, eps=1e-5),
        _v2("atto", (2, 2, 6, 2), 40),
        _v2("femto", (2, 2, 6, 2), 48),
        _v2("pico", (2, 2, 6, 2), 64),
        _v2("nano", (2, 2, 8, 2), 80),
        _v2("tiny", (3, 3, 9, 3), 96),
        _v2("base", (3, 3, 27, 3), 128),
        _v2("large", (3, 3, 27, 3), 192),
        _v2("huge", (3, 3, 27, 3), 352),
        _isotropic("small", 18, 384, None),
        _isotropic("base", 18, 768, None),
        _isotropic("large", 36, 1024, 1e-6),
    )
}
"""Every variant by name. Sizes: arXiv 2201.03545, appendix and section 3.3; arXiv 2301.00808, appendix; timm for V1's
four smallest and for xxlarge (CLIP)."""


def network_options(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The network's arguments for the variant of that name, with those of `overrides` in their place.

    Raises:
        ValueError: there is no such variant; the message names the closest ones.
    """
    if name not in VARIANTS:
        close = get_close_matches(str(name), VARIANTS, n=5, cutoff=0.5)
        accepted = f"did you mean {', '.join(close)}?" if close else "list_models() names them all"
        raise ValueError(f"name: got {name!r}; accepted: the name of a variant; {accepted}")
    options = asdict(VARIANTS[name]) | dict(overrides)
    del options["name"]
    return options
