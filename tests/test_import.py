"""Importing distflash costs next to nothing, says nothing, and needs nothing but torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import distflash

ROOT = Path(__file__).parent.parent
FROM_TORCH = """
import json, os, sys, time
import torch
before, environ, threads = set(sys.modules), dict(os.environ), torch.get_num_threads()
start = time.perf_counter()
import distflash
bare = time.perf_counter() - start
for name in distflash.__all__:
    getattr(distflash, name)
seconds = time.perf_counter() - start
assert dict(os.environ) == environ and torch.get_num_threads() == threads, "importing set something"
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized(), "importing started something"
"""


def python(code: str) -> str:
    """What a fresh interpreter prints. Its import path has the package, and whatever optional library is installed here."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"importing wrote to stderr: {done.stderr}"
    return done.stdout


def test_the_package_alone_says_nothing_and_needs_no_torch():
    (line,) = python("import sys, distflash; print([name for name in sys.modules if '.' not in name])").splitlines()
    found = set(json.loads(line.replace("'", '"'))) - {"distflash", "__main__"}
    ambient = {name for name in found if name.startswith(("_", "site", "distutils"))}  # what an environment's .pth files load
    assert "torch" not in found
    assert found - ambient <= sys.stdlib_module_names, f"importing distflash needs {found - ambient - sys.stdlib_module_names}"


def test_all_public_names_load_the_package_and_the_standard_library_alone():
    """No transformers, accelerate, deepspeed, mpi4py, safetensors, pyarrow, matplotlib, triton, typer, rich: nothing but ours, by name."""
    lines = python(FROM_TORCH + "print(json.dumps([bare, seconds, sorted(set(sys.modules) - before)]))").splitlines()
    assert len(lines) == 1, f"importing printed {lines[:-1]}"
    bare, seconds, new = json.loads(lines[0])
    ours = [name for name in new if name.partition(".")[0] == "distflash"]
    others = {name.partition(".")[0] for name in new} - {"distflash"} - sys.stdlib_module_names
    assert not others, f"distflash imports {sorted(others)}: import them where they are used"
    rooms = ("distflash.integrations", "distflash.train", "distflash.testing", "distflash.kernels.triton", "distflash.kernels.hopper")
    assert not [name for name in ours if name.startswith(rooms)], "kernels and integrations load when they are asked for"
    assert len(ours) > 20 and len(new) < 120, f"{len(new)} modules beyond torch's"
    print(f"beyond torch: import distflash {1e3 * bare:.1f} ms, every public name {1e3 * seconds:.0f} ms, {len(new)} modules")


@pytest.mark.parametrize("name", distflash.__all__)
def test_a_public_name_is_documented(name):
    assert (getattr(distflash, name).__doc__ or "").strip(), f"distflash.{name} has no docstring: the API pages are made of them"
