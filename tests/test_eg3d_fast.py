"""What makes the generator fast or small must not change its numbers."""

from __future__ import annotations

import traceback
from dataclasses import replace

import pytest
import torch
from test_eg3d_generator import FIXED, inputs, tiny
from tiny import tiny_generator, tiny_photos
from torch.utils._python_dispatch import TorchDispatchMode

import convlora
from convlora.cli import main
from convlora.errors import ConvloraError, FileError
from convlora.integrations import eg3d
from convlora.integrations.eg3d import cameras, renderer
from convlora.integrations.eg3d.anchors import Anchors, bytes_kept, find_anchors
from convlora.integrations.eg3d.batches import fitting, free_memory
from convlora.integrations.eg3d.losses import photo_loss, reconstruct
from convlora.integrations.eg3d.personalize import TARGETS, inject_personal, parameter_groups, tune
from convlora.integrations.eg3d.pipeline import Settings, _watching, check_settings
from convlora.integrations.eg3d.precision import computing_in
from convlora.integrations.eg3d.prefix import constant_blocks, constant_prefix


def rays(n=2, side=5, dtype=torch.float32):
    return renderer.sample_rays(*cameras.split_label(cameras.random_views(n, seed=3).to(dtype)), side)


# ---- rendering -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("fine", [0, 6])
@pytest.mark.parametrize("start", [2.25, "auto"])
def test_rays_a_few_at_a_time_are_the_same(random, fine, start):
    """With the limits of all rays, and the very same random samples."""
    limits = dict(ray_start=start, ray_end="auto" if start == "auto" else 3.3)
    G = tiny(depth_resolution_importance=fine, **limits).double()
    planes = torch.randn(2, 3, 4, 16, 16, dtype=torch.float64)

    def render(points):
        torch.manual_seed(1)
        return renderer.render_rays(
            planes, G.decoder, *rays(dtype=torch.float64), G.rendering_kwargs, not random, points
        )

    with torch.no_grad():
        want = render(10**6)
        for points in (1, 37, 60):
            for got, expected in zip(render(points), want, strict=True):
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    with_gradients = render(1)
    assert with_gradients.features.requires_grad
    torch.testing.assert_close(with_gradients.features, want.features, rtol=0, atol=1e-12)


def test_colours_of_all_samples_are_never_held_at_once():
    """Without gradients the decoder sees few points at a time; with them, all."""
    G = tiny()
    planes = torch.randn(1, 3, 4, 16, 16)
    seen = []

    def decoder(features, directions):
        seen.append(features.shape[1])
        return G.decoder(features, directions)

    with torch.no_grad():
        renderer.render_rays(planes, decoder, *rays(1), G.rendering_kwargs, points=60)
    assert max(seen) <= 60 and sum(seen) == 2 * 25 * 6
    seen.clear()
    renderer.render_rays(planes, decoder, *rays(1), G.rendering_kwargs, points=60)
    assert seen == [150, 150]


