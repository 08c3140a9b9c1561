"""The speed table: JSON, a Markdown table and a plot of the same numbers. Knows what cases report; measures nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latentgen.bench.sides import OURS
from latentgen.errors import OutputError
from latentgen.pixels.save import whole_file

BEGIN, END = "<!-- table: latentgen bench -->", "<!-- end of table -->"


def written(found: Mapping[str, Any], path: Path) -> list[Path]:
    """Write the numbers as JSON, a plot beside them where matplotlib is there, and renew the table in a page of the same name (.md), if there is one.

    Cases that were measured before and not now stay as they are.

    Returns:
        What was written.

    Raises:
        OutputError: not a .json file, or a file there that is no such report.
    """
    if path.suffix != ".json":
        raise OutputError(f"the report is to go to {path.name}: expected a file that ends in .json")
    try:
        old = json.loads(path.read_text("utf-8"))["cases"] if path.is_file() else {}
    except (ValueError, KeyError, TypeError):
        raise OutputError(f"{path.name} is there and is no report of cases: name another file") from None
    whole = {"cases": {**old, **{name: {**case, "environment": found["environment"]} for name, case in found["cases"].items()}}}
    files = [path]
    _write(path, json.dumps(whole, indent=1) + "\n")
    if (page := path.with_suffix(".md")).is_file() and BEGIN in (text := page.read_text("utf-8")):
        head, _, rest = text.partition(BEGIN)
        _write(page, f"{head}{BEGIN}\n{table(whole)}{END}{rest.partition(END)[2]}")
        files.append(page)
    if _plot(whole, path.with_suffix(".png")):
        files.append(path.with_suffix(".png"))
    return files


def _write(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text.encode())


def table(whole: Mapping[str, Any]) -> str:
    """The report as a Markdown table."""
    lines = ["| work | side | a step | a call | against this engine |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for case in whole["cases"].values() for row in _rows(case)]
    return "\n".join(lines) + "\n"


def _rows(case: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    asked = case["asked"]
    about = case["about"] + (f", {asked['steps_reported']} steps" if "steps_reported" in asked else "")
    about += f" ({asked['steps_run']} run)" if asked["steps_run"] < asked.get("steps_reported", 0) else ""
    about += f", {asked['depth']:g} of its layers" if asked.get("depth", 1) != 1 else ""
    for side, said in case.get("seconds", {}).items():
        step, ratio = said.get("step"), case["ratios"].get(side)
        own, side = side == OURS, side + (f", {said['peak_mb']} MB at most" if "peak_mb" in said else "")
        yield (about if own else "", side, "" if step is None else f"{step:.2f} s", f"{said['call']:.2f} s",
               "" if ratio is None else f"{ratio:.2f} times as long")
    for side, said in case.get("loading", {}).items():
        ratios = case["ratios"]
        memory = f"{said.get('loaded_mb', 0)} MB loaded, {said.get('running_mb', 0)} MB at most"
        first = f", first picture after {said['picture']:.2f} s" if "picture" in said else ""
        picture = f", {ratios['picture']:.2f} times to the picture" if "picture" in ratios else ""
        longer = "" if side == OURS else f"{ratios.get('seconds', 0):.2f} times as long{picture}"
        yield about if side == OURS else "", side, "", f"{said.get('seconds', 0):.2f} s{first}; {memory}", longer
    for side in case.get("failed", ()):
        yield "", side, "", "out of memory", ""
    for n, said in enumerate(case.get("memory", ())):
        peak = "not measured" if said.get("measured_gb") is None else f"{said['measured_gb']:.2f} GB"
        made = said.get("failed") or f"{said['residency']}: {peak}, {said['predicted_gb']:.2f} predicted"
        yield "" if n else about, f"{said['model']} in {said['cap_gb']:g} GB", "", made, ""
    if "limit" in case:
        said = case["limit"]
        yield ("", f"{said['tflop']:g} TFLOP at {said['gflops_a_second']} GFLOP/s, this machine's fastest bf16 product", "",
               f"{said['seconds']:.2f} s", f"this engine takes {said['times_the_limit']:.2f} times that")


def _plot(whole: Mapping[str, Any], path: Path) -> bool:
    """Bars of the ratios, one group for each case; whether matplotlib is there to draw them."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    bars = [(f"{case['about']}: {side}", ratio) for case in whole["cases"].values() if "seconds" in case for side, ratio in case["ratios"].items()]
    figure = Figure(figsize=(8, 0.6 + 0.45 * max(1, len(bars))), layout="constrained")
    axes = figure.subplots()
    axes.barh([name for name, _ in bars], [ratio for _, ratio in bars], color="tab:blue")
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("time of a call, this engine = 1")
    for n, (_, ratio) in enumerate(bars):
        axes.text(ratio, n, f" {ratio:.2f}", va="center")
    figure.savefig(path, dpi=110)
    return True
