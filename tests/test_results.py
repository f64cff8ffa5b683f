"""What the pages say was measured: their tables are those of results/, and these are made by the settings beside them."""

import json
import runpy
import tomllib
from pathlib import Path

import pytest

from spikedistill.recipes import compare, distill
from spikedistill.recipes.comparing.outcome import settings_of
from spikedistill.recipes.comparing.rows import check

ROOT = Path(__file__).parent.parent
TOOL = runpy.run_path(str(ROOT / "tools" / "fill_tables.py"))
COMPARED = sorted((ROOT / "results").glob("*/compare.json"))


@pytest.mark.parametrize("page", TOOL["PAGES"], ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page):
    text = page.read_text()
    assert len(TOOL["PLACE"].findall(text)) >= 2
    assert TOOL["filled"](text) == text, "python tools/fill_tables.py"


def test_every_comparison_is_on_the_page():
    page = (ROOT / "docs" / "results.md").read_text()
    for file in COMPARED:
        assert f"<!-- {file.relative_to(ROOT)} -->" in page


@pytest.mark.parametrize("file", COMPARED, ids=lambda file: file.parent.name)
def test_a_comparison_is_that_of_its_settings(file, monkeypatch):
    """Rows, their settings and seeds; a stranger's command would be taken."""
    monkeypatch.chdir(ROOT)
    path = file.with_name("settings.toml")
    assert f"spikedistill compare --config {path.relative_to(ROOT)}" in path.read_text()
    settings = tomllib.loads(path.read_text())
    made = json.loads(file.read_text())
    config, mistakes = distill.read(settings | {"teacher": "none"}, compare.Config)
    assert not mistakes and config.seeds == made["seeds"] and not made["missing"]
    for row, line in zip(check(config)[0], made["rows"], strict=True):
        expected, told = settings_of(config, row), line["settings"]
        assert expected == told or ("tuned" in line and expected["methods"] == told["methods"]), row.name
    told = {key: value for key, value in config if key in made["settings"] and key not in ("teacher", "progress")}
    assert told == {key: made["settings"][key] for key in told}
    assert all(row["seeds"] == config.seeds for row in made["rows"])
