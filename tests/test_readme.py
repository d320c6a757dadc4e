"""The README against the program: its table of the demo, its settings, its commands, its links.

``python -m tests.test_readme`` (``make readme``) writes the demo's table anew.
"""

import re
from pathlib import Path

from click.testing import CliRunner

from proxy.cli import main
from proxy.settings import Settings

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DEMO = re.compile(r"(?<=<!-- demo:begin \(make demo ONCE=1\) -->\n).*?(?=<!-- demo:end -->)", re.DOTALL)


def demo_block() -> str:
    """What ``make demo ONCE=1`` prints where no settings are set, as a block of Markdown."""
    unset = {str(field.validation_alias): None for field in Settings.model_fields.values()}
    done = CliRunner(env={**unset, "LOPSIDED_CONFIG": None, "COLUMNS": None}).invoke(main, ["demo", "--once"])
    assert done.exit_code == 0, done.output
    return f"```\n{done.stdout.strip()}\n```\n"


def test_the_table_is_what_the_demo_prints():
    assert DEMO.search(README.read_text())[0] == demo_block(), "run make readme"


def test_the_table_of_settings_names_exactly_the_settings():
    section = re.search(r"<!-- settings:begin -->(.*)<!-- settings:end -->", README.read_text(), re.DOTALL)[1]
    rows = re.findall(r"^\| `(\w+)` \|.*\| `(\w+)` \|$", section, re.MULTILINE)
    fields = {str(field.validation_alias): name for name, field in Settings.model_fields.items()}
    assert dict(rows) == fields | {"LOPSIDED_UPSTREAM": "upstream"}


def test_every_command_is_listed_and_no_other():
    listed = re.findall(r"^\| `lopsided (\w+)", README.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(main.commands)


def test_every_file_that_the_pages_point_to_exists():
    for page in (README, *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


if __name__ == "__main__":
    README.write_text(DEMO.sub(lambda _: demo_block(), README.read_text()))
