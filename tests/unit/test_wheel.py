"""A wheel holds all that a run needs: code, recipes, bases, presets, DeepSpeed JSONs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs. It is built from a copy, to leave no build/ behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in (*REPO.glob("step[0-9]_*"), REPO / "tristage", REPO / "configs"):
        shutil.copytree(path, source / path.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(REPO / name, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = out.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(out / "site")
    return out / "site"


def test_a_wheel_ships_every_yaml_and_json_of_configs(site):
    def files(folder: Path) -> set[Path]:
        return {path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".yaml", ".json")}

    shipped = files(site / "tristage" / "configs")
    assert shipped == files(REPO / "configs")
    assert Path("deepspeed/zero2.json") in shipped


def test_a_wheel_ships_every_module(site):
    def modules(root: Path) -> set[Path]:
        folders = (root / "tristage", *root.glob("step[0-9]_*"))
        return {path.relative_to(root) for folder in folders for path in folder.rglob("*.py")}

    assert modules(site) == modules(REPO)


SEES = """
import tristage
from tristage.config import load_config, read_deepspeed_json, settings_class
config = "tristage:opt-1.3b/step3_ppo.yaml"
settings = load_config(settings_class(config, None), ["--config", config, "actor.deepspeed=zero3"])
stages = [read_deepspeed_json(engine.deepspeed, settings)["zero_optimization"]["stage"]
          for engine in (settings.actor, settings.critic, settings.reward)]
print(tristage.__file__, settings.ppo.minibatch, *stages)
"""


def test_recipes_and_deepspeed_jsons_are_found_where_a_wheel_is_installed(site, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(site)}
    ran = subprocess.run([sys.executable, "-c", SEES], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.stdout.split() == [str(site / "tristage/__init__.py"), "32", "3", "2", "0"], ran.stderr
