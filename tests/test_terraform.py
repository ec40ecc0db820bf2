"""The files of terraform/ are well formed, plan what they promise, and agree with the rest of the project.

Invariant: Google is asked for nothing: the real providers are fetched for their schemas, and `terraform test` puts
mocks in their place. What could not be checked fails and says so.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from jax._src.clusters.cloud_tpu_cluster import coordinator_port

FOLDER = Path(__file__).parents[1] / "terraform"
ENVIRONMENT = {**os.environ, "CHECKPOINT_DISABLE": "1", "TF_IN_AUTOMATION": "1"}
external = pytest.mark.external


def read(name):
    return (FOLDER / name).read_text(encoding="utf-8")


def run(program, folder, *arguments):
    """What `terraform ARGUMENTS` did in the folder, its words in one string."""
    command = [program, *arguments, "-no-color"]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, text=True, capture_output=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def terraform():
    program = shutil.which("terraform")
    if program is None:
        pytest.fail(
            "terraform is not on PATH, so nothing was checked; install 1.9 or later from "
            "developer.hashicorp.com/terraform/install and run make test-terraform again",
            pytrace=False,
        )
    return program


@pytest.fixture(scope="module")
def initialised(terraform, tmp_path_factory):
    """A copy of the folder with its providers, so that the checkout stays as it was."""
    folder = tmp_path_factory.mktemp("copy") / "terraform"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*", "*.tfvars"))
    status, words = run(terraform, folder, "init", "-backend=false", "-input=false")
    if "Failed to query available provider packages" in words:
        pytest.fail(
            "terraform validate and terraform test were NOT run: the providers cannot be fetched; run make "
            "test-terraform where registry.terraform.io is reached, or name a mirror of it in TF_CLI_CONFIG_FILE",
            pytrace=False,
        )
    assert status == 0, words
    return folder


@external
def test_the_format_is_terraforms_own(terraform):
    status, words = run(terraform, FOLDER, "fmt", "-check", "-recursive", "-diff")
    assert status == 0, words


@external
def test_the_files_are_valid(terraform, initialised):
    status, words = run(terraform, initialised, "validate")
    assert status == 0, words


@external
def test_the_plans_keep_their_promises(terraform, initialised):
    status, words = run(terraform, initialised, "test")
    assert status == 0, words


def test_the_firewall_opens_the_port_that_jax_uses():
    (ports,) = re.findall(r"peer_ports = \[(.*?)\n  \]", read("network.tf"), re.DOTALL)
    assert coordinator_port in re.findall(r'^ +"(\d+)", #', ports, re.MULTILINE)


def test_every_variable_is_in_the_readme_and_the_example_names_no_other():
    variables = re.findall(r'^variable "(\w+)"', read("variables.tf"), re.MULTILINE)
    assert re.findall(r"^\| `(\w+)` \|", read("README.md"), re.MULTILINE) == variables
    example = re.findall(r"^(?:# )?(\w+) +=", read("terraform.tfvars.example"), re.MULTILINE)
    assert example[0] == "project_id"
    assert set(example) <= set(variables)


def test_every_suppressed_check_says_why():
    for path in FOLDER.glob("*.tf"):
        for line in re.findall(r"checkov:skip.*", path.read_text(encoding="utf-8")):
            assert re.fullmatch(r"checkov:skip=CKV2?_GCP_\d+:\w.{20,}", line), f"{path.name}: {line}"
