"""StyleGAN2 generators in plain PyTorch: the official key tree and numbers, no custom operators."""

from convlora.integrations.stylegan2.checkpoint import load_generator, save_generator
from convlora.integrations.stylegan2.configs import CONFIGS
from convlora.integrations.stylegan2.generator import Generator, MappingNetwork, SynthesisBlock, SynthesisNetwork
from convlora.integrations.stylegan2.layers import Conv2dLayer, FullyConnectedLayer, SynthesisLayer, ToRGBLayer
from convlora.integrations.stylegan2.ops import modulated_conv2d

__all__ = [
    "CONFIGS",
    "Conv2dLayer",
    "FullyConnectedLayer",
    "Generator",
    "MappingNetwork",
    "SynthesisBlock",
    "SynthesisLayer",
    "SynthesisNetwork",
    "ToRGBLayer",
    "load_generator",
    "modulated_conv2d",
    "save_generator",
]
