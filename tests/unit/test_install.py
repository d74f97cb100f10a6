"""`pip install -e .`: the package is found from any working folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
REPO = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
IMPORT = (
    "import sys, site; sys.path[0] = ''; site.addsitedir(sys.argv[1])\n"
    "import tristage, step1_sft; print(tristage.__version__, step1_sft.__file__)"
)


def test_a_clone_named_tristage_is_found_from_its_parent_folder(tmp_path: Path) -> None:
    """Its folder is on sys.path there, named as the package and without an __init__.py."""
    clone, site = tmp_path / "tristage", tmp_path / "site"
    for name in ("tristage", "step1_sft"):
        (clone / name).mkdir(parents=True)
        shutil.copy(REPO / name / "__init__.py", clone / name)
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(REPO / name, clone)
    site.mkdir()
    subprocess.run([sys.executable, "-c", BUILD, str(site)], cwd=clone, check=True, capture_output=True)
    (wheel,) = site.glob("*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    command = [sys.executable, "-S", "-c", IMPORT, str(site)]  # -S: nothing of this environment's site-packages
    ran = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert str(clone) in ran.stdout
