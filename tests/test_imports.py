"""Who may import whom, and what a run does not import."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("datasets", "net", "utils", "tools")
# A floor uses the floors below it and nothing above: see docs, CONTRIBUTING.md and the map in it.
ALLOWED = {
    "datasets": {"datasets"},
    "net": {"net"},
    "utils": {"utils", "datasets", "net"},
    "multihead": {"datasets", "net", "utils"},
    "modelzoo": {"multihead", "datasets", "net", "utils"},
    "hpo": {"multihead", "modelzoo", "datasets", "net", "utils"},
    "tools": {"tools", "hpo", "multihead", "modelzoo", "datasets", "net", "utils"},
}
FILES = [f for f in ROOT.rglob("*.py") if f.relative_to(ROOT).parts[0] in (*PACKAGES, *(f"{m}.py" for m in ALLOWED))]


def imported(file):
    """Every module that a file names in an import, also inside functions: utils.log, numpy, ..."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def module_of(file):
    """utils.log of utils/log.py."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_import_rules(file):
    ours = {name.split(".")[0] for name in imported(file)} & {*PACKAGES, *ALLOWED}
    assert ours <= ALLOWED[module_of(file).split(".")[0]]


def find_circle(uses):
    """The modules that lead back to themselves, of a dict module -> set of the modules that it uses."""
    uses = dict(uses)
    while ready := [module for module, used in uses.items() if not used & uses.keys()]:
        for module in ready:  # they use nothing that is left
            del uses[module]
    return sorted(uses)


def test_no_file_leads_back_to_itself():
    """Within a floor, too: whoever follows the imports goes down and never comes round."""
    ours = {module_of(file): file for file in FILES}
    uses = {}
    for module, file in ours.items():
        names = {name for full in imported(file) for name in (full, full.rpartition(".")[0])}
        uses[module] = names & ours.keys()
    assert "utils.run_net" in uses["multihead"] and "multihead" in uses["modelzoo"]
    assert find_circle(uses) == []
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_every_folder_is_a_package():
    """So that an installed package called datasets cannot win the import."""
    assert all((ROOT / name / "__init__.py").exists() for name in PACKAGES)
    assert {f.relative_to(ROOT).parts[0] for f in FILES} >= {"datasets", "net", "utils", "multihead.py", "modelzoo.py"}


def test_a_run_imports_nothing_that_is_slow_to_import(tmp_path):
    """Each of these takes a second or more, and a newcomer waits for the first batch of the demo."""
    words = ["--data_config", "config/dataset/split_digits.yaml", "--hp_config", "config/hyperparam/small.yaml",
             "--samples", "1", "--epochs", "1", "--out", str(tmp_path)]
    slow = {"torch._dynamo", "sklearn", "scipy", "pandas", "matplotlib", "torchvision", "ray"}
    code = (f"import sys; from multihead import run; from utils.command import command;"
            f"status = command('', 'multihead', run, {words});"
            f"sys.exit(' '.join({slow} & set(sys.modules)) or status)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
