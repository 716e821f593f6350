"""Facts about a pair and its data, established by a few runs before a number is computed from them."""

from pyro_vae.inspection.inspection import Inspection, inspect

__all__ = ["Inspection", "inspect"]
