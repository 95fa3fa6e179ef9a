"""Who may import whom, and that nothing draws from torch's global generator."""
import ast
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
