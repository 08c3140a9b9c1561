"""Every notebook runs from top to bottom."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert sum("image/png" in o.get("data", {}) or "text/html" in o.get("data", {}) for o in outputs) >= 5


def test_live_previews_and_stops(pipe, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    from latentgen import notebook
    from latentgen.errors import RequestError

    shown = []
    monkeypatch.setattr(notebook._Screen, "show", lambda self, image: shown.append(image.size))
    result = notebook.live(pipe, "a cat", seed=1, steps=4, every=2, size=64)
    assert result is not None and shown == [(72, 97)] * 3
    assert result.image.tobytes() == pipe.txt2img("a cat", seed=1, steps=4).image.tobytes()

    def interrupt(self, image) -> None:  # noqa: ANN001
        raise KeyboardInterrupt

    monkeypatch.setattr(notebook._Screen, "show", interrupt)
    assert notebook.live(pipe, "a cat", seed=1) is None
    with pytest.raises(RequestError, match="every is 0"):
        notebook.live(pipe, "a cat", every=0)
