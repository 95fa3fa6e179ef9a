"""README.md and docs/: every command is understood, every link leads somewhere, every flag has a line, snippets run."""
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import start
from tests.conftest import CONV, write_yaml
from tools.plot import KINDS
from tools.sweep import read_grid
from utils.config import read_settings
from utils.config_files import HYPER_OPTIONAL, RANGES, load_yaml, read_dataset
from utils.search import read_search

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language=None):
    """The code blocks of a page, of one language if asked for."""
    found = [block.partition("\n") for block in page.read_text(encoding="utf-8").split("```")[1::2]]
    return [content for name, _, content in found if language is None or name == language]


def commands(page):
    text = "\n".join(blocks(page)).replace("\\\n", " ").replace("$seed", "0")
    for name, value in re.findall(r'^(\w+)="(.*)"$', text, re.M):
        text = text.replace(f"${name}", value)
    return [line.strip() for line in text.splitlines() if line.strip().startswith(("python ", "make "))]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_commands_are_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    targets = (ROOT / "Makefile").read_text()
    for line in commands(page):
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            assert all(f"\n{target}:" in targets for target in words[1:])
        elif words[1] == "hpo.py":
            assert "…" in words or read_search("hpo.py", words[2:])
        elif words[1] == "tools/sweep.py":
            assert "…" in words or read_grid(words[2:])
        elif words[1].startswith("tools/"):
            assert (ROOT / words[1]).exists()
        else:
            # What hpo.py writes is not there before it ran.
            words = [word.replace("my_digits.yaml", "small.yaml") for word in words]
            method = words[1].removesuffix(".py")
            assert read_settings(words[1], method, words[2:]).method == method


def test_there_are_commands():
    assert len([line for page in PAGES for line in commands(page)]) >= 15


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            anchors = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
                       for h in re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)] if anchor else []
            assert not anchor or anchor in anchors, link


def test_every_flag_has_its_line_and_every_line_its_flag():
    """A line that names no script is of all three; those of hpo.py alone are in search.md."""
    scripts = ["modelzoo.py", "multihead.py", "hpo.py"]
    listed, here = {script: set() for script in scripts}, scripts
    for page in ("flags.md", "search.md"):
        for line in (ROOT / "docs" / page).read_text().splitlines():
            if line.startswith("| `--"):
                flag, meaning = line.split("|")[1:3]
                marked = re.match(r" \((from here on )?(`\w+\.py`(, `\w+\.py`)*)\)", meaning)
                of = re.findall(r"\w+\.py", marked[2]) if marked else here
                here = of if marked and marked[1] else here
                for script in of:
                    listed[script] |= set(re.findall(r"--\w+", flag))
        here = ["hpo.py"]
    for script in scripts:
        done = subprocess.run([sys.executable, script, "-h"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert listed[script] == set(re.findall(r"--\w+", done.stdout)) - {"--help"}, script


def test_the_readme_is_read_in_five_minutes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1250


@pytest.mark.parametrize("page, count", [("README.md", 2), ("docs/data.md", 3)])
def test_dataset_files_are_read(page, count, tmp_path):
    files = blocks(ROOT / page, "yaml")
    assert len(files) == count
    for i, text in enumerate(files):
        (tmp_path / f"{i}.yaml").write_text(text)
        assert len(read_dataset(tmp_path / f"{i}.yaml")["tasks"]) == 2


@pytest.mark.parametrize("page", ["networks.md", "training.md"])
def test_hyperparameter_files_train(page, workspace):
    """As they stand there, for two epochs, on small images; `weights` is a learner of the file before."""
    for i, text in enumerate(blocks(ROOT / "docs" / page, "yaml")):
        if "mine.pt" in text:
            write_yaml(workspace / "hp.yaml", CONV)
            start(workspace, "my-zoo", "--continual", "--num_rounds", "2", "--save_nets")
            shutil.copy(workspace / "runs/my-zoo/learners/001.pt", workspace / "data/mine.pt")
        (workspace / "hp.yaml").write_text(text)
        start(workspace, f"a{i}", "--continual", "--num_rounds", "2", "--epochs", "2", "--val_frac", "0.2")
    table = (ROOT / "docs/training.md").read_text()
    keys = {*RANGES, *HYPER_OPTIONAL, "epochs", "schedule", "augment"}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == keys - {"weights", "freeze"}


def test_grid_of_the_sweep_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (text,) = blocks(ROOT / "docs/search.md", "yaml")
    (tmp_path / "grid.yaml").write_text(text)
    runs, _ = read_grid(["--grid", str(tmp_path / "grid.yaml")])
    assert len(runs) == 15 and load_yaml(tmp_path / "grid.yaml")["flags"] == "--samples 20"


def test_every_kind_of_figure_has_its_line():
    table = (ROOT / "docs/report.md").read_text().partition("**The figures**")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == {*KINDS, "schematic"}


def test_the_snippets_run(tmp_path):
    """The README's commands and its snippet, as they stand there, but for one epoch; then the one of the report."""
    for line in commands(ROOT / "README.md")[2:4]:
        words = [sys.executable, *shlex.split(line)[1:], "--epochs", "1", "--out", str(tmp_path / "runs")]
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)

    def show(page):
        (snippet,) = blocks(ROOT / page, "python")
        done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{snippet}"],
                              cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shares = [float(line.split()[1]) for line in show("README.md").splitlines() if re.match(r"\d +\d", line)]
    assert len(shares) == 10 and sum(shares) / 10 > 0.3
    assert re.search(r"Isolated +0\.\d+ +NaN\nModel Zoo +0\.\d+ +NaN", show("docs/report.md"))
