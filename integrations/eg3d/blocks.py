"""The layers of an EG3D in four groups, coarse to fine, and masks over them: block-wise LoRA for a GAN.

After "Block-wise LoRA: Revisiting Fine-grained LoRA for Effective Personalization and Stylization in Text-to-Image
Generation" (https://arxiv.org/abs/2403.07500), which gives rank 0 to some blocks of a U-Net (its equation 2). A
StyleGAN2's blocks are resolutions of the tri-planes, in which StyleGAN's authors found pose and shape (4² and 8²),
features (16² and 32²) and fine detail (64² on); what is image space is the super-resolution alone.

A group is named by globs on layer names, so a mask is what `convlora.inject_lora(ranks=)`, `convlora.compose` and
`Adapter.set_strength` take.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import combinations

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.generator import TriPlaneGenerator

#: Groups that are on, in the order of `GROUPS`.
Mask = tuple[str, ...]

GROUPS = ("coarse", "middle", "fine", "sr")
FULL_MASK: Mask = GROUPS
_LAST = {"coarse": 8, "middle": 32}  # the finest resolution in a group


def group_globs(G: TriPlaneGenerator) -> dict[str, list[str]]:
    """Globs on the layer names of each group; together they match each layer of `personalize.TARGETS` once.

    coarse is 4² and 8² of the backbone, middle 16² and 32², fine all from 64² on, sr the super-resolution.
    """
    globs: dict[str, list[str]] = {group: [] for group in GROUPS}
    for resolution in G.backbone.synthesis.block_resolutions:
        group = next((name for name, last in _LAST.items() if resolution <= last), "fine")
        globs[group].append(f"backbone.synthesis.b{resolution}.*")
    globs["sr"].append("superresolution.*")
    return globs


def masks() -> Iterator[Mask]:
    """All 2⁴ masks, from none to all."""
    for count in range(len(GROUPS) + 1):
        yield from combinations(GROUPS, count)


def mask_name(mask: Collection[str]) -> str:
    """
    >>> mask_name(("sr", "fine")), mask_name(GROUPS), mask_name(())
    ('fine+sr', 'full', 'none')
    """
    mask = checked(mask)
    return {FULL_MASK: "full", (): "none"}.get(mask, "+".join(mask))


def rest(mask: Collection[str]) -> Mask:
    """The groups that a mask leaves out."""
    return tuple(group for group in GROUPS if group not in checked(mask))


def masked_ranks(G: TriPlaneGenerator, mask: Collection[str]) -> dict[str, int]:
    """`ranks=` of `inject_lora` that trains the groups of a mask alone: 0 for the layers of all others."""
    globs = group_globs(G)
    return {glob: 0 for group in rest(mask) for glob in globs[group]}


def masked_weights(G: TriPlaneGenerator, mask: Collection[str], others: float = 1.0) -> dict[str, float]:
    """Weights of `compose` by which an adapter counts in the groups of a mask alone.

    `others`: the weight of what is in no group, such as a decoder trained in full.
    """
    globs, mask = group_globs(G), checked(mask)
    weights = {glob: float(group in mask) for group in GROUPS for glob in globs[group]}
    return {**weights, "*": others}


def checked(mask: Collection[str]) -> Mask:
    """The mask in the order of `GROUPS`.

    Raises:
        ConvloraError: it names what is no group.
    """
    unknown = [group for group in mask if group not in GROUPS]
    if unknown:
        raise ConvloraError(f"no group of blocks {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    return tuple(group for group in GROUPS if group in mask)
