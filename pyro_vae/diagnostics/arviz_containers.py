"""ArviZ's containers, before and after its version 1."""

from __future__ import annotations

import warnings
from typing import Any

__all__ = ["arviz", "elpd_data", "inference_data"]


def inference_data(groups: dict[str, Any]) -> Any:
    """Return data sets by group as the container of the installed ArviZ.

    Args:
        groups: ``xarray.Dataset`` by group.

    Returns:
        An ``arviz.InferenceData``; with ArviZ 1 an ``xarray.DataTree``.
    """
    installed = arviz()
    if _is_old(installed):
        return installed.InferenceData(**groups)
    import xarray

    return xarray.DataTree.from_dict(groups)


def elpd_data(elpd: float, terms: Any, fields: dict[str, Any]) -> Any:
    """Return the ``ELPDData`` of the installed ArviZ.

    Args:
        elpd: expected log predictive density, in nats.
        terms: its terms by datum, an ``xarray.DataArray``.
        fields: the other fields, by ArviZ's names.
    """
    if _is_old(arviz()):
        from arviz.stats.stats_utils import ELPDData

        # Its printed form reads the first three entries by position.
        se = fields.pop("se")
        return ELPDData({"elpd_loo": elpd, "se": se, "p_loo": 0.0, "loo_i": terms, **fields})
    from arviz_stats import utils

    if hasattr(utils, "ELPDDataLOO"):
        return utils.ELPDDataLOO(elpd=elpd, p=0.0, elpd_i=terms, **fields)
    return utils.ELPDData(kind="loo", elpd=elpd, p=0.0, elpd_i=terms, **fields)


def arviz() -> Any:
    """Import ArviZ without the announcement of its successor, which ArviZ 0.23 prints."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz as installed
    return installed


def _is_old(installed: Any) -> bool:
    # Not by the name InferenceData: in ArviZ 1 it is xarray's DataTree.
    return installed.__version__.startswith("0.")
