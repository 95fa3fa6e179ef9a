"""Who may import whom, and what a run does not import."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("datasets", "net", "utils", "tools")
ALLOWED = {
    "datasets": {"datasets"},
    "net": {"net"},
    "utils": {"utils"},
    "multihead": {"datasets", "net", "utils"},
    "modelzoo": {"multihead", "datasets", "net", "utils"},
    "hpo": {"multihead", "modelzoo", "datasets", "net", "utils"},
}
FILES = [f for f in ROOT.rglob("*.py") if f.relative_to(ROOT).parts[0] in (*PACKAGES, *(f"{m}.py" for m in ALLOWED))]


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_import_rules(file):
    ours = {name for name in imported(file) if name in (*PACKAGES, *ALLOWED)}
    part = file.relative_to(ROOT).parts[0].removesuffix(".py")
    if part == "tools":
        return  # tools may use anything of ours; nothing uses them
    assert ours <= ALLOWED[part]


def test_every_folder_is_a_package():
    """So that an installed package called datasets cannot win the import."""
    assert all((ROOT / name / "__init__.py").exists() for name in PACKAGES)
    assert {f.relative_to(ROOT).parts[0] for f in FILES} >= {"datasets", "net", "utils", "multihead.py", "modelzoo.py"}


def test_a_run_imports_nothing_that_is_slow_to_import(tmp_path):
    """Each of these takes a second or more, and a newcomer waits for the first batch of the demo."""
    words = ["--data_config", "config/dataset/split_digits.yaml", "--hp_config", "config/hyperparam/small.yaml",
             "--samples", "1", "--epochs", "1", "--out", str(tmp_path)]  # fmt: skip
    slow = {"torch._dynamo", "sklearn", "scipy", "pandas", "matplotlib", "torchvision", "ray"}
    code = (f"import sys; from multihead import command, run; status = command('', 'multihead', run, {words});"
            f"sys.exit(' '.join({slow} & set(sys.modules)) or status)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
