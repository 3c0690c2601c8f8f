"""The wheel is whole: built, installed elsewhere and run from there."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import inferencia

REPOSITORY = Path(__file__).resolve().parent.parent
BUILT_FROM = ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
# pip's words when its build environment could not be filled.
NO_NETWORK = ("No matching distribution found for setuptools", "Connection")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves folders beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    cached = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "inferencia", sources / "inferencia", ignore=cached)
    for name in BUILT_FROM:
        shutil.copy(REPOSITORY / name, sources)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command = [*pip, "wheel", "--no-deps", "-w", str(folder), str(sources)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode and any(words in done.stderr for words in NO_NETWORK):
        pytest.skip("pip cannot fetch setuptools to build with")
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command = [*pip, "install", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return target


def run(installation: Path, *arguments: str) -> str:
    """Run the installed command; dependencies come from this Python."""
    environment = {**os.environ, "PYTHONPATH": str(installation)}
    command = [str(installation / "bin" / "inferencia"), *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=30,
        env=environment,
        cwd=installation,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    package = REPOSITORY / "inferencia"
    files = [path for path in package.rglob("*") if path.is_file()]
    wanted = {
        path.relative_to(REPOSITORY).as_posix()
        for path in files
        if "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {n for n in archive.namelist() if n.startswith("inferencia/")}
    assert held == wanted


def test_the_wheel_declares_only_the_two_dependencies(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist:")]
    always = [line for line in required if "extra ==" not in line]
    assert always == ["Requires-Dist: aiohttp>=3.14.3", "Requires-Dist: pyyaml"]
    extras = {line.split()[1] for line in lines if line.startswith("Provides-Extra:")}
    assert extras == {"speed", "redis", "test", "dev", "e2e"}


def test_the_installed_command_says_its_version(installation: Path) -> None:
    assert inferencia.__version__ in run(installation, "--version")


def test_the_installed_command_explains_itself(installation: Path) -> None:
    text = run(installation, "--help")
    assert "serve" in text and "check" in text and "keys" in text


def test_the_installed_package_is_marked_as_typed(installation: Path) -> None:
    assert (installation / "inferencia" / "py.typed").exists()


def test_pyproject_only_names_the_build_system() -> None:
    """All metadata is in setup.cfg."""
    text = (REPOSITORY / "pyproject.toml").read_text()
    sections = [line for line in text.splitlines() if line.startswith("[")]
    assert sections == ["[build-system]"]


def test_the_version_is_the_newest_one_in_the_changelog() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert inferencia.__version__ in headings[0]
