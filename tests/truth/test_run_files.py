"""A damaged file of a run folder is named in one sentence by every reader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.report.markdown import write_report


def data() -> Tensor:
    return torch.randn(64, 4, generator=torch.Generator().manual_seed(1))


def run(folder: Path, epochs: int, *, resume: bool = False) -> None:
    pair = pv.models.VAE((4,), pv.StandardNormal(2), encoder=nn.Linear(4, 4), decoder=nn.Linear(2, 4))
    pv.fit(pair, data(), epochs=epochs, batch_size=32, progress=False, run_dir=folder, resume=resume, device="cpu")


DAMAGE = {
    ("metrics.jsonl", '{"epoch": 1, "los'): r"line 1 of .*metrics\.jsonl is damaged",
    ("metrics.jsonl", "3\n"): r"line 1 of .*metrics\.jsonl is damaged: it holds no JSON object",
    ("metrics.jsonl", '{"epoch": 1}\n'): r"line 1 of .*metrics\.jsonl is damaged.* it has no beta",
    ("metrics.jsonl", None): r"metrics\.jsonl does not exist",
    ("config.json", "{"): r"config\.json is damaged",
    ("config.json", "[]"): r"config\.json is damaged: it holds no JSON object",
    ("config.json", '{"fit": 3}'): r"config\.json is damaged.* it holds no settings of fit",
    ("config.json", "{}"): r"config\.json is damaged.* it holds no settings of fit",
    ("loss_terms.json", '{"Trace_ELBO": {"z": [1.0]}}'): r"loss_terms\.json is damaged",
    ("loss_terms.json", "{}"): r"loss_terms\.json is damaged",
    ("loss_terms.json", "nothing"): r"loss_terms\.json is damaged",
    ("scores.json", '{"accuracy": "high"}'): r"scores\.json is damaged",
    ("scores.json", '{"accuracy": null}'): r"scores\.json is damaged",
    ("collapse.json", "{}"): r"collapse\.json is damaged",
    ("log_likelihood.json", "{}"): r"log_likelihood\.json is damaged",
}


@pytest.mark.parametrize(("name", "text"), DAMAGE)
def test_the_report_names_a_damaged_file(name: str, text: str | None, tmp_path: Path) -> None:
    run(tmp_path, 1)
    write_report(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=DAMAGE[name, text]):
        write_report(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"fit": [1]}', '{"fit": {"seed": "none"}}'])
def test_a_run_with_a_damaged_configuration_is_not_resumed(text: str, tmp_path: Path) -> None:
    run(tmp_path, 1)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        run(tmp_path, 2, resume=True)
