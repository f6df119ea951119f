import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import diffumask_fast
from diffumask_fast.export.session import PACKAGES

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
MAPPED = {"kernels", "export", "bench"}
RECORDS = "bench/results/"  # measured rows: of the repository, not of the program
EXTRA = re.compile(r"diffumask-fast\[([a-z0-9,-]+)\]")
needs_git = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="git lists the tree, and this is no checkout"
)


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
    version = diffumask_fast.__version__
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert importlib.metadata.version("diffumask-fast") == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    newest = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest and newest[1].split(",")[0] == version


def test_the_classifiers_name_the_pythons_that_are_admitted() -> None:
    admitted = SpecifierSet(PROJECT["project"]["requires-python"])
    named = {line.split(" :: ")[-1] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line}
    assert named == {f"3.{minor}" for minor in range(9, 20) if f"3.{minor}" in admitted}


def test_every_extra_that_somebody_is_sent_to_exists() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    sources = [path for room in ("diffumask_fast", *sorted(MAPPED)) for path in (ROOT / room).rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in (*pages, *sources))
    sent = {name for names in EXTRA.findall(text) for name in names.split(",")}
    assert {"onnx", "ray", "s3"} <= sent <= set(PROJECT["project"]["optional-dependencies"])


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


@needs_git
def test_every_file_of_the_packages_is_listed() -> None:
    assert set(package_files()) == {installed for path in tracked() if (installed := name_in_wheel(path))}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an sdist, and of the wheel that was built from it."""
    tree, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for path in tracked():  # and no egg-info, which remembers what older builds held
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tree / path)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(tree)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@needs_git
@pytest.mark.slow
def test_wheel_holds_the_packages_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        licences = [name.partition("/licenses/")[2] for name in archive.namelist() if "/licenses/" in name]
    assert sorted(names) == sorted(package_files())
    assert sorted(licences) == sorted(PROJECT["project"]["license-files"])


@needs_git
@pytest.mark.slow
def test_sdist_holds_the_repository(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {entry.name.partition("/")[2] for entry in archive if entry.isfile()}
    made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert names - made == tracked()


@needs_git
@pytest.mark.slow
def test_wheel_draws_offline_in_an_environment_of_its_own(built: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    fresh = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(fresh), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(next(built.glob("*.whl")))], check=True, capture_output=True)
    # Everything but this project comes from the environment that runs the tests; its editable finder stays behind.
    shared = [path for path in sys.path if path.endswith("-packages")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    code = (
        f"import sys; sys.path += {shared!r}\n"
        "import diffumask_fast, diffumask_fast.bench.harness\n"
        "print(diffumask_fast.__file__)\n"
        "from diffumask_fast.kernels import native\nnative.library()\n"
        "from diffumask_fast.cli import main\nsys.argv = ['diffumask-fast', 'generate', 'demo', '--num', '2']\nmain()"
    )
    done = subprocess.run([str(fresh), "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "env") in done.stdout.splitlines()[0]
    assert (tmp_path / "demo" / "data" / "shard-00000.parquet").is_file()


def tracked() -> set[str]:
    """Return the repository's files."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(listed.stdout.split("\0")) - {""}


def name_in_wheel(path: str) -> str | None:
    """Return how the wheel calls a file of the repository; None where it is of no package."""
    if path.startswith("diffumask_fast/"):
        return path
    return f"diffumask_fast/{path}" if path.split("/")[0] in MAPPED and not path.startswith(RECORDS) else None


def package_files() -> list[str]:
    """Return what pyproject.toml puts into the wheel, as its names there."""
    wanted = []
    for package in SETUPTOOLS["packages"]:
        folder = ROOT / SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))
        data = (pattern.replace("/**", "/**/*") for pattern in SETUPTOOLS["package-data"].get(package, []))
        files = {path for pattern in ("*.py", *data) for path in folder.glob(pattern) if path.is_file()}
        wanted += [f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}" for path in sorted(files)]
    return wanted
