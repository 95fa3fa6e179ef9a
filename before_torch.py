"""Imported first by the files that are run: how torch's threads wait, and that nothing hides our packages."""
import os
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent

# Threads that wait for each other give up their cores after some microseconds: beside other work a step takes half as
# long as with threads that wait busily, and alone at most a tenth longer (results/speed.md). torch reads this when it
# is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# Hugging Face has a package called datasets, and nearly everybody a file called utils.py.
for name in ("datasets", "net", "utils"):
    module = sys.modules.get(name)
    spec = module.__spec__ if module else find_spec(name)
    found = Path(spec.origin).resolve() if spec and spec.origin else None
    if found != ROOT / name / "__init__.py":
        line = (f"{found or name} is imported in place of {ROOT / name}: rename it, or put {ROOT} first on Python's "
                "path (sys.path, PYTHONPATH)")
        script = Path(getattr(sys.modules["__main__"], "__file__", None) or ".").resolve()
        if ROOT in script.parents and script.parent.name != "tests":
            print(f"{script.name}: {line}", file=sys.stderr)
            sys.exit(2)
        raise ImportError(line)
