"""Teaching a hypernetwork: adapters of many people at once, training that resumes, and losses that are not finite."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_generator, tiny_photos
from torch import Tensor

from convlora.errors import ConvloraError, FileError
from convlora.integrations import stylegan2
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.hyper import Examples, HyperNetwork, Plan, make_examples, supervise, train
from convlora.integrations.eg3d.hyper.codes import canonical, start
from convlora.integrations.eg3d.hyper.examples import render, render_stylegan2, shown

SMALL = dict(dim=16, heads=2, depth=1, decoder_depth=1, refinements=2, side=32, patch=16)
QUIET = dict(progress=False)
PLAN = Plan(steps=6, batch_size=2, lr=1e-3)


def identity(images: Tensor) -> Tensor:
    """Who someone is: the colours of four quarters."""
    return F.normalize(F.adaptive_avg_pool2d(images, 2).flatten(1) + 0.1, dim=1)


@pytest.fixture(scope="module")
def G():
    return tiny_generator()


def sitters(G, count: int = 4, turned: bool = True, person: list[int] | None = None) -> Examples:
    photos = tiny_photos(count)
    w = torch.randn(count, 8, generator=torch.Generator().manual_seed(2))
    more = dict(turned=tiny_photos(count, seed=9).images, turned_labels=cameras.random_views(count, seed=5))
    return make_examples(G, photos, w, person, **(more if turned else {}))


def network(G, **more) -> HyperNetwork:
    torch.manual_seed(0)
    return HyperNetwork.for_generator(G, **{**SMALL, **more})


def state(net: HyperNetwork) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


@pytest.fixture
def adapter(G):
    adapter = network(G).inject(G)
    yield adapter
    adapter.remove()


def test_examples_hold_what_the_generator_makes_of_the_latents(G) -> None:
    found = sitters(G)
    drawn = render(None, G, found.w, found.labels, deterministic=True)["image"]
    assert float((shown(found.drawn) - drawn.clamp(-1, 1)).abs().max()) <= 1 / 127
    assert float((shown(found.images) - tiny_photos(4).images).abs().max()) <= 1 / 127
    both = found.joined(found)
    assert len(both) == 8 and both.person.tolist() == list(range(8))
    with pytest.raises(ConvloraError, match="with and without turned cannot be joined"):
        found.joined(sitters(G, turned=False))
    with pytest.raises(ConvloraError, match="4 photos need 4 rows of w, not 3"):
        make_examples(G, tiny_photos(4), torch.zeros(3, 8))


def test_a_batch_has_different_people_and_everybody_gets_their_turn(G) -> None:
    found = sitters(G, 6, person=[0, 0, 0, 1, 1, 2])
    generator = torch.Generator().manual_seed(0)
    seen = torch.zeros(6)
    for _ in range(300):
        index = found.draw_people(2, generator)
        assert len(index) == 2 and len(set(found.person[index].tolist())) == 2
        seen[index] += 1
    by_person = torch.stack([seen[:3].sum(), seen[3:5].sum(), seen[5]])
    assert bool((by_person - 200).abs().max() < 45), "people are equally likely, however many photos they have"
    assert bool(seen.min() > 30)
    assert len(found.draw_people(9, generator)) == 3


def test_adapters_that_teach_lower_the_loss_and_a_batch_is_each_person_alone(G, adapter, tmp_path) -> None:
    people = sitters(G)
    how = dict(steps=8, lr=0.05, identity=identity, **QUIET)
    together = supervise(adapter, people, batch_size=4, **how)
    assert bool((together.loss[:, 1] < 0.8 * together.loss[:, 0]).all())
    assert together.codes.left.shape[0] == 4 and together.scale()[0] > together.scale()[1] * 0.1
    for a, b in zip(together.codes, canonical(together.codes)):
        assert torch.allclose(a, b, atol=1e-5)
    assert all(not p.requires_grad for p in adapter.parameters())
    file = tmp_path / "codes.safetensors"
    part = supervise(adapter, people.rows(torch.arange(2)), batch_size=2, checkpoint=file, **how)
    whole = supervise(adapter, people, batch_size=2, checkpoint=file, **how)
    assert torch.equal(whole.codes.left[:2], part.codes.left)
    again = supervise(adapter, people, batch_size=2, checkpoint=file, **how)
    assert all(torch.equal(a, b) for a, b in zip(again.codes, whole.codes))
    with pytest.raises(FileError, match=r"made with other settings \(lr: 0.05 there, 0.01 now\)"):
        supervise(adapter, people, batch_size=2, checkpoint=file, **{**how, "lr": 0.01})


def test_people_do_not_mix_in_a_batch(G, adapter) -> None:
    """Without the renderer's random numbers, which depend on the batch, it is the same person alone to rounding."""
    people = sitters(G)

    def still(adapter, model, w, labels, codes=None, layout=None):
        return render(adapter, model, w, labels, codes, layout, deterministic=True)

    how = dict(steps=3, lr=0.02, draw=still, **QUIET)
    together = supervise(adapter, people, batch_size=4, **how)
    alone = supervise(adapter, people, batch_size=1, **how)
    product = together.codes.left @ together.codes.right
    assert torch.allclose(product, alone.codes.left @ alone.codes.right, atol=2e-3 * float(product.abs().max()))
    assert torch.allclose(together.loss, alone.loss, rtol=1e-3)


