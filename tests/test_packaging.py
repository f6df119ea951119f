import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import diffumask_fast
from diffumask_fast.export.session import PACKAGES

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
MAPPED = {"kernels", "export", "bench"}


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def packages_in_tree() -> set[str]:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "diffumask_fast").rglob("__init__.py")}
    names = {".".join(folder.parts) for folder in folders}
    return names | {f"diffumask_fast.{name}" for name in MAPPED if (ROOT / name / "__init__.py").exists()}


def test_every_package_of_the_tree_is_listed() -> None:
    assert set(SETUPTOOLS["packages"]) == packages_in_tree()


def test_every_folder_with_code_is_a_package() -> None:
    roots = [ROOT / "diffumask_fast", *(ROOT / name for name in MAPPED if (ROOT / name).exists())]
    folders = {path.parent for root in roots for path in root.rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_bare_names_are_not_ours() -> None:
    for name in sorted(MAPPED):
        spec = importlib.util.find_spec(name)
        assert spec is None or not Path(spec.origin or "").is_relative_to(ROOT), f"{name} is ours at top level"


def test_bare_names_are_banned_by_the_linter(tmp_path: Path) -> None:
    source = tmp_path / "x.py"
    source.write_text("import bench\nimport export.engine\nfrom kernels import attend\n", encoding="utf-8")
    options = [
        "--no-cache",
        "--select",
        "TID251",
        "--output-format",
        "concise",
        "--config",
        str(ROOT / "pyproject.toml"),
    ]
    command = [sys.executable, "-m", "ruff", "check", *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.count("TID251") == 3, done.stdout + done.stderr


def test_importing_the_package_is_quick() -> None:
    loaded = python("import sys, diffumask_fast; print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))")
    assert loaded == "[]"


def test_help_does_not_import_torch() -> None:
    code = "import sys, diffumask_fast.cli; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    assert python(code) == "[]"


def test_every_public_name_is_there() -> None:
    for name in diffumask_fast.__all__:
        assert getattr(diffumask_fast, name) is not None
        assert name in dir(diffumask_fast)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = diffumask_fast.nonsense


def test_one_version() -> None:
    assert diffumask_fast.__version__ == PROJECT["project"]["version"]
    assert importlib.metadata.version("diffumask-fast") == diffumask_fast.__version__


def test_constraints_pin_every_dependency_once() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("==")[0].lower().replace("_", "-") for line in lines if line and not line.startswith("#")]
    assert len(pins) == len(set(pins))
    wanted = [*PROJECT["project"]["dependencies"], *sum(PROJECT["project"]["optional-dependencies"].values(), [])]
    names = {requirement.split(";")[0].split(">")[0].split("[")[0].strip() for requirement in wanted}
    assert names <= set(pins)
    assert not [line for line in lines if "+" in line.partition("#")[0]], "a build suffix is for one index only"


def test_the_oldest_set_is_the_lower_bounds() -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(name): Version(pin) for name, _, pin in (line.partition("==") for line in lines) if pin}
    extras = PROJECT["project"]["optional-dependencies"]
    for one in map(Requirement, [*PROJECT["project"]["dependencies"], *extras["onnx"], *extras["learn"]]):
        (bound,) = (Version(part.version) for part in one.specifier if part.operator == ">=")
        pin = pins[canonicalize_name(one.name)]
        assert pin > bound if one.name == "torch" else pin == bound, one.name  # torch: see the file's head


def names_of(extra: str) -> set[str]:
    return {Requirement(line).name for line in PROJECT["project"]["optional-dependencies"][extra]}


def test_no_extra_brings_both_libraries_of_one_module() -> None:
    runtimes = {extra: names_of(extra) & set(PACKAGES) for extra in PROJECT["project"]["optional-dependencies"]}
    assert runtimes.pop("gpu") == {"onnxruntime-gpu"} and runtimes.pop("onnx") == {"onnxruntime"}
    assert not set().union(*runtimes.values())
    assert names_of("gpu") - names_of("onnx") == {"onnxruntime-gpu", "xformers"}


def test_the_tests_ask_for_an_interpreter_that_takes_any_numpy_admitted() -> None:
    core = {one.name: one for one in map(Requirement, PROJECT["project"]["dependencies"])}
    tested = {one.name: one for one in map(Requirement, PROJECT["project"]["optional-dependencies"]["test"])}
    assert "2.4.0" in core["numpy"].specifier and "3.6.0" in core["triton"].specifier  # as torch 2.11 pins it
    assert "3.6.0" not in tested["triton"].specifier and "3.7.0" in tested["triton"].specifier


@pytest.mark.slow
def test_wheel_holds_the_tree_and_runs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"diffumask_fast"}
    missing = [name for name in package_files() if name not in names]
    assert missing == []
    assert [name for name in names if fnmatch(name, "*/mini/weights/*.safetensors")] != []
    assert [name for name in names if fnmatch(name, "*/mini/assets/*.webp")] != []

    venv.create(tmp_path / "env", with_pip=False)
    fresh = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(fresh), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    # Everything but this project comes from the environment that runs the tests; its editable finder stays behind.
    shared = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    code = (
        f"import sys; sys.path += {shared.split(os.pathsep)!r}\n"
        "import diffumask_fast, diffumask_fast.kernels, diffumask_fast.bench.harness, diffumask_fast.mini as mini\n"
        "print(diffumask_fast.__file__, mini.folder())\n"
        "from diffumask_fast.kernels import native\nnative.library()\n"
        "from diffumask_fast.cli import main\nsys.argv = ['diffumask-fast', '--help']\nmain()"
    )
    done = subprocess.run([str(fresh), "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "env") in done.stdout.splitlines()[0]
    assert "generate" in done.stdout


def package_files() -> list[str]:
    """Return what the wheel must hold, as its names: every source and data file of the packages."""
    wanted = []
    for package in SETUPTOOLS["packages"]:
        folder = ROOT / SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))
        data = (pattern.replace("/**", "/**/*") for pattern in SETUPTOOLS["package-data"].get(package, []))
        files = {path for pattern in ("*.py", *data) for path in folder.glob(pattern) if path.is_file()}
        wanted += [f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}" for path in sorted(files)]
    return wanted
