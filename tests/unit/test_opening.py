"""A model folder that cannot be opened as it is, is one sentence: code of its own, weights that are not all there, a
file cut short, an id without network. Nothing of it is run, and nothing starts from random weights unseen."""

from __future__ import annotations

import builtins
import json
import pickle
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import step1_sft.evaluate
import step1_sft.train
import step2_dpo.train
import step2_reward_model.train
import step3_ppo.train
from step3_ppo.config import PPOConfig
from step3_ppo.engines import check_models
from tests.helpers import tiny
from tristage.cli import doctor
from tristage.cli import main as cli
from tristage.config import LoraSettings, SourceSettings, load_config
from tristage.data import hub
from tristage.data.sources import open_source
from tristage.errors import UserError
from tristage.launch import check_config
from tristage.models.causal_lm import load_causal_lm
from tristage.models.loading import ALIGNMENT, check_model, check_packable, is_reward_model
from tristage.models.lora import check_lora
from tristage.models.reward_model import load_reward_model
from tristage.models.saving import merge_adapter
from tristage.models.sizes import model_shape
from tristage.models.tokenizer import load_tokenizer
from tristage.training import run, setup

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("folders")
    model = tiny.write_model(folder / "model", "llama_untied")
    return {"model": model, "reward": tiny.write_reward_model(folder / "reward", model)}


def refusal(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    said = str(error.value)
    assert "\n" not in said
    return said


def policy(path: str, **options: Any) -> Any:
    return load_causal_lm(path, load_tokenizer(path), dtype=torch.float32, **options)


def scorer(path: str, seed: int | None = None, **options: Any) -> Any:
    return load_reward_model(path, load_tokenizer(path), dtype=torch.float32, new_head_seed=seed, **options)


# ---- weights that are not the model's -------------------------------------------------------------------------------


def change(folder: str, edit: Callable[[dict[str, torch.Tensor]], Any]) -> str:
    tensors = load_file(f"{folder}/{WEIGHTS}")
    edit(tensors)
    save_file(tensors, f"{folder}/{WEIGHTS}", metadata={"format": "pt"})
    return folder


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: [tensors.pop(name) for name in names]


MLP = [f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in (0, 1) for name in ("down", "gate")]
EDITS: dict[str, tuple[Any, str]] = {
    "missing": (without(MLP[0]), f"1 missing: {MLP[0]}"),
    "several": (without(*MLP), f"4 missing: {MLP[0]}, {MLP[1]}, {MLP[2]}, ..."),
    "unexpected": (lambda tensors: tensors.update(v_head=torch.zeros(3)), "1 unexpected: v_head"),
    "shape": (
        lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}),
        "1 of another shape than config.json's: model.norm.weight ([3], not [48])",
    ),
    "output layer": (without("lm_head.weight"), "1 missing: lm_head.weight"),
}


@pytest.mark.parametrize("case", EDITS)
def test_keys_that_are_not_the_models_are_listed(case: str, base: dict[str, str], tmp_path: Path) -> None:
    edit, expected = EDITS[case]
    path = change(tiny.copy_model(base["model"], tmp_path / "model"), edit)
    said = refusal(policy, path)
    assert said == f"{path}: its weights are not those of a LlamaForCausalLM ({expected}); give a complete model folder"
    if case != "output layer":  # a reward model has none
        assert expected in refusal(scorer, path, seed=1)


def test_a_reward_model_without_its_head_or_with_two_labels_is_refused(base: dict[str, str], tmp_path: Path) -> None:
    path = change(tiny.copy_model(base["reward"], tmp_path / "headless"), without("score.weight"))
    for seed in (None, 1):  # asked to score, or to be trained on: a new head would be neither
        assert "1 missing: score.weight" in refusal(scorer, path, seed)
    path = tiny.copy_model(base["reward"], tmp_path / "two")
    change(path, lambda tensors: tensors.update({"score.weight": torch.zeros(2, 48)}))
    assert "score.weight ([2, 48], not [1, 48])" in refusal(scorer, path)


def test_old_causal_masks_are_no_weights(base: dict[str, str], tmp_path: Path) -> None:
    masks = {"model.layers.0.attn.masked_bias": torch.zeros(1), "model.layers.1.rotary_emb.inv_freq": torch.zeros(4)}
    old = change(tiny.copy_model(base["model"], tmp_path / "old"), lambda tensors: tensors.update(masks))
    found, expected = policy(old).state_dict(), policy(base["model"]).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_checked_headers_change_no_random_number(base: dict[str, str]) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check_model(base["model"], 8, "new_reward_model")
    assert torch.equal(torch.rand(4), expected)


