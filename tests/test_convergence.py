"""The figure of convergence: its denoiser is the exact one, its truth is exact, and its curves have the slopes that the samplers are known for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from latentgen.bench import convergence
from latentgen.cli import app
from latentgen.diffusion import RectifiedFlow
from latentgen.diffusion.level import Level
from latentgen.errors import OutputError, RequestError


@pytest.fixture(scope="module")
def curves() -> list[convergence.Curve]:
    return convergence.measure()


def test_the_denoiser_is_the_mean_of_what_may_have_been(curves: list[convergence.Curve]) -> None:
    """E[x0 | x] by adding up the whole plane on a fine grid."""
    level = Level(0.8, 0.6, 400.0)
    axis = torch.linspace(-4, 4, 801, dtype=torch.float64)
    plane = torch.cartesian_prod(axis, axis)
    means = torch.tensor(convergence.MEANS, dtype=torch.float64)
    prior = torch.exp(-torch.cdist(plane, means) ** 2 / (2 * convergence.SPREAD**2)).sum(1)
    x = torch.tensor([[0.3, -0.2], [1.0, 1.0], [-2.0, 0.1]], dtype=torch.float64)
    weights = prior * torch.exp(-torch.cdist(x, level.alpha * plane) ** 2 / (2 * level.sigma**2))
    expected = weights @ plane / weights.sum(1, keepdim=True)
    torch.testing.assert_close(convergence.mixture()(x, level), expected, atol=1e-9, rtol=0)


def test_the_truth_is_known_far_better_than_any_error_that_is_drawn(curves: list[convergence.Curve]) -> None:
    path, denoise, x = RectifiedFlow(), convergence.mixture(), convergence.starts()
    ends = [convergence._end("rk45", {}, steps, path, denoise, x) for steps in (640, 1280)]
    assert (ends[0] - ends[1]).abs().max() < 1e-11 < 1e-5 < min(error for curve in curves for error in curve.errors)


def test_the_slopes_are_those_of_the_methods(curves: list[convergence.Curve]) -> None:
    found = {curve.name: curve.order for curve in curves}
    assert [found[name] for name in ("euler", "heun", "dpm2", "dpmpp_2m")] == pytest.approx([1, 2, 2, 2], abs=0.1)
    assert all(found[name] > 2.1 for name in ("dpmpp_3m_sde", "lms", "deis", "unipc"))
    by_name = {curve.name: curve for curve in curves}
    assert by_name["heun"].evaluations == tuple(2 * n for n in convergence.STEPS) and by_name["dpmpp_2m"].evaluations == convergence.STEPS
    assert all(a > b for curve in curves for a, b in zip(curve.errors, curve.errors[1:], strict=False))


def test_a_path_makes_no_difference(curves: list[convergence.Curve]) -> None:
    """On levels of the same ratios the ODE is the same one: a first-order step does not see alpha."""
    flow, = convergence.measure({"euler": {}}, path=RectifiedFlow())
    assert flow.errors == pytest.approx(next(curve for curve in curves if curve.name == "euler").errors, rel=1e-3)


def test_what_has_no_exact_end_is_refused(tmp_path: Path, curves: list[convergence.Curve]) -> None:
    with pytest.raises(RequestError, match="draws noise"):
        convergence.measure({"euler_ancestral": {}}, steps=(4, 8))
    with pytest.raises(RequestError, match="two or more whole numbers"):
        convergence.measure(steps=(4,))
    with pytest.raises(RequestError, match="expected .png"):
        convergence.figure(curves, tmp_path / "a.jpg")
    with pytest.raises(OutputError, match="does not exist"):
        convergence.figure(curves, tmp_path / "no" / "a.png")


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "STEPS", (4, 8))
    monkeypatch.setattr(convergence.measure, "__kwdefaults__", {"steps": (4, 8), "path": None})
    done = CliRunner().invoke(app, ["convergence", "-o", str(tmp_path / "a.png"), "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == list(convergence.JUDGED) and all(math.isfinite(row["order"]) and row["table"] for row in rows)
    with Image.open(tmp_path / "a.png") as page:
        assert page.width > 1000 and len(page.convert("RGB").getcolors(2**20)) > 50