def test_a_diverging_adapter_names_whose_it_is(G, adapter) -> None:
    people = sitters(G)
    bad = replace(people, w=torch.where(torch.arange(4)[:, None] == 2, float("nan"), people.w))
    with pytest.raises(ConvloraError, match="adapter of photo_02.png diverged at step 1 of 2.*before anything was"):
        supervise(adapter, bad, 2, batch_size=4, **QUIET)


def test_training_lowers_its_losses_and_begins_where_the_teachers_did(G, adapter) -> None:
    people = sitters(G)
    taught = supervise(adapter, people, 10, lr=0.05, batch_size=4, **QUIET)
    net = network(G)
    history = train(
        net, adapter, people, taught, plan=Plan(60, 4, 3e-3, average=0.9, code_weight=0.05), identity=identity, **QUIET
    )
    first, last = history[0][1], history[-1][1]
    assert list(first) == ["pictures", "codes", "identity"] and history[-1][0] == 60
    assert last["pictures"] < 0.8 * first["pictures"] and last["identity"] < first["identity"]
    assert torch.equal(net.offset_right, start(net.layout, 1).right[0]) and float(net.scale_left) == taught.scale()[0]
    assert not net.training
    scale = float(net.scale_left)
    again = copy.deepcopy(net)
    train(again, adapter, people, taught._replace(moved=taught.moved * 2), plan=PLAN, **QUIET)
    assert float(again.scale_left) == scale, "what was learnt before keeps its units"
    # what it was trained for: its codes bring the pictures closer to the photos than the generator alone
    photo = shown(people.images)
    codes = net(photo, photo - shown(people.drawn))
    with torch.no_grad():
        personal, plain = (
            render(adapter, G, people.w, people.labels, c, deterministic=True)["image"] for c in (codes, None)
        )
    assert float((personal - photo).square().mean()) < 0.8 * float((plain - photo).square().mean())


def test_what_teaches_is_learnt_without_a_rendering(G, adapter) -> None:
    people = sitters(G, 4)
    taught = supervise(adapter, people.rows(torch.arange(3)), 8, lr=0.05, batch_size=3, **QUIET)
    net, drawn = network(G), []

    def watched(*arguments, **options):
        drawn.append(len(arguments[2]))
        return render(*arguments, **options)

    plan = Plan(2, 2, 1e-3, distilled=80, distilled_lr=3e-3, average=0.9, turned=0.0)
    history = train(net, adapter, people, taught, plan=plan, draw=watched, **QUIET)
    assert drawn == [2, 2], "only the last two steps draw anything"
    assert history[0][1]["pictures"] == 0 and history[-1][1]["pictures"] > 0
    # in units of the codes' own mean square: 1 would be to predict that nobody changes
    assert history[7][1]["codes"] < 0.5 < history[0][1]["codes"]
    with pytest.raises(ConvloraError, match="distilled=80 steps learn from adapters that teach, and supervision is"):
        train(net, adapter, people, None, plan=plan, **QUIET)


@pytest.mark.parametrize("turned", [True, False])
def test_killed_and_resumed_it_ends_the_same(G, adapter, tmp_path, monkeypatch, turned) -> None:
    people = sitters(G, turned=turned)
    plan = Plan(24, 2, 1e-3)
    how = dict(plan=plan, identity=identity, **QUIET)
    whole = network(G)
    history = train(whole, adapter, people, None, **how)

    class Killed(Exception):
        pass

    def die(net, step) -> None:
        if step == 13:
            raise Killed

    checkpoint, partial = tmp_path / "train.ckpt", network(G)
    with pytest.raises(Killed):
        train(
            partial, adapter, people, None, checkpoint=checkpoint, checkpoint_seconds=0, look=die, look_every=1, **how
        )
    assert checkpoint.is_file() and not list(tmp_path.glob("*.tmp"))
    resumed = network(G)
    assert train(resumed, adapter, people, None, checkpoint=checkpoint, **how) == history
    assert all(torch.equal(value, state(whole)[key]) for key, value in resumed.state_dict().items())
    with pytest.raises(FileError, match=r"of a run with other settings \(lr\); remove it"):
        train(network(G), adapter, people, None, checkpoint=checkpoint, **{**how, "plan": replace(plan, lr=1e-4)})
    checkpoint.write_bytes(b"no checkpoint")
    with pytest.raises(FileError, match="is no readable checkpoint"):
        train(network(G), adapter, people, None, checkpoint=checkpoint, **how)


