"""Push an adapter to the Hugging Face Hub and load it back by its name there.

python examples/share_an_adapter.py YOUR_NAME/orange-dcgan

The repository is private. Log in first (`hf auth login`), or pass --token. To try it without an account, start a Hub
of your own, `python tests/hub_server.py`, and add --endpoint http://127.0.0.1:8765 --token hf_me.
"""

import argparse

import torch
from torch import nn

import convlora
from convlora.hub import list_adapters

parser = argparse.ArgumentParser()
parser.add_argument("repo_id", help="user/name")
parser.add_argument("--token", help="a token with write access; by default that of `hf auth login`")
parser.add_argument("--endpoint", help="another Hub; by default huggingface.co")
options = parser.parse_args()
access = {"token": options.token, "endpoint": options.endpoint}

# What the card shows as the way to build the base; whoever loads the adapter runs the same.
LOAD_BASE = """import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(
    nn.ConvTranspose2d(16, 64, 4), nn.ReLU(),
    nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(),
    nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh(),
).eval()"""


def base() -> nn.Module:
    namespace = {}
    exec(LOAD_BASE, namespace)
    return namespace["model"]


def train(adapter: convlora.Adapter, colour: list[float], steps: int = 60) -> None:
    """Pull the generator's images towards one colour."""
    target, z = torch.tensor(colour).view(1, 3, 1, 1), torch.randn(8, 16, 1, 1)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.03)
    for _ in range(steps):
        loss = (adapter.model(z) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"trained {adapter.num_trainable:,} values; loss {loss.item():.3f}")


# 1. Train an adapter and push it: adapter, model card and nothing else, in one commit.
adapter = convlora.inject_lora(base(), rank=1)
train(adapter, [0.9, 0.2, -0.6])
card = {"license": "apache-2.0", "load_base": LOAD_BASE}
url = adapter.push_to_hub(options.repo_id, **card, **access)
print("pushed", url)
first = url.rpartition("/")[2]

# 2. Anybody who may read the repository loads it onto their own copy of the base.
model = base()
convlora.load_adapter(model, options.repo_id, **access)
z = torch.randn(4, 16, 1, 1)
orange = adapter.model(z)
assert torch.equal(model(z), orange)
print(options.repo_id, "gives the same images bit for bit")

# 3. A second version is a second commit; the first one stays, under its revision.
train(adapter, [-0.8, 0.1, 0.7])
print("pushed", adapter.push_to_hub(options.repo_id, commit_message="blue instead", **card, **access))
old = base()
convlora.load_adapter(old, options.repo_id, revision=first, **access)
assert torch.equal(old(z), orange) and not torch.equal(adapter.model(z), orange)
print("revision", first[:7], "is still the orange one")

# 4. What is there?
for info in list_adapters(author=options.repo_id.partition("/")[0], **access):
    print(f"  {info.id} ({'private' if info.private else 'public'}): {', '.join(info.tags[:4])}")
