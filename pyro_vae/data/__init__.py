"""Data sets of images and of graphs, and maps between gray levels, bits and real numbers."""

from pyro_vae.data.files import data_root
from pyro_vae.data.graphs import GRAPHS, Graph, LinkSplit, graph_of, load_graph, make_graph, split_links
from pyro_vae.data.sets import NAMES, AnyDataSet, DataSet, GraphData, load, load_links
from pyro_vae.data.sprites import Sprites, sprites
from pyro_vae.data.transforms import binarise, dequantise, subset_after_shuffle

__all__ = [
    "GRAPHS",
    "NAMES",
    "AnyDataSet",
    "DataSet",
    "Graph",
    "GraphData",
    "LinkSplit",
    "Sprites",
    "binarise",
    "data_root",
    "dequantise",
    "graph_of",
    "load",
    "load_graph",
    "load_links",
    "make_graph",
    "split_links",
    "sprites",
    "subset_after_shuffle",
]
