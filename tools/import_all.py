"""Import every module of the package, for `make test-pythons`."""

import importlib
import pkgutil
import sys

ROOMS = [importlib.import_module(f"diffumask_fast{room}") for room in ("", ".kernels", ".export", ".bench")]
names = {module.name for room in ROOMS for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}.")}
for name in sorted(names):
    if not name.endswith(".__main__"):
        importlib.import_module(name)
print(f"Python {sys.version.split()[0]}: {len(names)} modules")
