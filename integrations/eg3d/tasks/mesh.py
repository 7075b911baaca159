"""The surface of a generated head: marching cubes on the density, as a coloured mesh in .ply or .obj."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.images import write_bytes

LEVEL = 10.0  # raw density of the surface in EG3D's scripts; useful values lie between 2 and 20


class Mesh(NamedTuple):
    """vertices (V, 3) and unit normals (V, 3) in world units, faces (F, 3), colours (V, 3) in 0..255."""

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    colours: np.ndarray

    def save(self, path: str | Path) -> Path:
        """Write as binary .ply or as .obj, with normals and colours, atomically."""
        path = Path(path)
        if path.suffix.lower() not in (".ply", ".obj"):
            raise ConvloraError(f"a mesh is written as .ply or .obj, not {path.name!r}")
        return write_bytes(path, _ply(self) if path.suffix.lower() == ".ply" else _obj(self))


@torch.no_grad()
def mesh(
    G: TriPlaneGenerator,
    w: Tensor,
    *,
    resolution: int = 256,
    level: float = LEVEL,
    border: float = 30 / 256,
    chunk: int = 2**18,
    progress: bool = False,
) -> Mesh:
    """The surface where the density of latent w (w_dim,) or (num_ws, w_dim) is `level`.

    The density is evaluated on resolution³ points of the cube of side `box_warp`. `border` is the share of the cube
    that is cut off on every side, where the planes hold leftovers (EG3D's scripts: 30/256). Points are a regular
    grid; EG3D's script shears it by up to a voxel.

    Raises:
        ConvloraError: nothing has this density (the range found is named), or scikit-image is not installed.
    """
    try:
        from skimage.measure import marching_cubes
    except ImportError:
        raise ConvloraError('meshes need scikit-image: pip install "convlora[eg3d]"') from None
    if w.shape not in ((G.w_dim,), (G.num_ws, G.w_dim)):
        raise ConvloraError(f"mesh needs one latent, ({G.w_dim},) or ({G.num_ws}, {G.w_dim}), not {tuple(w.shape)}")
    if resolution < 8:
        raise ConvloraError(f"resolution={resolution}: a mesh needs a grid of at least 8 points a side")
    device = next(G.parameters()).device
    side = float(G.rendering_kwargs["box_warp"])
    planes = G.planes(w.to(device).expand(1, G.num_ws, -1), noise_mode="const")
    axis = torch.linspace(-side / 2, side / 2, resolution, device=device, dtype=planes.dtype)

    def sigma(first: int) -> Tensor:
        index = torch.arange(first, min(first + chunk, resolution**3), device=device)
        i, j, k = index // resolution**2, index // resolution % resolution, index % resolution
        points = torch.stack([axis[i], axis[j], axis[k]], -1)
        return G.sample_mixed(points[None], None, None, planes=planes)["sigma"][0, :, 0].cpu()

    starts = range(0, resolution**3, chunk)
    density = torch.cat([sigma(first) for first in tqdm(starts, desc="density", disable=not progress)])
    volume = density.view(resolution, resolution, resolution).float().numpy()
    cut = math.floor(border * resolution)
    if cut:
        inside = (slice(cut, -cut),) * 3
        volume = np.pad(volume[inside], cut, constant_values=-1000.0)
    if not volume.min() < level < volume.max():
        raise ConvloraError(
            f"no surface at density {level:g}: it lies between {volume[volume > -1000].min():g} and "
            f"{volume.max():g} in the cube; choose a level inside, for instance {volume.max() / 3:.3g}"
        )
    step = side / (resolution - 1)
    vertices, faces, _, _ = marching_cubes(volume, level, spacing=(step, step, step))
    vertices = (vertices - side / 2).astype(np.float32)
    faces = np.ascontiguousarray(faces[:, ::-1])  # so that normals point away from the head, to lower density
    colours = []
    for part in torch.from_numpy(vertices).to(device, planes.dtype).split(chunk):
        rgb = G.sample_mixed(part[None], None, None, planes=planes)["rgb"][0, :, :3]
        colours.append((rgb.clamp(0, 1) * 255).round().byte().cpu().numpy())
    return Mesh(vertices, faces.astype(np.int32), _normals(vertices, faces), np.concatenate(colours))


def _normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit normals of the vertices: those of their faces, weighted by area."""
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    of_faces = np.cross(b - a, c - a)
    total = np.zeros_like(vertices)
    for corner in range(3):
        np.add.at(total, faces[:, corner], of_faces)
    return total / np.linalg.norm(total, axis=1, keepdims=True).clip(1e-12)


def _ply(mesh: Mesh) -> bytes:
    header = [
        "ply", "format binary_little_endian 1.0", "comment made with convlora",
        f"element vertex {len(mesh.vertices)}", *(f"property float {n}" for n in ("x", "y", "z", "nx", "ny", "nz")),
        *(f"property uchar {n}" for n in ("red", "green", "blue")),
        f"element face {len(mesh.faces)}", "property list uchar int vertex_indices", "end_header", "",
    ]  # fmt: skip
    vertex = np.zeros(len(mesh.vertices), [("place", "<f4", 3), ("normal", "<f4", 3), ("colour", "u1", 3)])
    vertex["place"], vertex["normal"], vertex["colour"] = mesh.vertices, mesh.normals, mesh.colours
    face = np.zeros(len(mesh.faces), [("count", "u1"), ("corners", "<i4", 3)])
    face["count"], face["corners"] = 3, mesh.faces
    return "\n".join(header).encode() + vertex.tobytes() + face.tobytes()


def _obj(mesh: Mesh) -> bytes:
    lines = ["# made with convlora; colours follow the coordinates, in 0..1"]
    for place, colour in zip(mesh.vertices.tolist(), (mesh.colours / 255).tolist()):
        lines.append("v " + " ".join(f"{x:.6g}" for x in (*place, *colour)))
    lines += ["vn " + " ".join(f"{x:.4f}" for x in normal) for normal in mesh.normals.tolist()]
    lines += ["f " + " ".join(f"{i}//{i}" for i in corners) for corners in (mesh.faces + 1).tolist()]
    return ("\n".join(lines) + "\n").encode()
