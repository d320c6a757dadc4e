"""The README against the program: its tables of the demo, its plan, its settings, its commands; the links of all pages.

``python -m tests.test_readme`` (``make readme``) writes what is printed anew.
"""

import re
import tempfile
from pathlib import Path

from click.testing import CliRunner

from proxy.cli import main
from proxy.config.settings import Settings

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
DEMO = re.compile(r"(?<=<!-- demo:begin \(make demo ONCE=1\) -->\n).*?(?=<!-- demo:end -->)", re.DOTALL)


PLAN = re.compile(r"(?<=<!-- plan:begin -->\n).*?(?=<!-- plan:end -->)", re.DOTALL)
RIG = """
host = {total = "64GiB", free = "56GiB"}
[[gpu]]
name = "RTX 5090"
free = "31500MiB"
[[gpu]]
name = "RTX 3090"
free = "23700MiB"
"""


def plan_block(folder: Path) -> str:
    """What ``lopsided plan`` prints for a 70B on a rig that is written down, and for two other quantizations of it.

    The model is asked for by its file here, which stands for the one that an Ollama has by its name.
    """
    profile = folder / "rig.toml"
    profile.write_text(RIG)
    model = ROOT / "proxy" / "simulator" / "models" / "llama3.3-70b-q4km.gguf"
    done = printed("plan", str(model), "--ctx", "8192", "--quant", "Q3_K_M,Q5_K_M", LOPSIDED_PROFILE=str(profile))
    kept = [line for line in done.splitlines() if "header only" not in line]
    return "```\n" + "\n".join(kept).strip().replace(model.name, "llama3.3:70b") + "\n```\n"


def printed(*arguments: str, **environment: str) -> str:
    """The output of ``lopsided`` where no other settings are set."""
    unset = {str(field.validation_alias): None for field in Settings.model_fields.values()}
    unset |= {"LOPSIDED_CONFIG": None, "LOPSIDED_STATE": "off", "COLUMNS": None}
    done = CliRunner(env={**unset, **environment}).invoke(main, list(arguments))
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    return str(done.stdout)


def demo_block() -> str:
    """What ``make demo ONCE=1`` prints where no settings are set, as a block of Markdown."""
    return f"```\n{printed('demo', '--once').strip()}\n```\n"


def test_the_table_is_what_the_demo_prints():
    assert DEMO.search(README.read_text())[0] == demo_block(), "run make readme"


def test_the_plan_is_what_the_command_prints(tmp_path):
    assert PLAN.search(README.read_text())[0] == plan_block(tmp_path), "run make readme"


def test_the_table_of_settings_names_exactly_the_settings():
    section = re.search(r"<!-- settings:begin -->(.*)<!-- settings:end -->", README.read_text(), re.DOTALL)[1]
    rows = re.findall(r"^\| `(\w+)` \|.*\| `(\w+)` \|$", section, re.MULTILINE)
    fields = {str(field.validation_alias): name for name, field in Settings.model_fields.items()}
    assert dict(rows) == fields | {"LOPSIDED_UPSTREAM": "upstream"}


def test_every_command_is_listed_and_no_other():
    listed = re.findall(r"^\| `lopsided (\w+)", README.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(main.commands)


def test_every_file_that_the_pages_point_to_exists():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_test_that_the_pages_name_exists():
    for page in PAGES:
        text = ""
        for file, name in re.findall(r"`((?:\w+/)*test_\w+\.py)?(?:::(test_\w+))?`", page.read_text()):
            if file:
                found = [folder / file for folder in (ROOT, ROOT / "tests", ROOT / "tests" / "proxy")]
                text = next(path.read_text() for path in found if path.is_file())
            assert not name or f"def {name}(" in text, f"{page.name}: {name}"


if __name__ == "__main__":
    text = DEMO.sub(lambda _: demo_block(), README.read_text())
    with tempfile.TemporaryDirectory() as folder:
        README.write_text(PLAN.sub(lambda _: plan_block(Path(folder)), text))
