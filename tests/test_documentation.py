"""Checks of the documentation that a change of the code or of a file name can break."""

import re
from pathlib import Path

import pytest

from service.core.metrics import PREFIX, Metrics
from service.settings import Settings

REPOSITORY = Path(__file__).parent.parent
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("samples/*.md")])
SERVING = (REPOSITORY / "docs/serving.md").read_text()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_to_a_file_or_heading_of_the_repository_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_option_of_the_server_is_in_the_serving_guide_with_its_default(name: str) -> None:
    row = re.search(rf"^\| .*`--{name.replace('_', '-')}`.* \| (?P<default>.*) \| .* \|$", SERVING, flags=re.MULTILINE)
    assert row
    default = Settings.model_fields[name].default
    if isinstance(default, bool):
        assert row["default"] == ("on" if default else "off")
    elif isinstance(default, int | float):
        number, _, unit = row["default"].replace(",", "").partition(" ")
        assert float(number) * {"": 1, "MiB": 2**20}[unit] == default
    elif isinstance(default, str):
        assert row["default"] == default


def test_every_metric_of_the_server_is_in_the_serving_guide() -> None:
    missing = [
        metric.name
        for metric in Metrics().registry.collect()
        if not re.search(rf"`{metric.name.removeprefix(f'{PREFIX}_')}(_total)?[`{{]", SERVING)
    ]
    assert not missing


def test_the_readme_names_the_commands_that_run_the_demo_and_the_tests() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme
