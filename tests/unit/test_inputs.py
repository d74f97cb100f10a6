"""A fingerprint of a model folder or of rows changes with what a run reads of them, and with nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny import dpo_config, ppo_config, sft_config, write_model
from tristage.runs.inputs import HEAD, model_fingerprint, model_fingerprints, source_fingerprints


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_model(tmp_path_factory.mktemp("model") / "model"))


def edit_weights(folder: Path) -> None:
    """The smallest change of the smallest tensor."""
    state = load_file(folder / "model.safetensors")
    smallest = min(state.values(), key=lambda tensor: tensor.numel())
    smallest.flatten()[-1] += 1e-3
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def edit_json(name: str):
    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {"more": 1}))

    return edit


@pytest.mark.parametrize("edit", [edit_weights, edit_json("config.json"), edit_json("tokenizer_config.json")])
def test_another_model_under_the_same_name_has_another_fingerprint(model, tmp_path, edit):
    folder = shutil.copytree(model, tmp_path / "model")
    edit(folder)
    assert model_fingerprint(folder) != model_fingerprint(model)


def test_a_copy_and_other_files_beside_it_change_nothing(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "elsewhere")
    (folder / "README.md").write_text("read me")
    (folder / "generation_config.json").write_text("{}")  # sampling settings come from the config
    os.utime(folder / "model.safetensors", (0, 0))
    assert model_fingerprint(folder) == model_fingerprint(model) != ""


def test_of_a_large_tensor_only_the_head_is_read(tmp_path):
    def fingerprint(place: int) -> str:
        tensor = torch.zeros(HEAD)  # four times the head, in bytes
        tensor[place] = 1
        (tmp_path / str(place)).mkdir()
        save_file({"w": tensor, "b": torch.ones(2)}, tmp_path / str(place) / "model.safetensors")
        return model_fingerprint(tmp_path / str(place))

    assert fingerprint(HEAD // 4 - 1) != fingerprint(HEAD // 4) == fingerprint(HEAD - 1)


def test_weights_of_other_kinds_and_damaged_ones_are_read_whole(tmp_path):
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(b"a" * 100)
        before = model_fingerprint(tmp_path)
        (tmp_path / name).write_bytes(b"a" * 99 + b"b")
        assert model_fingerprint(tmp_path) != before


def test_of_a_hub_id_it_is_the_commit_in_the_local_cache(monkeypatch):
    monkeypatch.setattr("tristage.runs.inputs.try_to_load_from_cache", lambda *_: "/cache/snapshots/abc123/config.json")
    assert model_fingerprint("owner/name") == "abc123"
    monkeypatch.undo()
    assert model_fingerprint("nobody/nothing") == "" == model_fingerprint("/no/such/folder")


def test_every_model_that_the_settings_name_is_covered(tmp_path, model):
    path = str(model)
    assert set(model_fingerprints(sft_config(tmp_path, path, "r"))) == {"model"}
    dpo = dpo_config(tmp_path, path, "r", 0, f"reference.model={path}")
    assert set(model_fingerprints(dpo)) == {"model", "reference.model"}
    ppo = ppo_config(tmp_path, path, path, "r", 0, f"reference.model={path}", f"critic.model={path}")
    assert set(model_fingerprints(ppo)) == {"actor.model", "critic.model", "reference.model", "reward.model"}


def test_rows_are_known_by_their_bytes_and_a_preset_by_what_it_says(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "preset.yaml").write_text(f"path: {tmp_path}/rows.jsonl\n")
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    words = [f"data.train=[{{preset: {tmp_path}/preset.yaml}}, owner/name]", f"data.template={tmp_path}/template.jinja"]
    settings = sft_config(tmp_path, "m", "r", 0, *words)
    found = [source_fingerprints(settings)]
    assert set(found[0]) == {"data.train[0]", "data.train[1]", "data.template"} and found[0]["data.train[1]"] == ""
    (tmp_path / "rows.jsonl").write_text("[]\n")
    found.append(source_fingerprints(settings))
    (tmp_path / "preset.yaml").write_text(f"path: {tmp_path}/rows.jsonl\nbest_first: true\n")
    found.append(source_fingerprints(settings))
    assert len({values["data.train[0]"] for values in found}) == 3
    (tmp_path / "template.jinja").write_text("")
    assert source_fingerprints(settings)["data.template"] != found[0]["data.template"]