def test_a_loss_that_is_not_finite_stops_and_puts_the_last_good_weights_back(G, adapter) -> None:
    people = sitters(G)
    net, fine = network(G), network(G)
    seen: list[int] = []

    def breaking(images: Tensor) -> Tensor:
        seen.append(len(images))
        scale = float("nan") if len(seen) > 2 * 13 else 1.0  # twice a step: from step 14 on
        return identity(images) * scale

    with pytest.raises(ConvloraError) as error:
        train(net, adapter, people, None, plan=Plan(30, 4, 1e-3), identity=breaking, **QUIET)
    text = str(error.value)
    assert "hypernetwork on photo_0" in text and "diverged at step 14 of 30 (lr=0.001)" in text
    assert "the network has its weights of step 10 back" in text

    def stop(_: HyperNetwork, step: int) -> None:
        if step == 10:
            raise StopIteration

    with pytest.raises(StopIteration):
        train(fine, adapter, people, None, plan=Plan(30, 4, 1e-3), identity=identity, look=stop, look_every=10, **QUIET)
    assert all(bool(value.isfinite().all()) for value in net.state_dict().values())
    assert all(torch.equal(value, state(fine)[key]) for key, value in net.state_dict().items())


def test_photographs_are_turned_only_with_someone_to_recognise(G, adapter) -> None:
    people = sitters(G, turned=False)
    with pytest.raises(ConvloraError, match="turned=1 without an identity encoder leaves nothing"):
        train(network(G), adapter, people, None, plan=replace(PLAN, turned=1.0), **QUIET)
    history = train(network(G), adapter, people, None, plan=replace(PLAN, turned=1.0), identity=identity, **QUIET)
    assert history[-1][1]["pictures"] == 0 and history[-1][1]["identity"] > 0
    with pytest.raises(ConvloraError, match="steps=0 and batch_size=2 must be at least 1"):
        train(network(G), adapter, people, None, plan=replace(PLAN, steps=0), **QUIET)


def test_padded_pixels_teach_nothing(G, adapter) -> None:
    photos = tiny_photos(2)
    masks = torch.ones(2, 1, 128, 128)
    masks[..., :40] = 0
    w = torch.randn(2, 8, generator=torch.Generator().manual_seed(2))
    painted = photos.images.clone()
    painted[..., :40] = 1.0
    found, nets = [], []
    for images in (photos.images, painted):
        people = make_examples(G, Photos(images, photos.labels, photos.names, masks), w)
        found.append(supervise(adapter, people, 3, batch_size=2, **QUIET).codes.left)
        nets.append(network(G))
        train(nets[-1], adapter, people, None, plan=Plan(2, 2, 1e-3, turned=0.0), **QUIET)
    assert torch.equal(*found)
    assert all(torch.equal(value, state(nets[1])[key]) for key, value in nets[0].state_dict().items())


def test_stylegan2_is_taught_without_cameras() -> None:
    torch.manual_seed(0)
    G = stylegan2.Generator(8, 0, 8, 16, 3, synthesis_kwargs={"channel_base": 64, "channel_max": 8}).eval()
    G.requires_grad_(False)
    net = HyperNetwork.for_generator(G, targets=("synthesis.*",), **{**SMALL, "side": 16, "patch": 8})
    photos = Photos(torch.rand(3, 3, 16, 16) * 2 - 1, torch.zeros(3, 25), ["a", "b", "c"])
    people = make_examples(G, photos, torch.randn(3, 8), draw=render_stylegan2)
    adapter = net.inject(G)
    how = dict(draw=render_stylegan2, **QUIET)
    taught = supervise(adapter, people, 10, lr=0.05, batch_size=3, **how)
    assert bool((taught.loss[:, 1] < taught.loss[:, 0]).all())
    history = train(net, adapter, people, taught, plan=Plan(40, 3, 3e-3, code_weight=0.0), **how)
    assert history[-1][1]["pictures"] < history[0][1]["pictures"]
