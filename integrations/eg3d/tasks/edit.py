"""Semantic editing inside the personal space: coefficients move so that Σα stays 1 (MyStyle section 4.4; My3DGen)."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.tasks.hull import Hull
from convlora.integrations.eg3d.tasks.views import novel_views

#: What to do with an edit that leaves the dilated hull: keep the last that was inside, go on, or take the nearest.
Exit = Literal["stop", "continue", "project"]


class PersonalDirection(NamedTuple):
    """γ (N,) with Σγ = 0 moves coefficients so that w moves along `step` (w_dim,); `cosine` is that with the direction
    it was made from, 1 if that one lies in the anchors' affine hull."""

    gamma: Tensor
    step: Tensor
    cosine: float


def personal_direction(hull: Hull, normal: Tensor, ridge: float = 1e-6) -> PersonalDirection:
    """The direction `normal` (w_dim,) projected on the *affine* hull of the anchors, in coefficients.

    The minimum-norm γ that fits Wᶜᵀγ ≈ n, Wᶜ = W − mean; as Wᶜᵀ1 = 0, Σγ = 0 and an edit keeps Σα = 1. (MyStyle's
    code projects on the linear span, which contains the large common mean, and inverts an ill-conditioned matrix.)

    `ridge`, relative to the largest squared singular value, damps directions the anchors hardly span.

    Raises:
        ConvloraError: one anchor, or all the same; a direction of another generator.
    """
    if len(hull.anchors) < 2:
        raise ConvloraError("the hull of one anchor is a point: a direction needs the anchors of at least 2 photos")
    centred = (hull.anchors - hull.anchors.mean(0)).double()
    n = normal.double().to(centred)
    if n.shape != centred.shape[1:]:
        raise ConvloraError(f"the direction has shape {tuple(n.shape)}; anchors need ({centred.shape[1]},)")
    U, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    kept = S > S[0] * 1e-7
    if not bool(kept.any()):
        raise ConvloraError("all anchors are the same latent: there is no direction inside their hull")
    U, S, Vh = U[:, kept], S[kept], Vh[kept]
    gamma = U @ ((S / (S.square() + ridge * S[0].square())) * (Vh @ n))
    gamma = gamma - gamma.mean()
    step = gamma @ centred
    cosine = float(step @ n / (step.norm() * n.norm()).clamp_min(1e-12))
    return PersonalDirection(gamma.to(hull.anchors), step.to(hull.anchors), cosine)


class Edit(NamedTuple):
    """Coefficients alpha (K, B, …, N) for K strengths, images (K, B, 3, R, R), and whether each is inside (K, B)."""

    alpha: Tensor
    images: Tensor
    inside: Tensor


def edit(
    G: TriPlaneGenerator,
    hull: Hull,
    alpha: Tensor,
    direction: PersonalDirection,
    strengths: Tensor,
    labels: Tensor,
    *,
    exit: Exit = "project",
    layers: Tensor | None = None,
    batch_size: int = 8,
) -> Edit:
    """`edit_alpha`, rendered from cameras labels (B, 25): B latents, each with every strength."""
    edited = edit_alpha(hull, alpha, direction, strengths, exit=exit, layers=layers)
    views = labels[None, :, None].expand(len(edited), -1, -1, -1).flatten(0, 1)
    images = novel_views(G, hull.w(edited).flatten(0, 1), views, batch_size=batch_size)[:, 0]
    inside = hull.contains(edited, 1e-4)
    inside = inside.all(-1) if alpha.ndim == 3 else inside
    return Edit(edited, images.unflatten(0, edited.shape[:2]), inside)


def edit_alpha(
    hull: Hull,
    alpha: Tensor,
    direction: PersonalDirection,
    strengths: Tensor,
    *,
    exit: Exit = "continue",
    layers: Tensor | None = None,
) -> Tensor:
    """(K, B, …, N): coefficients α (B, N), or (B, num_ws, N) of α⁺, moved by each of the K strengths.

    A strength is the distance along the unit direction in W. `layers` (num_ws,) scales it per layer, which needs α⁺.

    `exit` says what becomes of an edit outside the dilated hull: "stop" keeps the greatest strength of the same sign
    that was inside (the unedited α if none was), "continue" lets it be, "project" takes the nearest coefficients.

    Raises:
        ConvloraError: an unknown exit; coefficients or a direction of another number of anchors; `layers` without α⁺.
    """
    if exit not in get_args(Exit):
        raise ConvloraError(f"exit is one of {', '.join(get_args(Exit))}, not {exit!r}")
    if alpha.ndim not in (2, 3) or alpha.shape[-1] != len(hull.anchors):
        raise ConvloraError(
            f"coefficients of {len(hull.anchors)} anchors are (B, {len(hull.anchors)}), or (B, num_ws, "
            f"{len(hull.anchors)}) per layer, not {tuple(alpha.shape)}"
        )
    if direction.gamma.shape != hull.anchors.shape[:1]:
        raise ConvloraError(f"the direction is of {len(direction.gamma)} anchors, this hull has {len(hull.anchors)}")
    length = direction.step.norm()
    gamma = direction.gamma / length.clamp_min(1e-12)
    alpha = alpha.to(gamma)
    if layers is not None:
        if alpha.ndim != 3 or layers.shape != alpha.shape[1:2]:
            raise ConvloraError(
                f"layers {tuple(layers.shape)} needs coefficients per layer (B, {len(layers)}, N), "
                f"not {tuple(alpha.shape)}"
            )
        gamma = layers.to(gamma)[:, None] * gamma
    scale = strengths.to(gamma).view(-1, *[1] * alpha.ndim)
    edited = alpha + scale * gamma
    if exit == "project":
        return hull.nearest(edited)
    if exit == "continue":
        return edited
    # The hull is convex: along a ray from α the strengths that stay inside end somewhere.
    inside = hull.contains(edited)
    inside = inside.all(-1) if alpha.ndim == 3 else inside  # (K, B)
    kept = torch.empty_like(edited)
    for k, strength in enumerate(strengths.tolist()):
        kept[k] = alpha
        smaller = [j for j, s in enumerate(strengths.tolist()) if s * strength > 0 and abs(s) <= abs(strength)]
        for j in sorted(smaller, key=lambda j: abs(float(strengths[j]))):
            kept[k] = torch.where(inside[j].view(-1, *[1] * (alpha.ndim - 1)), edited[j], kept[k])
    return kept