def test_sampling_by_texels_is_sampling_by_grid():
    """Values, with gradients and without, and the gradients of planes and points, outside the box too."""
    torch.manual_seed(0)
    planes = torch.randn(2, 3, 4, 9, 9, dtype=torch.float64, requires_grad=True)
    points = (torch.rand(2, 40, 3, dtype=torch.float64) * 1.4 - 0.7).requires_grad_()
    weight = torch.randn(2, 40, 4, dtype=torch.float64)
    got = renderer.sample_folded(renderer.fold_planes(planes), points, 1.1)
    want = renderer.sample_planes(planes, points, 1.1).mean(1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    with torch.no_grad():
        texels = renderer.sample_folded(renderer.fold_planes(planes), points, 1.1)
    torch.testing.assert_close(texels, want, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (planes, points)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@torch.no_grad()
def test_points_that_are_no_numbers_have_no_features():
    points = torch.tensor([[[0.1, 0.2, 0.3], [float("nan"), 0.2, 0.3], [0.1, float("inf"), 0.3]]])
    got = renderer.sample_folded(renderer.fold_planes(torch.ones(1, 3, 2, 8, 8)), points, 1.0)
    assert got[0, 0].isfinite().all() and got[0, 1].isnan().all() and not got[0, 2].isfinite().all()


def test_the_decoder_writes_over_nothing_that_is_needed():
    G = tiny()
    features = torch.randn(2, 7, 4)
    with torch.no_grad():
        kept = features.clone()
        fast = G.decoder(features)
    assert torch.equal(features, kept)
    slow = G.decoder(features)
    assert torch.equal(fast["rgb"], slow["rgb"]) and torch.equal(fast["sigma"], slow["sigma"])


def test_the_whole_generator_is_the_same_without_gradients():
    G = tiny().double()
    z, c = inputs()
    want = G(z, c, **FIXED)
    with torch.no_grad():
        got = G(z, c, **FIXED)
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=0, atol=1e-10)


# ---- compiling -----------------------------------------------------------------------------------------------------


def test_a_training_step_is_one_graph_for_all_cameras_latents_and_adapters():
    G = tiny().requires_grad_(False)
    adapter = inject_personal(G)

    def loss(ws, c):
        out = G.synthesis(ws, c, **FIXED)
        return out["image"].square().mean() + out["image_raw"].square().mean()

    def gradients(function, *args):
        return torch.autograd.grad(function(*args), [p for p in adapter.parameters() if p.requires_grad])

    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        for seed in range(2):
            z, c = inputs(2, seed)
            ws = G.mapping(z)
            for got, want in zip(gradients(compiled, ws, c), gradients(loss, ws, c), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
            adapter.swap({key: torch.randn_like(value) * 0.1 for key, value in adapter.state_dict().items()})


def test_a_view_is_one_graph_for_all_cameras_latents_and_adapters():
    G = tiny().requires_grad_(False)
    adapter = inject_personal(G)

    def view(ws, c):
        return G.synthesis(ws, c, **FIXED)["image"]

    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(view, backend="aot_eager", fullgraph=True)
        for seed in range(2):
            z, c = inputs(2, seed)
            ws = G.mapping(z)
            torch.testing.assert_close(compiled(ws, c), view(ws, c), rtol=1e-3, atol=1e-5)
            adapter.swap({key: torch.randn_like(value) * 0.1 for key, value in adapter.state_dict().items()})


# ---- tuning --------------------------------------------------------------------------------------------------------

PHOTOS = tiny_photos(4)
ANCHORS = Anchors(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), PHOTOS.names, torch.zeros(4))


def tuned(steps=3, dtype=torch.float64, photos=(0, 1, 2, 3), **options):
    """The adapter's tensors and the history, in double precision: only a real difference is seen."""
    G = tiny_generator().to(dtype)
    torch.manual_seed(0)
    adapter = inject_personal(G)
    data = PHOTOS.part(list(photos))
    data = replace(data, images=data.images.to(dtype), labels=data.labels.to(dtype))
    anchors = ANCHORS.part(list(photos))
    anchors = anchors._replace(w=anchors.w.to(dtype))
    groups = parameter_groups(adapter, 0.01, 0.01)
    history = tune(G, data, anchors, groups, steps=steps, progress=False, **{"batch_size": 3, **options})
    return [p.detach().clone() for p in adapter.parameters()], history


@pytest.fixture(scope="module")
def plain():
    return tuned()


@pytest.mark.parametrize("options", [dict(accumulate=2), dict(accumulate=3), dict(checkpointing=True)], ids=str)
def test_less_memory_the_same_result(plain, options):
    got, history = tuned(**options)
    for a, b in zip(got, plain[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert history == [(3, pytest.approx(plain[1][0][1], rel=1e-9))]


def test_samples_of_a_batch_are_what_synthesis_draws():
    G = tiny_generator()
    w, c = ANCHORS.w[:2], PHOTOS.labels[:2]
    torch.manual_seed(7)
    want = reconstruct(G, w, c)
    torch.manual_seed(7)
    samples = G.samples(2)
    torch.testing.assert_close(reconstruct(G, w, c, samples=samples), want)
    alone = reconstruct(G, w[1:], c[1:], samples=samples.part(slice(1, 2)))
    torch.testing.assert_close(alone["image"], want["image"][1:], rtol=0, atol=1e-4)


def test_checkpointing_keeps_less_for_backward():
    G = tiny_generator()
    inject_personal(G)

    def kept(**options):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            out = reconstruct(G, ANCHORS.w[:2], PHOTOS.labels[:2], deterministic=True, **options)
        return sum(sizes), out["image"]

    (much, want), (little, got) = kept(), kept(checkpointing=True)
    assert torch.equal(got, want) and little < much / 5


def test_bfloat16_agrees_to_a_few_per_cent_on_the_lab_and_flags_come_back():
    G = eg3d.load_generator("lab").requires_grad_(False)
    z, c = torch.randn(4, 96, generator=torch.Generator().manual_seed(0)), cameras.random_views(4, seed=0)
    w = G.mapping(z, c)[:, 0]
    photos = reconstruct(G, w[2:], c[2:], deterministic=True)["image"]
    before = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]

    def loss(precision):
        with computing_in(precision, torch.device("cpu")), torch.no_grad():
            flags = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
            assert flags == {"float32": [False, False], "tf32": [True, True]}.get(precision, before)
            return photo_loss(reconstruct(G, w[:2], c[:2], deterministic=True), photos, None)

    want = loss("float32")
    assert torch.equal(loss(None), want)
    assert torch.equal(loss("tf32"), want)  # a CPU has no such thing
    half = loss("bfloat16")
    assert half.dtype == torch.float32 and not torch.equal(half, want)
    torch.testing.assert_close(half.mean(), want.mean(), rtol=0.03, atol=0)
    assert [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32] == before
    with pytest.raises(ConvloraError, match="precision must be one of float32, tf32, bfloat16, not 'fp16'"):
        loss("fp16")


def test_tuning_in_bfloat16_learns_the_same():
    def last(precision):
        return tuned(10, torch.float32, precision=precision)[1][-1][1]

    assert last("bfloat16") == pytest.approx(last("float32"), rel=0.05)


class Distance:
    """Grows for the held-out photos, which come alone, from the third look on; ends the program after `calls`."""

    def __init__(self, calls=10**9):
        self.looks, self.left = 0, calls

    def __call__(self, a, b):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        if torch.is_grad_enabled():
            return (a - b).abs().mean((1, 2, 3))
        self.looks += 1
        return torch.full((len(a),), float(10 - self.looks if self.looks <= 4 else 10 + self.looks))


def early(distance, file=None, steps=100):
    photos = PHOTOS.part([3])
    return tuned(
        steps, torch.float32, (0, 1, 2), batch_size=1, perceptual=distance, held_out=(photos, ANCHORS.part([3])),
        patience=2, look_every=10, checkpoint=file, checkpoint_seconds=0,
    )  # fmt: skip


def test_tuning_stops_on_a_plateau_with_the_best_weights_and_resumes(tmp_path):
    distance = Distance()
    whole, history = early(distance)
    assert distance.looks == 2 * 4 and history[-1][0] == 40  # each look sees image_raw and image; the second is best
    file = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        early(Distance(70), file)
    resumed_distance = Distance()
    resumed_distance.looks = 2 * torch.load(file, weights_only=True)["step"] // 10
    resumed, again = early(resumed_distance, file)
    assert again == history
    finished, _ = early(Distance(0), file)  # a stopped run is a finished one
    for a, b, c in zip(whole, resumed, finished, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    with pytest.raises(FileError, match="other settings"):
        tuned(100, torch.float32, (0, 1, 2), batch_size=1, checkpoint=file)


def test_wrong_options_of_tuning_are_named():
    with pytest.raises(ConvloraError, match="accumulate is 4; a batch of 3 has 1 to 3 parts"):
        tuned(accumulate=4)
    with pytest.raises(ConvloraError, match="needs held_out"):
        tuned(patience=2)
    with pytest.raises(ConvloraError, match="look_every=15.*a multiple of 10"):
        tuned(patience=2, look_every=15, held_out=(PHOTOS, ANCHORS))


def test_watched_photos_are_not_tuned_to():
    photos = tiny_photos(17)
    anchors = Anchors(torch.arange(17.0)[:, None], photos.names, torch.zeros(17))
    rest, at, options = _watching(photos, anchors, Settings(patience=3, precision="tf32"))
    watched, pinned = options.pop("held_out")
    assert options == {"patience": 3, "precision": "tf32"}
    assert watched.names == pinned.names == [photos.names[7], photos.names[15]] and pinned.w.flatten().tolist() == [
        7,
        15,
    ]
    assert rest.names == at.names == [name for name in photos.names if name not in watched.names]
    few = _watching(tiny_photos(3), anchors.part([0, 1, 2]), Settings(patience=1))
    assert len(few[0]) == 2 and few[2]["held_out"][0].names == ["photo_02.png"]
    assert _watching(photos, anchors, Settings()) == (photos, anchors, {})
    with pytest.raises(ConvloraError, match="needs 2 training photos"):
        _watching(photos.first(1), anchors.part([0]), Settings(patience=1))
    with pytest.raises(ConvloraError, match="accumulate is 5"):
        check_settings(tiny_generator(), Settings(accumulate=5))


def test_the_command_line_passes_them_on(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("convlora.integrations.eg3d.demo.run_demo", lambda out, **told: seen.append(told["settings"]))
    monkeypatch.setattr("convlora.cli_eg3d._finish", lambda report, out: None)
    command = ["eg3d", "demo", "--out", str(tmp_path)]
    main([*command, "--accumulate", "2", "--checkpointing", "--precision", "bfloat16", "--patience", "3"])
    main(command)
    found = [(s.accumulate, s.checkpointing, s.precision, s.patience) for s in seen]
    assert found == [(2, True, "bfloat16", 3), (None, None, None, None)]


# ---- anchors -------------------------------------------------------------------------------------------------------


def test_anchors_are_the_same_in_any_batch():
    """In double precision; with the latents' noise and the renderer's jitter."""
    G = tiny_generator().double()
    photos = replace(PHOTOS, images=PHOTOS.images.double(), labels=PHOTOS.labels.double())
    want = find_anchors(G, photos, 6, lr=0.1, batch_size=4, progress=False)
    for batch_size in (1, 3, None):
        got = find_anchors(G, photos, 6, lr=0.1, batch_size=batch_size, progress=False)
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-8, atol=0)
        torch.testing.assert_close(got.w, want.w, rtol=1e-6, atol=1e-8)


def test_a_batch_fits_the_free_memory(monkeypatch):
    cpu = torch.device("cpu")
    free = free_memory(cpu)
    assert free is None or free > 2**20
    monkeypatch.setattr("convlora.integrations.eg3d.batches.free_memory", lambda device: 1000)
    assert [fitting(each, cpu) for each in (1, 125, 300, 999, 5000)] == [8, 8, 3, 1, 1]
    assert fitting(10, torch.device("meta")) == 64
    monkeypatch.setattr("convlora.integrations.eg3d.batches.free_memory", lambda device: None)
    assert fitting(10**12, cpu) == 8
    small, large = tiny_generator(), tiny_generator()
    large.neural_rendering_resolution = 32
    assert bytes_kept(large) > 1.3 * bytes_kept(small) > 10**6


class HostReads(TorchDispatchMode):
    """Counts what would wait for a GPU. Adam's counters of steps, which it reads, are not on one."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")
        if waits and not any("/optim/" in frame.filename for frame in traceback.extract_stack()):
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_steps_do_not_wait_for_the_device():
    """Losses are read every tenth step and at the end: steps between these read nothing."""
    G, photos = tiny_generator(), tiny_photos(4)
    anchors = find_anchors(G, photos, 2, batch_size=4, progress=False)
    adapter = inject_personal(G)

    def tuned(steps):
        tune(G, photos, anchors, [{"params": adapter.parameters()}], steps=steps, batch_size=2, progress=False)

    def inverted(steps):
        find_anchors(G, photos, steps, batch_size=4, progress=False)

    for run in (tuned, inverted):
        counts = []
        for steps in (11, 19):
            with HostReads() as reads:
                run(steps)
            counts.append(reads.count)
        assert counts[0] == counts[1] < 30, (run.__name__, counts)


# ---- what is constant while weights are tuned ----------------------------------------------------------------------


def block_wise(ranks: dict[str, int]) -> tuple[eg3d.TriPlaneGenerator, convlora.Adapter]:
    G = tiny_generator()
    torch.manual_seed(3)
    return G, convlora.inject_lora(G, 1, targets=list(TARGETS), ranks=ranks, train=["decoder"])


@pytest.mark.parametrize(
    ("ranks", "blocks"),
    [({}, 0), ({"backbone.synthesis.b4.*": 0, "backbone.synthesis.b8.*": 0}, 2), ({"backbone.*": 0}, 3)],
)
def test_blocks_in_front_of_the_first_tuned_one_run_once_per_photo(ranks, blocks, monkeypatch):
    photos = tiny_photos(3)
    anchors = Anchors(torch.randn(3, 8), photos.names, torch.zeros(3))
    found = []
    for kept in (True, False):
        G, adapter = block_wise(ranks)
        tuned = list(adapter.parameters())
        assert constant_blocks(G, tuned) == blocks
        if not kept:
            monkeypatch.setitem(tune.__globals__, "constant_prefix", lambda *_: None)
        runs: list[int] = []
        G.backbone.synthesis.b4.register_forward_hook(lambda *call, runs=runs: runs.append(len(call[2][0])))
        groups = parameter_groups(adapter, 0.01, 0.01)
        history = tune(G, photos, anchors, groups, steps=10, batch_size=2, progress=False)
        assert sum(runs) == (3 if kept and blocks else 20)
        found.append([loss for _, loss in history] + [p.detach() for p in tuned])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_little_memory_keeps_fewer_constant_blocks(monkeypatch):
    G, adapter = block_wise({"backbone.*": 0})
    after = constant_prefix(G, torch.randn(5, 8), adapter.parameters(), 2)
    assert after.blocks == 3 and after.x.shape[0] == after.img.shape[0] == 5
    ws = torch.randn(1, G.num_ws, G.w_dim)
    begun = G.backbone.synthesis.advance(ws, 2, noise_mode="const")
    whole = G.backbone.synthesis(ws, noise_mode="const")
    assert torch.equal(G.backbone.synthesis(ws, begun, noise_mode="const"), whole)
    bytes_of = lambda state: (state.x.numel() + state.img.numel()) * 4  # noqa: E731
    monkeypatch.setattr("convlora.integrations.eg3d.prefix.free_memory", lambda _: 4 * 5 * bytes_of(begun))
    assert constant_prefix(G, torch.randn(5, 8), adapter.parameters(), 2).blocks == 2
    monkeypatch.setattr("convlora.integrations.eg3d.prefix.free_memory", lambda _: 0)
    assert constant_prefix(G, torch.randn(5, 8), adapter.parameters(), 2) is None
