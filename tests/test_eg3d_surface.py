"""Meshes, depth and normals, held against shapes whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import tiny_generator

from convlora.errors import ConvloraError
from convlora.integrations import eg3d
from convlora.integrations.eg3d import cameras, lab
from convlora.integrations.eg3d.renderer import sample_rays
from convlora.integrations.eg3d.tasks.depth import depth_picture, normals
from convlora.integrations.eg3d.tasks.mesh import Mesh, mesh

RADIUS = 0.3


@pytest.fixture
def ball(monkeypatch):
    """A tiny generator whose density is that of a ball around `CENTER`, coloured by position."""
    G = tiny_generator()
    center = torch.tensor([0.05, -0.02, 0.1])

    def sample(points, directions, ws, *, planes):
        distance = (points - center).norm(dim=-1, keepdim=True)
        return {"sigma": 10 + 100 * (RADIUS - distance), "rgb": points + 0.5}

    monkeypatch.setattr(G, "sample_mixed", sample)
    return G, center.numpy()


def test_the_surface_of_a_ball(ball) -> None:
    G, center = ball
    found = mesh(G, torch.zeros(8), resolution=48, border=0, chunk=5000)
    out = found.vertices - center
    assert np.allclose(np.linalg.norm(out, axis=1), RADIUS, atol=2e-3)
    assert np.allclose(found.normals, out / RADIUS, atol=0.1)  # outwards
    a, b, c = (found.vertices[found.faces[:, i]] for i in range(3))
    volume = float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6)  # positive: faces wind anticlockwise
    assert volume == pytest.approx(4 / 3 * math.pi * RADIUS**3, rel=0.02)
    assert np.abs(found.colours / 255 - (found.vertices + 0.5)).max() < 0.01


def test_the_border_is_cut_off(ball) -> None:
    G, center = ball
    found = mesh(G, torch.zeros(8), resolution=48, border=0.25)
    assert np.abs(found.vertices).max() < 0.5 - 0.2


def test_ply_and_obj_hold_the_same_mesh(ball, tmp_path) -> None:
    G, _ = ball
    found = mesh(G, torch.zeros(8), resolution=16, border=0)
    ply, obj = found.save(tmp_path / "a.ply").read_bytes(), found.save(tmp_path / "a.obj").read_text()
    header, body = ply.split(b"end_header\n", 1)
    assert f"element vertex {len(found.vertices)}".encode() in header
    vertex = np.frombuffer(body, [("p", "<f4", 3), ("n", "<f4", 3), ("c", "u1", 3)], len(found.vertices))
    face = np.frombuffer(body[vertex.nbytes :], [("n", "u1"), ("c", "<i4", 3)])
    assert np.array_equal(vertex["p"], found.vertices) and np.array_equal(face["c"], found.faces)
    lines = obj.splitlines()
    places = np.array([line.split()[1:4] for line in lines if line.startswith("v ")], float)
    corners = np.array([[c.split("//")[0] for c in line.split()[1:]] for line in lines if line.startswith("f ")], int)
    assert np.allclose(places, found.vertices, atol=1e-5) and np.array_equal(corners - 1, found.faces)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(level=1e6), "density 1e\\+06.*lies between"), (dict(resolution=2), "resolution=2"),
        (dict(w=torch.zeros(3, 8)), r"\(3, 8\)"),
    ],
)  # fmt: skip
def test_impossible_meshes_are_refused(ball, arguments, message) -> None:
    w = arguments.pop("w", torch.zeros(8))
    with pytest.raises(ConvloraError, match=message):
        mesh(ball[0], w, **{"resolution": 16, "border": 0, **arguments})


def test_a_mesh_needs_a_known_suffix(tmp_path) -> None:
    empty = Mesh(np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros((0, 3)), np.zeros((0, 3)))
    with pytest.raises(ConvloraError, match="stl"):
        empty.save(tmp_path / "a.stl")


def test_the_prior_s_surface_is_near_that_of_the_head_it_draws() -> None:
    G = eg3d.load_generator("lab").requires_grad_(False)
    params = torch.cat([lab.sample_identity(850_100), torch.zeros(1, len(lab.world.NUISANCE_NAMES))], 1)
    w = G.mapping(lab.z_from_params(params), cameras.frontal())[0, 0]
    found = mesh(G, w, resolution=96)
    front = found.vertices[(found.vertices[:, 2] > 0.1) & (np.abs(found.vertices[:, 1]) < 0.15)]
    distance = lab.sdf(params, None, torch.from_numpy(front)[None]).abs()
    assert len(front) > 500 and float(distance.median()) < 0.03  # a head is about 0.4 wide


def test_normals_of_a_wall_and_of_a_ball() -> None:
    labels = cameras.frontal(2)
    side = 64
    cam2world, intrinsics = cameras.split_label(labels)
    origins, directions = sample_rays(cam2world, intrinsics, side)
    wall = (-origins[..., 2:] / directions[..., 2:]).transpose(1, 2).unflatten(2, (side, side))
    assert torch.allclose(normals(wall, labels)[:, 2], torch.ones(2, side, side), atol=1e-4)
    # nearest hits of a ball of radius 1 around the world's origin, which fills the picture
    along = (origins * directions).sum(-1)
    depth = -along - (along.square() - origins.square().sum(-1) + 1).sqrt()
    points = origins + depth[..., None] * directions
    found = normals(depth.view(2, 1, side, side), labels)
    middle = slice(side * 20, side * 40)
    assert torch.allclose(found.flatten(2).transpose(1, 2)[:, middle], points[:, middle], atol=0.05)


def test_depth_pictures_are_white_where_near() -> None:
    depth = torch.linspace(2, 3, 16).view(1, 1, 4, 4)
    assert float(depth_picture(depth)[0, 0, 0, 0]) == 1 and float(depth_picture(depth)[0, 0, 3, 3]) == -1
    assert float(depth_picture(depth, 1, 3)[0, 0, 0, 0]) == pytest.approx(0)
