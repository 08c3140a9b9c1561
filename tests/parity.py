"""The table of what is compared with a reference, read from the tests' own marks: `@pytest.mark.parity(task, reference)` on a test of tests/test_family_*.py.

    python tests/parity.py        writes it into docs/checkpoints.md
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "checkpoints.md"
BEGIN, END = "<!-- parity: made by `python tests/parity.py`, checked by tests/test_parity_table.py -->\n", "<!-- end -->"
TASKS = ("encoders", "txt2img", "img2img", "inpaint", "edit")
NOTE = """Each line is a test on tiny random checkpoints of the same architecture, made on the spot with lively conditioning weights: the same components and latents on both
sides, latents within 1e-4 of their largest value (most within 1e-5), pictures within 1 of 255, at two sizes, with batches of two, guidance on and off. "hand loop" is a
short loop with diffusers' scheduler where no stock pipeline exists; outpaint is inpaint on a wider canvas. A single file in its makers' layout gives its folder's
picture bit for bit (tests/test_single_file.py). Stable Diffusion 1.5 was also run at full size with random weights (512x512, 3 steps): float32 latents within 5.3e-6 of
diffusers'. The published weights themselves (gated or not) were not available and not run; their layouts were checked tensor by tensor against headers made from the
published configs.
"""


def marks() -> dict[str, dict[str, list[str]]]:
    """Family -> task -> references, in the order of the tests."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(TESTS.glob("test_family_*.py")):
        family = path.stem.removeprefix("test_family_")
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.parity":
                    task, *references = (ast.literal_eval(a) for a in mark.args)
                    found[family][task] += [r for r in references if r not in found[family][task]]
    return found


def table() -> str:
    """The table as Markdown."""
    rows = [f"| family | {' | '.join(TASKS)} |", "|---" * (len(TASKS) + 1) + "|"]
    for family, by_task in marks().items():
        assert set(by_task) <= set(TASKS), f"{family} marks an unknown task: {set(by_task) - set(TASKS)}"
        rows.append(f"| `{family}` | " + " | ".join(", ".join(by_task[task]) or "-" for task in TASKS) + " |")
    return NOTE + "\n" + "\n".join(rows) + "\n"


def page() -> str:
    """docs/checkpoints.md with the table of now."""
    text = PAGE.read_text("utf-8")
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
