"""Networks for conditionals."""

from pyro_vae.networks.convolutional import ConvDecoder, ConvEncoder, default_decoder, default_encoder
from pyro_vae.networks.graph import GraphConvolutions
from pyro_vae.networks.mlp import MLP, GatedMLP, flatten_inputs

__all__ = [
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "GatedMLP",
    "GraphConvolutions",
    "default_decoder",
    "default_encoder",
    "flatten_inputs",
]
