"""What the pages promise about the tree: their links lead somewhere, the files they name are there, the front page stays short."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / name for name in subprocess.check_output(["git", "ls-files", "*.md"], cwd=ROOT, text=True).split()
]
#: Past versions are described with the names they had.
PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names GitHub gives the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_named_in_the_text_are_there(page: Path) -> None:
    named = re.findall(
        r"`((?:kernels|workers|pipeline|jobs|infra|tests|docs|benchmarks)/[\w./-]+\.\w+)`", page.read_text()
    )
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


def test_the_front_page_fits_a_hundred_and_twenty_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_help_names_every_target_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert targets
    said = subprocess.check_output(["make", "--no-print-directory", "help"], cwd=ROOT, text=True)
    assert [t for t in targets[1].split() if t != "help" and f"make {t}" not in said] == []


def test_the_ratio_of_int8_products_is_that_of_its_result() -> None:
    result = json.loads((ROOT / "benchmarks/kernels/cpu-products.json").read_text())
    assert result["same_bits"] is True
    ratio, cpu = result["cpu"]["int8_over_float32"], result["cpu"]["ms_per_image"]
    lines = (ROOT / "docs/measured.md").read_text().splitlines()
    (row,) = (line for line in lines if "benchmarks/kernels/cpu-products.json" in line)
    assert f"**{ratio['median']:.1f}x** ({ratio['least']:.1f} to {ratio['most']:.1f})" in row
    assert f"{cpu['int8']['median']:.1f} to {cpu['float32']['median']:.1f} ms" in row
