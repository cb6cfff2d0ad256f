"""Imports point downwards (docs: the rooms of the design): the model must not see KVM, the bindings know nobody."""

import ast
from pathlib import Path

import pytest

import harness

ROOT = Path(harness.__file__).parent
DATA = {"harness.state", "harness.case", "harness.exits", "harness.cpuid", "harness.vmcb"}


def imports(path):
    """Modules of the harness that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{a.name}" for a in node.names if node.module == "harness"}
    return {name for name in found if name.startswith("harness.")}


def test_bindings_know_nobody():
    assert imports(ROOT / "kvm_ioctl.py") == set()


@pytest.mark.parametrize("name", ["state", "case", "exits", "cpuid", "vmcb"])
def test_data_knows_no_machine(name):
    assert imports(ROOT / f"{name}.py") <= DATA


@pytest.mark.parametrize("path", sorted((ROOT / "reference").glob("*.py")), ids=lambda p: p.stem)
def test_model_never_sees_kvm(path):
    allowed = DATA | {"harness.modes"}
    assert {n for n in imports(path) if not n.startswith("harness.reference")} <= allowed


@pytest.mark.parametrize("name", ["runner", "lockstep", "machine", "kvm_machine", "host"])
def test_thin_runner_needs_no_model_and_no_pytest(name):
    text = (ROOT / f"{name}.py").read_text()
    assert not any(n.startswith("harness.reference") for n in imports(ROOT / f"{name}.py"))
    assert "import pytest" not in text


def test_one_place_opens_the_kvm_device():
    """(harness/report writes C that does it too; that is text.)"""
    hits = [p.relative_to(ROOT) for p in ROOT.rglob("*.py") if "KVM_CREATE_VM" in p.read_text()]
    assert sorted(str(h) for h in hits if h.parts[0] != "report") == ["kvm_ioctl.py", "vm.py"]