def test_a_reward_model_is_no_policy(
    base: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(policy, base["reward"]).startswith(f"{base['reward']}: holds a reward model, not a language model;")
    config = tiny.dpo_config(tmp_path, base["model"], tiny.write_rows(tmp_path / "rows")["ranking"]).file
    for key in ("model", "reference.model"):
        assert check_config.main(["step2_dpo.train", config, f"{key}={base['reward']}"]) == 2  # without torch
        assert f"key `{key}`: {base['reward']}: holds a reward model" in capsys.readouterr().err
        said = refusal(step2_dpo.train.main, ["--config", config, f"{key}={base['reward']}"])
        assert said.startswith(f"{config}: key `{key}`: {base['reward']}: holds a reward model")


# ---- files that cannot be read --------------------------------------------------------------------------------------


@pytest.fixture
def sharded(base: dict[str, str], tmp_path: Path) -> Path:
    tiny.copy_model(base["model"], tmp_path / "sharded")
    (tmp_path / "sharded" / WEIGHTS).unlink()
    model = AutoModelForCausalLM.from_pretrained(base["model"])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    return tmp_path / "sharded"


def test_a_shard_that_is_missing_or_cut_short_is_named(sharded: Path) -> None:
    policy(str(sharded))
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert refusal(policy, str(sharded)).startswith(f"{shard}: damaged or cut short (")
    shard.unlink()
    index = "model.safetensors.index.json"
    again = "not in the folder; copy the model folder again"
    assert refusal(policy, str(sharded)) == f"{sharded}: {index} names {shard.name}, {again}"
    (sharded / index).write_text("{")
    assert refusal(policy, str(sharded)) == f"{sharded / index}: not an index of weights; copy the model folder again"


def test_no_weights_at_all_is_a_sentence(base: dict[str, str], tmp_path: Path) -> None:
    path = Path(tiny.copy_model(base["model"], tmp_path / "none"))
    (path / WEIGHTS).unlink()
    assert refusal(policy, str(path)).startswith(f"{path}: cannot be opened as a model (Error no file named {WEIGHTS}")


class Harmful:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def test_bin_weights_are_tensors_or_refused(base: dict[str, str], tmp_path: Path) -> None:
    path, marker = Path(tiny.copy_model(base["model"], tmp_path / "bin")), tmp_path / "ran"
    tensors: dict[str, Any] = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    torch.save(tensors, path / "pytorch_model.bin")
    policy(str(path))
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(tensors | {"more": Harmful(marker)}))
    zipped = refusal(policy, str(path))
    torch.save(tensors | {"more": Harmful(marker)}, path / "pytorch_model.bin")
    assert zipped == refusal(policy, str(path)) == (
        f"{path}: its .bin weights hold more than tensors, and pickled objects are not loaded; convert to safetensors"
    )
    assert not marker.exists()


