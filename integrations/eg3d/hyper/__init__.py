"""HyperDreamBooth for generators: a network that predicts a person's adapter from one photo, and what follows.

`HyperDreamBooth: HyperNetworks for Fast Personalization of Text-to-Image Models` - https://arxiv.org/abs/2307.06949:
the adapters are LiDB's (`convlora.methods.lidb`), a network predicts their numbers from a photo (`network`), taught by
adapters that were found the slow way (`supervise`) and by what its predictions draw (`train`), and a few steps of
tuning at a higher rank finish a prediction (`instant`). What differs on a generator of faces is said in each file.
"""

from __future__ import annotations

from convlora.integrations.eg3d.hyper.codes import Codes, Layout, canonical, distance, layout_of
from convlora.integrations.eg3d.hyper.examples import Examples, make_examples
from convlora.integrations.eg3d.hyper.instant import Instant, instant
from convlora.integrations.eg3d.hyper.network import HyperNetwork
from convlora.integrations.eg3d.hyper.supervise import Supervision, supervise
from convlora.integrations.eg3d.hyper.train import Plan, train

__all__ = [
    "Codes", "Examples", "HyperNetwork", "Instant", "Layout", "Plan", "Supervision", "canonical", "distance", "instant",
    "layout_of", "make_examples", "supervise", "train",
]  # fmt: skip
