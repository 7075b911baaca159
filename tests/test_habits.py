"""What people do with adapters elsewhere works here: the habits of PEFT and of training loops."""

from __future__ import annotations

import copy
import gc
import os
import socket
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import convlora

X = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def make() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.Softplus(), nn.ConvTranspose2d(8, 6, 2), nn.Softplus(), nn.Conv2d(6, 4, 1)
    )


def test_a_summary_of_trainables_is_one_call_and_adds_up():
    net = make()
    base = sum(p.numel() for p in net.parameters())
    adapter = convlora.inject_lora(net, rank=2, ranks={"4": 1}, train=["4.bias"])
    lines = adapter.summary().splitlines()
    assert lines[0] == f"adapter 'default': lora, 3 layers, {adapter.num_trainable:,} trainable"
    rows = {line.split("  ")[0]: line.split() for line in lines[2:]}
    assert rows["0"][1:6] == ["8", "×", "36", "2", "88"] and rows["4"][4] == "1"
    assert "trained in full" in adapter.summary() and len(rows) == 4
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == adapter.num_trainable
    assert adapter.num_trainable == adapter.num_parameters + 4
    assert sum(p.numel() for p in net.parameters() if not p.requires_grad) == base, "the base is counted as before"


def test_the_adapters_own_state_is_the_models_filtered_by_name(randomize):
    """`{k: v for k, v in model.state_dict().items() if …}` is what people save where there is no handle."""
    net = make()
    adapter = convlora.inject_lora(net, rank=2, name="mine")
    other = convlora.inject_lora(net, rank=1, name="other")
    randomize(adapter), randomize(other)
    full = net.state_dict()
    mine = {key: value for key, value in full.items() if ".mine." in key}
    assert sorted(mine) == sorted(
        f"{layer}.convlora.weight.mine.{tensor}" for layer in "024" for tensor in ("A", "B", "scale")
    )
    own = adapter.state_dict()
    for key, value in mine.items():
        layer, tensor = key.split(".convlora.weight.mine.")
        assert torch.equal(value, own[f"{layer}/{tensor}"])
    twin = make()
    assert list(make().state_dict()) == [key for key in full if "convlora" not in key]
    handle = convlora.inject_lora(twin, rank=2, name="mine")
    loaded = twin.load_state_dict(mine, strict=False)
    assert not loaded.unexpected_keys and not any("mine" in key for key in loaded.missing_keys)
    assert all(torch.equal(value, own[key]) for key, value in handle.state_dict().items())


@pytest.mark.parametrize("path", ["weight", "low_rank"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, path, randomize):
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 3, padding=1)).double()
    adapter = convlora.inject(net, "lora", 2, dropout=0.3, path=path)
    randomize(adapter)
    x = X.double().requires_grad_()

    def gradients(forward):
        torch.manual_seed(7)  # dropout draws: recomputation must see the same
        return torch.autograd.grad(forward().square().sum(), [x, *adapter.parameters()])

    if not reentrant:  # torch.autograd.grad is not for reentrant checkpoints
        recomputed = gradients(lambda: checkpoint(net, x, use_reentrant=False))
    else:
        torch.manual_seed(7)
        checkpoint(net, x, use_reentrant=True).square().sum().backward()
        recomputed = [t.grad for t in (x, *adapter.parameters())]
    for a, b in zip(gradients(lambda: net(x)), recomputed, strict=True):
        assert torch.equal(a, b)


def test_checkpointed_segments_train_an_adapter_under_a_frozen_input():
    """The usual trap: with a frozen base nothing that enters a segment requires a gradient."""
    net = make().double()
    adapter = convlora.inject_lora(net, rank=1)
    checkpoint_sequential(net, 2, X.double(), use_reentrant=False).square().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["weight", "low_rank"])
def test_autocast_trains_float32_factors(path, base, randomize):
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)).to(base)
    adapter = convlora.inject_lora(net, rank=1, path=path)
    randomize(adapter)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4)
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(X.to(base))
        loss = y.float().square().mean()
    assert y.dtype == torch.bfloat16
    loss.backward()
    assert {p.dtype for p in adapter.parameters()} == {p.grad.dtype for p in adapter.parameters()} == {torch.float32}
    optimizer.step()
    for key, parameter in adapter.named_parameters():
        step = (parameter.detach() - before[key]).abs()
        assert (step > 0).float().mean() > 0.9, f"{key}: steps of 1e-4 are kept, not rounded away"


def test_functional_call_and_per_sample_gradients_reach_the_adapter(randomize):
    net = make().double()
    adapter = convlora.inject_lora(net, rank=1)
    randomize(adapter)
    trained = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    x = X.double()

    def loss(parameters, sample):
        return torch.func.functional_call(net, parameters, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, x)
    net(x).square().sum().backward()
    for name, parameter in net.named_parameters():
        if name in each:
            torch.testing.assert_close(each[name].sum(0), parameter.grad)