# ---- code in model folders ------------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel, PreTrainedTokenizerFast
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnForSequenceClassification(LlamaPreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.model, self.score = LlamaModel(config), nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


class Own:
    """Folders that bring code, which leaves a marker when it runs."""

    def __init__(self, base: dict[str, str], folder: Path) -> None:
        self.marker, self.folder = folder / "ran", folder
        self.model = self.write(base["model"], "own", "OwnModel")
        self.reward = self.write(base["reward"], "own_reward", "OwnForSequenceClassification")
        self.tokenizer = tiny.copy_model(base["model"], folder / "own_tokenizer")
        self.add_tokenizer(Path(self.tokenizer))

    def write(self, source: str, name: str, architecture: str) -> str:
        path = Path(tiny.copy_model(source, self.folder / name))
        classes = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnModel"}
        classes["AutoModelForSequenceClassification"] = "OwnForSequenceClassification"
        edit(path / "config.json", model_type="own", architectures=[architecture], auto_map=mapped(classes))
        self.add_code(path)
        return str(path)

    def add_code(self, path: Path) -> None:
        (path / "code.py").write_text(CODE.format(marker=str(self.marker)))

    def add_tokenizer(self, path: Path) -> None:
        own = {"AutoTokenizer": [None, "code.OwnTokenizer"]}
        edit(path / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own)
        self.add_code(path)


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def mapped(classes: dict[str, str]) -> dict[str, str]:
    return {auto: f"code.{name}" for auto, name in classes.items()}


@pytest.fixture
def own(base: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Own]:
    """Whoever asks on standard input hears yes."""
    monkeypatch.setattr(builtins, "input", lambda *words: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    before = list(sys.path)
    yield Own(base, tmp_path)
    sys.path[:] = before


def loading_paths(own: Own, base: dict[str, str]) -> dict[str, Callable[[], Any]]:
    rows = tiny.write_rows(own.folder / "rows")
    sft, model = tiny.sft_config(own.folder, own.model, rows["sft"]).file, own.model
    rewards = tiny.reward_model_config(own.folder, model, rows["ranking"]).file
    dpo = tiny.dpo_config(own.folder, base["model"], rows["ranking"]).file
    ppo = tiny.ppo_config(own.folder, base["model"], base["reward"], rows["prompts"]).file
    tokenizer = load_tokenizer(base["model"])
    adapter = own.folder / "adapter"
    adapter.mkdir()
    peft = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(peft))
    (adapter / "adapter_model.safetensors").touch()
    return {
        "tokenizer": lambda: load_tokenizer(own.tokenizer),
        "policy": lambda: load_causal_lm(model, tokenizer, dtype=torch.float32),
        "reward model": lambda: load_reward_model(own.reward, tokenizer, dtype=torch.float32),
        "shape": lambda: model_shape(model),
        "lora": lambda: check_lora(LoraSettings(), model, "lora.targets"),
        "packing": lambda: check_packable(model),
        "kind": lambda: is_reward_model(model),
        "merge": lambda: merge_adapter(model, str(adapter), str(own.folder / "merged")),
        "sft": lambda: step1_sft.train.main(["--config", sft]),
        "sft evaluation": lambda: step1_sft.evaluate.main(["--config", sft]),
        "rewards": lambda: step2_reward_model.train.main(["--config", rewards]),
        "dpo": lambda: step2_dpo.train.main(["--config", dpo, f"reference.model={own.model}"]),
        "ppo": lambda: step3_ppo.train.main(["--config", ppo, f"actor.model={own.model}"]),
        "critic": lambda: step3_ppo.train.main(["--config", ppo, f"critic.model={own.reward}"]),
        "reward of other tokens": lambda: step3_ppo.train.main(
            ["--config", ppo, f"reward.model={own.reward}", "reward.own_tokenizer=true", "trust_remote_code=true"]
        ),
    }


PATHS = (
    *("tokenizer", "policy", "reward model", "shape", "lora", "packing", "kind", "merge"),
    *("sft", "sft evaluation", "rewards", "dpo", "ppo", "critic", "reward of other tokens"),
)


@pytest.mark.parametrize("name", PATHS)
def test_no_path_runs_code_of_a_folder(name: str, own: Own, base: dict[str, str]) -> None:
    said = refusal(loading_paths(own, base)[name])
    assert re.search(r"needs Python code from that folder, which is not run; .* set `trust_remote_code: true`", said)
    assert not own.marker.exists()


@pytest.mark.parametrize("words", [["plan"], ["data", "show"], ["data", "check"]], ids=" ".join)
def test_no_command_runs_code_of_a_folder(words: list[str], own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    start = own.model if words == ["plan"] else own.tokenizer
    config = tiny.sft_config(own.folder, start, tiny.write_rows(own.folder / "rows")["sft"]).file
    assert cli.main([*words, config, "--step", "step1_sft", *(["--gpus", "2"] if words == ["plan"] else [])]) == 2
    assert "needs Python code from that folder" in capsys.readouterr().err
    assert not own.marker.exists()


def test_doctor_says_what_a_folder_lacks(own: Own, base: dict[str, str]) -> None:
    rows = tiny.write_rows(own.folder / "rows")
    settings = tiny.sft_config(own.folder, own.model, rows["sft"])
    found = [str(finding) for finding in doctor.config(settings, 2)]
    assert any(line.startswith("stop") and "needs Python code from that folder" in line for line in found)
    assert not own.marker.exists()
    path = change(tiny.copy_model(base["model"], own.folder / "partial"), without(MLP[0]))
    found = [str(finding) for finding in doctor.config(tiny.sft_config(own.folder, path, rows["sft"]), 2)]
    assert any(line.startswith("stop") and f"1 missing: {MLP[0]}" in line for line in found)


def test_a_setting_lets_the_code_run_and_is_written_down(own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.sft_config(own.folder, own.model, tiny.write_rows(own.folder / "rows")["sft"]).file
    settings = load_config(step1_sft.train.SFTConfig, ["--config", config, "trust_remote_code=true"])
    setup.check_training(settings)
    assert own.marker.exists()
    model = policy(own.model, **{"trust_remote_code": settings.trust_remote_code})
    assert type(model.model).__name__ == "OwnModel"
    assert run.trusted_code(settings) == {"trust_remote_code": True}
    assert "trust_remote_code" in capsys.readouterr().out


def test_a_reward_model_of_other_tokens_is_trusted_by_its_own_key(
    own: Own, base: dict[str, str], tmp_path: Path
) -> None:
    config = tiny.ppo_config(tmp_path, base["model"], own.reward, tiny.write_rows(tmp_path / "rows")["prompts"]).file
    words = ["--config", config, "reward.own_tokenizer=true", "reward.trust_remote_code=true"]
    settings = load_config(PPOConfig, words)
    assert (settings.trusts("reward"), settings.trusts("actor")) == (True, False)
    check_models(settings)
    assert own.marker.exists()
    assert run.trusted_code(settings) == {"trust_remote_code": False, "reward.trust_remote_code": True}
    said = refusal(load_config, PPOConfig, ["--config", config, "reward.trust_remote_code=true"])
    assert "key `reward.trust_remote_code` is for `reward.own_tokenizer`; use `trust_remote_code`" in said


# ---- families without a scalar head ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["granite", "mamba"])
def test_a_family_without_a_scalar_head_gets_one(family: str, base: dict[str, str], tmp_path: Path) -> None:
    start = tiny.copy_model(base["model"], tmp_path / family)
    (Path(start) / WEIGHTS).unlink()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": len(load_tokenizer(start))}
    if family == "granite":
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).save_pretrained(start)
    assert not is_reward_model(start)
    model, again = scorer(start, seed=5), tmp_path / "saved"
    ids = torch.tensor([[5, 6, 7, 8, 0], [9, 5, 6, 0, 0]])
    mask = torch.tensor([[True] * 4 + [False], [True] * 3 + [False] * 2])
    model.model.save_pretrained(again)
    load_tokenizer(start).save_pretrained(again)
    assert is_reward_model(str(again))
    if family == "mamba":
        assert "memory is planned for models with attention" in refusal(model_shape, start, scalar_head=True)
    else:
        assert model_shape(start, scalar_head=True).head == 32
    with torch.no_grad():
        values = model(ids, mask)
        assert torch.equal(scorer(str(again))(ids, mask)[mask], values[mask])
        assert torch.allclose(model(ids[1:, :3], mask[1:, :3]), values[1:, :3], atol=1e-6)  # padding changes nothing
    assert values.std() > 0


def test_others_open_such_a_folder_by_the_lines_of_the_docstring(tmp_path: Path) -> None:
    path = tiny.write_reward_model(tmp_path / "reward", tiny.write_model(tmp_path / "model", "granite"))
    lines = re.findall(r"^    (\S.*)$", (tiny.REPO / "tristage/models/scalar_head.py").read_text(), re.M)[:3]
    opened = "model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)"
    script = [
        "from transformers import AutoModelForSequenceClassification, GraniteConfig, GranitePreTrainedModel",
        "from transformers.modeling_layers import GenericForSequenceClassification",
        f"folder = {path!r}",
        *lines[:2],
        opened,
        "assert not any(info.values()), info",
        "print(model.score.weight.sum().item())",
    ]
    assert lines[2] == "model = AutoModelForSequenceClassification.from_pretrained(folder)"
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = float(load_file(f"{path}/{WEIGHTS}")["score.weight"].sum())
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(expected)


# ---- ids without a network ------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[socket.socket]:
    """A port that the hub is said to be at: it accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setenv("HF_HUB_OFFLINE", "")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(hub, "TIMEOUT", 0.5)
        answers = hub.answers
        answers.cache_clear()
        yield server
    answers.cache_clear()


@pytest.mark.parametrize("listens", [True, False])
def test_an_id_without_a_network_is_a_sentence_at_once(listens: bool, endpoint: socket.socket) -> None:
    if not listens:
        endpoint.close()
    started = time.monotonic()
    for function in (load_tokenizer, is_reward_model):
        said = refusal(function, "nobody/nothing")
        assert said.startswith("nobody/nothing: not a local folder and not in the cache ")
        assert constants.ENDPOINT in said and "give a local folder, or set HF_HOME to a cache that has it" in said
    assert time.monotonic() - started < 4


def test_a_data_set_without_a_network_is_the_same_sentence(
    endpoint: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    started = time.monotonic()
    assert refusal(open_source, SourceSettings(path="nobody/rows")).startswith("nobody/rows: not a local folder and")
    assert time.monotonic() - started < 4


def test_a_local_folder_never_asks_the_hub(
    base: dict[str, str], monkeypatch: pytest.MonkeyPatch, endpoint: socket.socket
) -> None:
    monkeypatch.setattr(hub, "answers", lambda address: pytest.fail("asked"))
    load_tokenizer(base["model"])
    assert not is_reward_model(base["model"])


def test_weights_are_aligned_whatever_the_length_of_the_files_header(tmp_path):
    """On some processors the address of a weight decides the last bit of a product of one row."""
    folder = tiny.write_model(tmp_path / "model")
    weights = Path(folder) / "model.safetensors"
    start = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    if start % ALIGNMENT == 0:
        save_file(load_file(weights), weights, {"format": "pt", "longer": "by eight"})
    model = load_causal_lm(folder, load_tokenizer(folder), dtype=torch.float32)
    assert {parameter.data_ptr() % ALIGNMENT for parameter in model.parameters()} == {0}
