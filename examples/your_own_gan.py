"""Adapt any convolutional generator: a DCGAN learns one target colour through a rank-1 adapter of a few kilobytes.

python examples/your_own_gan.py
"""

import torch
from torch import nn

import convlora

torch.manual_seed(0)


def dcgan(z=16, width=32):
    """A generator as in the DCGAN paper, small: z (N, z, 1, 1) to images (N, 3, 32, 32)."""
    layers = [nn.ConvTranspose2d(z, 4 * width, 4), nn.BatchNorm2d(4 * width), nn.ReLU()]
    for i, o in ((4 * width, 2 * width), (2 * width, width)):
        layers += [nn.ConvTranspose2d(i, o, 4, 2, 1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh()).eval()


model = dcgan()
base = {key: value.clone() for key, value in model.state_dict().items()}
z = torch.randn(8, 16, 1, 1)
before = model(z)

# 1. What could be adapted? Nothing is changed yet.
for layer in convlora.adaptable(model):
    print("  ", layer)

# 2. Put an adapter on. Everything else is frozen, and the output is still the same, bit for bit.
adapter = convlora.inject_lora(model, rank=1)
assert torch.equal(model(z), before)
print(adapter)

# 3. Train it like any other module: here, towards a warm orange.
target = torch.tensor([0.9, 0.2, -0.6]).view(1, 3, 1, 1)
optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
for step in range(101):
    loss = (model(z) - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 25 == 0:
        print(f"   step {step:3d}  loss {loss.item():.3f}")

# 4. Save it, and load it onto a fresh copy of the base.
path = adapter.save("orange.safetensors")
fresh = dcgan()
fresh.load_state_dict(base)
convlora.load_adapter(fresh, path)
assert torch.equal(fresh(z), model(z))
print(f"{path}: {path.stat().st_size:,} bytes; the reloaded model gives the same images bit for bit")

# 5. Turn it off, turn it down, merge it, take it off again.
with adapter.disabled():
    assert torch.equal(model(z), before)
adapter.set_strength(0.5)
adapter.merge()  # now a plain model with its own keys
assert list(model.state_dict()) == list(base)
adapter.unmerge()
adapter.remove()
assert torch.equal(model(z), before)
print(adapter.name, "is off again and the model as it was")
