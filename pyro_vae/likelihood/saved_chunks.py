"""Finished chunks of an evaluation, saved in a run folder to resume an interrupted one."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from pyro_vae._version import __version__
from pyro_vae.inspection import Inspection
from pyro_vae.likelihood.weights import WeightSummary
from pyro_vae.runtime.files import checksum, read_tensors, write_tensors

__all__ = ["SavedChunks", "evaluation_key"]

# Version 2: each datum has its own seeds. The chunks of version 1 had one each, and other draws. Version 4: the
# proposal of each datum, and its number of draws.
FORMAT = "pyro_vae log-likelihood chunk, version 4"


def evaluation_key(inspection: Inspection, batch: tuple[Tensor, ...], settings: tuple[str | int, ...]) -> str:
    """Return a hash of everything that an evaluation's numbers depend on.

    Args:
        inspection: the pair, and the log-densities of its sites at seeded draws. These tell two programs with the same
            parameters apart.
        batch: all data and their conditions.
        settings: name of the proposal, K, seed and so on.
    """
    pair, terms = inspection.pair, inspection.trace.terms
    densities = [terms.log_lik, terms.log_prior, terms.log_guide]
    return checksum([FORMAT, __version__, type(pair).__qualname__, settings, pair.state_dict(), batch, densities])


class SavedChunks:
    """Chunks of one evaluation in ``run_dir/log_likelihood/KEY``; every evaluation has another key.

    Args:
        run_dir: the run folder.
        key: of the evaluation, from :func:`evaluation_key`.
        num_particles: K, which sets the shapes.
    """

    def __init__(self, run_dir: Path, key: str, num_particles: int) -> None:
        self.folder, self.key, self.num_particles = run_dir / "log_likelihood" / key[:16], key, num_particles

    def _path(self, rows: range) -> Path:
        return self.folder / f"{rows.start:08d}.safetensors"

    def read(self, rows: range) -> WeightSummary | None:
        """Return the saved statistics of these data, None without a file.

        Raises:
            ValueError: for a damaged file, or one of another evaluation.
        """
        path = self._path(rows)
        if not path.exists():
            return None
        mend = "delete it, and these data are evaluated again"
        try:
            fields, metadata = read_tensors(path)
        except ValueError as error:
            raise ValueError(f"{error}: {mend}") from error
        if metadata.get("format") != FORMAT or metadata.get("key") != self.key:
            raise ValueError(f"{path} was not written by this evaluation: {mend}")
        levels = self.num_particles.bit_length()
        shapes = {name: (levels, len(rows)) if "curve" in name else (len(rows),) for name in WeightSummary._fields}
        found = {name: tuple(tensor.shape) for name, tensor in fields.items()}
        if metadata.get("rows") != _named(rows) or found != shapes:
            raise ValueError(f"{path} holds other data than {_named(rows)}: {mend}")
        return WeightSummary(**fields)

    def write(self, rows: range, summary: WeightSummary) -> None:
        """Save the statistics of these data; the file is written whole or not at all."""
        tensors = {name: tensor.contiguous() for name, tensor in summary._asdict().items()}
        metadata = {"format": FORMAT, "key": self.key, "rows": _named(rows)}
        write_tensors(self._path(rows), tensors, metadata)


def _named(rows: range) -> str:
    return f"{rows.start} to {rows.stop - 1}"
