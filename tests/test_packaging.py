import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.main import get_command

import genmed

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEVICE_PACKAGES = ("nvidia-", "triton", "cuda-")  # what torch requires depends on its build


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    exact = [re.fullmatch(r"([\w.-]+)==([\w.!]+)", line) for line in lines if not line.startswith("#")]
    assert all(exact), "every line of constraints.txt is an exact pin"
    return {canonicalize_name(match[1]): match[2] for match in exact if match}


def required(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> Iterator[str]:
    """Names of everything that an installation of `name[extras]` pulls on this machine."""
    if (name, extras) in seen:
        return
    seen.add((name, extras))
    yield name
    try:
        lines = requires(name) or []
    except PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        if requirement.marker is None or any(
            requirement.marker.evaluate({"extra": e}) for e in ("", *extras)
        ):
            yield from required(canonicalize_name(requirement.name), frozenset(requirement.extras), seen)


def test_constraints_pin_everything_that_the_test_extra_pulls() -> None:
    pulled = {name for name in required("genmed", frozenset({"test"}), set()) if name != "genmed"}
    pulled = {name for name in pulled if not name.startswith(DEVICE_PACKAGES)}
    assert {"torch", "monai", "pytest", "nilearn"} <= pulled
    assert pulled - pins().keys() == set()


def test_constraints_satisfy_the_ranges_of_the_project() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    for line in [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]:
        requirement = Requirement(line)
        if requirement.name != "genmed":
            assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), line


def test_torch_is_pinned_without_a_device() -> None:
    assert pins()["torch"] == "2.13.0"


def test_torchvision_is_absent() -> None:
    assert "torchvision" not in pins()
    assert importlib.util.find_spec("torchvision") is None


def test_code_is_under_apache_2() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text()


def test_data_files_are_declared_so_that_wheels_hold_them() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["genmed"]
    package = ROOT / "genmed"
    for path in package.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            name = path.relative_to(package).as_posix()
            assert any(fnmatch(name, pattern) for pattern in patterns), f"{name} is in no wheel"


def blocks(text: str) -> list[list[str]]:
    return [block.strip().splitlines() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]


def test_readme_opens_with_a_picture_the_demo_and_the_whole_test_suite() -> None:
    readme = (ROOT / "README.md").read_text()
    demo, tests, *_ = blocks(readme)
    assert readme.index("](docs/demo.png)") < readme.index("```bash")
    assert demo[0] == tests[0] == "python3 -m venv .venv"
    assert demo[-1].endswith("genmed demo") and "[demo]" in demo[1]
    assert tests[-1].endswith("python -m pytest") and "[test]" in tests[1]


def test_ci_runs_the_readmes_test_command_in_its_own_environment() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    tests = blocks((ROOT / "README.md").read_text())[1]
    assert tests[-1].removeprefix(".venv/bin/") in script.splitlines()
    assert "python3 -m venv" in script and "-c constraints.txt -e '.[test]'" in script
    assert "ruff check ." in script.splitlines() and "mypy" in script.splitlines()
    assert script.splitlines()[0].endswith("bash") and "set -euo pipefail" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)


def documents() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_pictures_of_documents_exist(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_documents_are_how_to_reference_and_explanation() -> None:
    for kind in ("how-to", "reference", "explanation"):
        pages = sorted((ROOT / "docs" / kind).glob("*.md"))
        assert pages
        readme = (ROOT / "README.md").read_text()
        assert all(f"docs/{kind}/{page.name}" in readme for page in pages)


def test_every_task_is_a_function_of_the_package() -> None:
    assert {"segment", "restore", "translate", "complete", "chain", "generate"} <= set(genmed.__all__)
    assert all(getattr(genmed, name).__name__ == name for name in genmed.__all__)
    declared = re.findall(r"^    from (\S+) import \w+ as (\w+)$", Path(genmed.__file__).read_text(), re.MULTILINE)
    assert {name: home for home, name in declared} == genmed._HOME


def test_command_line_reference_names_every_command_and_option() -> None:
    from genmed.cli import app

    reference = (ROOT / "docs" / "reference" / "cli.md").read_text()
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        section = reference.partition(f"## genmed {name}")[2].partition("\n## ")[0]
        assert section, name
        for sub_name, sub in getattr(command, "commands", {name: command}).items():
            assert sub_name in (name, *re.findall(r"[\w-]+", section))
            for parameter in sub.params:
                option = next((o for o in parameter.opts if o.startswith("--")), None)
                assert option is None or f"{option}" in section, f"genmed {name} {option}"


def test_changelog_knows_this_version() -> None:
    assert f"## {PROJECT['project']['version']}" in (ROOT / "CHANGELOG.md").read_text()


def tracked_text() -> list[Path]:
    folders = ("genmed", "tests", "docs", "bench", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")]
    return [path for path in files if path.suffix in (".py", ".md", ".txt", ".toml", ".json", ".html")]


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    forbidden = ["/" + "work/", "/" + "root/", ".." + "/shared", "py" + "pi.", "npmjs" + ".org"]
    files = tracked_text()
    assert len(files) > 30
    for path in files:
        content = path.read_text(encoding="utf-8")
        assert not [word for word in forbidden if word in content], path


def test_bundled_splits_are_json_by_part() -> None:
    for path in (ROOT / "genmed" / "bench" / "splits").glob("*.json"):
        assert {"train", "tune", "report"} <= json.loads(path.read_text()).keys()


def test_python_that_runs_is_one_that_is_supported() -> None:
    assert sys.version_info >= tuple(
        map(int, PROJECT["project"]["requires-python"].removeprefix(">=").split("."))
    )