def test_an_average_of_the_adapter_alone_keeps_scale_strength_and_base(randomize):
    """Averages that leave a scale outside the state evaluate with the adapter off, silently."""
    net = make().double().eval()
    adapter = convlora.inject_lora(net, rank=2, alpha=8)
    ema = torch.optim.swa_utils.AveragedModel(net, avg_fn=lambda average, new, count: 0.75 * average + 0.25 * new)
    ema.update_parameters(net)  # the first one copies
    randomize(adapter)
    expected = {key: 0.25 * value for key, value in adapter.state_dict().items() if key.endswith("/B")}
    ema.update_parameters(net)
    averaged = convlora.Adapter.of(ema.module)
    assert all(torch.allclose(averaged.state_dict()[key], value) for key, value in expected.items())
    for key, value in adapter.state_dict().items():
        if key.endswith("/scale"):
            assert torch.equal(averaged.state_dict()[key], value) and value != 1
    off = averaged.state_dict()
    with averaged.disabled():
        y0 = ema(X.double())
    assert (ema(X.double()) - y0).abs().max() > 1e-3
    plain = make().double().eval()
    twin = convlora.inject_lora(plain, rank=2, alpha=8)
    twin.load_state_dict(off)
    torch.testing.assert_close(plain(X.double()), ema(X.double()), rtol=1e-12, atol=1e-12)


def test_averaging_parameters_by_hand_works_on_the_handles(randomize):
    """The loop of GAN code: zip(ema.parameters(), model.parameters())."""
    net, average = make(), make()
    a, b = convlora.inject_lora(net), convlora.inject_lora(average)
    randomize(a)
    with torch.no_grad():
        for mine, new in zip(b.parameters(), a.parameters(), strict=True):
            mine.lerp_(new, 1.0)
    assert torch.equal(net(X), average(X))


def test_optimizers_take_groups_by_name_and_resume():
    """LoRA+ learning rates (B faster than A), no decay on biases, and a checkpoint of both."""

    def trainer():
        net = make()
        adapter = convlora.inject_lora(net, rank=1, train=["4.bias"])
        kinds: dict[str, list] = {"A": [], "B": [], "train": []}
        for name, parameter in adapter.named_parameters():
            kinds["train" if name.startswith("train/") else name.rpartition("/")[2]].append(parameter)
        assert [len(group) for group in kinds.values()] == [3, 3, 1]
        optimizer = torch.optim.AdamW(
            [{"params": kinds["A"], "lr": 1e-3}, {"params": kinds["B"], "lr": 16e-3},
             {"params": kinds["train"], "lr": 1e-3, "weight_decay": 0.0}])  # fmt: skip
        return net, adapter, optimizer

    def step(net, optimizer):
        optimizer.zero_grad()
        (net(X) - 1).square().mean().backward()
        optimizer.step()

    net, adapter, optimizer = trainer()
    step(net, optimizer), step(net, optimizer)
    kept = {key: value.clone() for key, value in adapter.state_dict().items()}, copy.deepcopy(optimizer.state_dict())
    again, resumed, other = trainer()
    resumed.load_state_dict(kept[0]), other.load_state_dict(kept[1])
    step(net, optimizer), step(again, other)
    assert torch.equal(net(X), again(X))


def test_compiled_models_follow_training_and_strength_without_compiling_again(randomize):
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Softplus(), nn.ConvTranspose2d(8, 4, 2))
    adapter = convlora.inject_lora(net, rank=1)
    randomize(adapter)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for strength in (1.0, 0.5, 0.25):
        adapter.set_strength(strength)
        loss = compiled(X).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(compiled(X), net(X), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def _worker(rank: int, port: int, folder: str) -> None:
    """One of two ranks: three steps on its half of the batch."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    net = make()
    torch.manual_seed(100 + rank)  # A is random: both ranks start from rank 0's, which DDP broadcasts
    adapter = convlora.inject_lora(net, rank=1, train=["4.bias"])
    ddp = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        ddp(X[2 * rank : 2 * rank + 2]).square().mean().backward()
        optimizer.step()
    adapter.save(Path(folder) / f"{rank}.safetensors")
    del ddp, optimizer
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_of_ddp_train_one_adapter(tmp_path):
    """The same as one process on the whole batch, and the same on both ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_worker, args=(rank, port, str(tmp_path))) for rank in (0, 1)]
    for process in ranks:
        process.start()
    net = make()
    torch.manual_seed(100)
    adapter = convlora.inject_lora(net, rank=1, train=["4.bias"])
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()
    for process in ranks:
        process.join(120)
    zero, one = (tmp_path / f"{rank}.safetensors" for rank in (0, 1))
    assert zero.exists() and one.exists()
    loaded = [convlora.load_adapter(make(), path).state_dict() for path in (zero, one)]
    for key, value in adapter.state_dict().items():
        assert torch.equal(loaded[0][key], loaded[1][key])
        torch.testing.assert_close(loaded[0][key], value, rtol=1e-4, atol=1e-6)


def test_the_adapter_follows_the_model_to_another_device():
    net = make()
    adapter = convlora.inject_lora(net, train=["4.bias"])
    net.to("meta")
    assert {p.device.type for p in adapter.parameters()} == {"meta"}
    assert net(X.to("meta")).shape == (4, 4, 7, 7)


def test_zero_grad_train_eval_and_apply_are_the_models_own(randomize):
    net = make()
    adapter = convlora.inject_lora(net)
    randomize(adapter)
    assert net.train() is net and net.eval() is net and net.requires_grad_(False) is net
    net[0].requires_grad_(True)
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    assert "0.weight" in names, "whoever asks for the base's gradient gets it"
    net(X).sum().backward()
    assert net[0]._parameters["weight"].grad is not None
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())
