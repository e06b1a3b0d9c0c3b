"""The site builds without a warning, with what it generates."""

import os
import re
import subprocess
import sys

import pytest
from site_pages import GENERATED, ROOT

pytest.importorskip("mkdocs", reason='mkdocs is not installed: pip install -e ".[docs]"')


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={folder}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_built(site):
    for page in [*(ROOT / "docs").rglob("*.md"), *GENERATED]:
        place = page.relative_to(ROOT / "docs").with_suffix("")
        folder = place.parent if place.name == "index" else place
        assert (site / folder / "index.html").is_file(), page


def test_reports_are_part_of_the_site(site):
    assert (site / "results/example_report.html").is_file()
    assert (site / "results/reports/equal_cache/report/index.html").is_file()


def test_generated_pages_say_what_the_program_says(site):
    configuration = (site / "reference/configuration/index.html").read_text(encoding="utf-8")
    assert "model.rotary_values" in configuration
    commands = (site / "reference/commands/index.html").read_text(encoding="utf-8")
    assert "--stall_seconds" in commands
    python = (site / "reference/python/index.html").read_text(encoding="utf-8")
    assert "Restores a trained model" in python


def test_links_of_the_repository_become_links_of_the_site(site):
    """LOG.md, RESULTS.md and the recipes have pages; a file without one is named by its path."""
    home = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="results/"' in home
    study = (site / "tutorials/first_study/index.html").read_text(encoding="utf-8")
    assert re.search(r'href="\.\./\.\./reference/recipes/"[^>]*>configs/quickstart\.py', study)


def test_nothing_is_loaded_from_elsewhere(site):
    home = (site / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'<(?:script|link)[^>]*(?:src|href)="(?:https?:)?//[^"]*fonts', home) == []
