"""Data sets with pixels in [0, 1], and the maps between gray levels, bits and a continuum."""

from pyro_vae.data.files import data_root
from pyro_vae.data.sets import NAMES, DataSet, load
from pyro_vae.data.sprites import Sprites, sprites
from pyro_vae.data.transforms import binarise, dequantise, subset_after_shuffle

__all__ = [
    "NAMES",
    "DataSet",
    "Sprites",
    "binarise",
    "data_root",
    "dequantise",
    "load",
    "sprites",
    "subset_after_shuffle",
]
