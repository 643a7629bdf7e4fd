"""Measure every family of diffusion models and write docs/reference/families.md.

`python tools/families.py [NAME ...]` builds a tiny random pipeline of each family's real classes and compares its
adapter with that pipeline; the tests of tests/diffusion/test_families.py assert the same numbers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import diffusers
import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "diffusion")]

from family_pipelines.builders import FAMILIES, save_family  # noqa: E402
from family_pipelines.oracle import Measured, measure  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "families.md"
BEGIN, END = "<!-- measured -->\n", "<!-- end -->\n"
COLUMNS = (
    "family", "shows", "adapter", "replay", "decoded", "gather", "ratio", "in bf16", "LoRA reloaded", "two iterations",
    "resumed",
)  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"


def row(name: str, found: Measured) -> str:
    """A line of the table."""
    family = FAMILIES[name]
    cells = [
        name, "films" if family.film else "pictures", family.adapter, f"{found.replay:.0e}",
        f"{found.pictures:.0e}", f"{found.gather:.0e}", f"{found.ratio:.0e}" if found.ratio else "0",
        f"{found.half_ratio:.0e}" if found.half_ratio else "0",
        f"{found.lora.error:.0e} of {found.lora.effect:.2f}", f"gradient {found.grad_norm:.2g}",
        "bit for bit" if found.resumed else "DIFFERS",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def main(names: list[str]) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    diffusers.logging.set_verbosity_error()
    rows = []
    for name in names or list(FAMILIES):
        with tempfile.TemporaryDirectory() as work:
            folder = save_family(name, Path(work) / "pipeline")
            rows.append(row(name, measure(name, folder, Path(work))))
        print(rows[-1], end="", flush=True)
    if names:
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{HEAD}{''.join(rows)}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main(sys.argv[1:])
