"""LoRA (Hu et al. 2021): W x becomes W x + alpha/rank B A x, where only A [rank, in] and B [out, rank] are trained.

The layers are peft's, put into the loaded transformers model in place: class, config and `generate` stay what they
are. A starts random and B at 0, so the model starts as its base. Left out: dropout, which is off in every model here,
and adapters of embeddings and output projections.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tristage.config import LoraSettings
from tristage.errors import UserError
from tristage.models.loading import load_config_without_dropout

if TYPE_CHECKING:  # peft takes a second to import, so the functions that make adapters import it
    from peft import LoraConfig

ADAPTER = "default"  # peft's name of the one adapter
SCALE_FILE = "score_scale.json"  # next to a reward model's adapter: the score_* keys of its config.json


def check_lora(lora: LoraSettings | None, path: str, key: str, trust_remote_code: bool = False) -> None:
    """Check that every target is a layer of the model, by its config, before weights are read.

    Args:
        key: the setting's file and key, for the message.

    Raises:
        UserError: names the target that matches nothing, and what would match.
    """
    if lora is None:
        return
    with torch.device("meta"):
        config = load_config_without_dropout(path, trust_remote_code)
        names = _linear_names(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    for target in lora.targets:
        if not _targeted(names, [target]):
            endings = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise UserError(f"{key}: {path} has no inner linear layer whose name ends in `{target}`; it has {endings}")


def add_adapters(model: PreTrainedModel, lora: LoraSettings, path: str, seed: int) -> None:
    """Freeze the model and give its targets adapters, the same on every rank; a scalar head is trained as well.

    Args:
        path: the folder or id that the model came from, for adapter_config.json.
    """
    from peft import LoraConfig

    dtype, head = model.dtype, getattr(model, "score", None)
    names = _targeted(_linear_names(model), lora.targets)
    assert names, "check_lora comes first"
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number does
        target_modules=names,
        lora_dropout=0.0,
        task_type="CAUSAL_LM" if head is None else "SEQ_CLS",
        base_model_name_or_path=path,
    )
    _inject(model, config, seed)
    for _, layer in _lora_layers(model):
        for parameter in _adapters(layer):
            parameter.data = parameter.data.to(dtype)  # peft makes float32 of bf16, which ZeRO-3 refuses to mix
    if head is not None:
        head.requires_grad_(True)


def _inject(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """peft's layers into the model; their random weights are those of `seed`, and nobody else's draws change."""
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft reports GPT-2's transposed weights
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER)


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Linear layers by full name, without output projection and scalar head."""
    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not any(module is head for head in heads)
    ]


def _targeted(names: Iterable[str], targets: Iterable[str]) -> list[str]:
    """The names that are a target, or end in one after a dot; `all-linear` is all of them."""
    return [
        name
        for name in names
        if any(target == "all-linear" or f".{name}".endswith(f".{target}") for target in targets)
    ]


def adapter_parameters(model: PreTrainedModel, lora: LoraSettings) -> int:
    """Numbers in the adapters that add_adapters would make: rank x (in + out) a target."""
    names = _targeted(_linear_names(model), lora.targets)
    return sum(lora.rank * sum(model.get_submodule(name).weight.shape) for name in names)


def inner_linear_parameters(model: PreTrainedModel) -> int:
    """Numbers in the weights of the linear layers that can have adapters."""
    return sum(model.get_submodule(name).weight.numel() for name in _linear_names(model))


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """peft's layers, known by their ModuleDict `lora_A`."""
    modules = model.named_modules()
    return ((name, module) for name, module in modules if isinstance(getattr(module, "lora_A", None), nn.ModuleDict))


def _adapters(layer: Any) -> list[nn.Parameter]:
    return [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]


def has_adapters(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return any(True for _ in _lora_layers(model))


def base_path(model: PreTrainedModel) -> str:
    """The folder or id of the base model, as passed to add_adapters."""
    return str(model.peft_config[ADAPTER].base_model_name_or_path)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as its base, for forward passes without gradients: W x alone."""
    layers = [layer for _, layer in _lora_layers(model)]
    assert layers, "no adapters to switch off"
    # peft's own switch (`enable_adapters`) also takes requires_grad away, which ZeRO's hooks were set up with.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merge_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Merge adapters in a state dict of `model`: W + alpha/rank B A in float32, then W's dtype, by W's plain name.

    In place, so that memory holds the weights once; those that the model itself still uses are copied first.
    """
    for name, layer in _lora_layers(model):
        a, b = (state.pop(f"{name}.lora_{which}.{ADAPTER}.weight") for which in "AB")
        weight = state[f"{name}.base_layer.weight"]
        if weight.data_ptr() == layer.get_base_layer().weight.data_ptr():
            weight = state[f"{name}.base_layer.weight"] = weight.clone()
        weight.copy_(_merged(layer, weight, a, b))
        for key in [key for key in state if key.startswith(f"{name}.base_layer.")]:
            state[key.replace(".base_layer.", ".")] = state.pop(key)


def _merged(layer: Any, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """W + alpha/rank B A, in float32."""
    change = layer.scaling[ADAPTER] * (b.float() @ a.float())  # [out, in]
    if isinstance(layer.get_base_layer(), Conv1D):
        change = change.T  # GPT-2 keeps its weights [in, out]
    return weight.float() + change


def stream_merged(
    model: nn.Module, whole: Callable[[list[nn.Parameter]], contextlib.AbstractContextManager[Any]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A copy of each weight by its plain name, adapters merged as by `merge_state`, one after the other.

    Args:
        whole: within it the parameters that it is given are not partitioned.
    """
    layers = {f"{name}.base_layer.weight": layer for name, layer in _lora_layers(model)}
    for name, parameter in model.named_parameters():
        if f".{ADAPTER}." in name:
            continue
        layer = layers.get(name)
        with torch.no_grad(), whole([parameter, *(_adapters(layer) if layer is not None else [])]):
            weight = parameter.clone() if layer is None else _merged(layer, parameter, *_adapters(layer))
        yield name.replace(".base_layer.", "."), weight.to(parameter.dtype)


def save_adapter(model: PreTrainedModel, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the adapters of `state`, and the scalar head where there is one, in peft's format."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in state.items() if f".{ADAPTER}." in name}
    own |= {name: tensor for name, tensor in state.items() if name.startswith("score.")}
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in own.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode, config.target_modules = True, sorted(config.target_modules)
    if hasattr(model, "score"):
        config.modules_to_save = ["score"]
        scale = {name: value for name, value in model.config.to_dict().items() if name.startswith("score_")}
        (folder / SCALE_FILE).write_text(json.dumps(scale))
    config.save_pretrained(str(folder))


def read_adapter_config(folder: str) -> LoraConfig:
    """The adapter_config.json of a folder. Raises UserError if there is none, or it is not plain LoRA."""
    if not (Path(folder) / "adapter_config.json").is_file():
        raise UserError(f"{folder}: holds no adapter_config.json; give a folder such as OUT/final_adapter")
    values = json.loads((Path(folder) / "adapter_config.json").read_text())
    if values.get("peft_type") != "LORA" or values.get("use_dora"):
        raise UserError(f"{folder}: is not a plain LoRA adapter; merge it with peft")
    from peft import LoraConfig

    return LoraConfig.from_pretrained(folder)


def load_adapter(model: PreTrainedModel, folder: str, tensors: dict[str, torch.Tensor]) -> None:
    """Put the adapter that save_adapter (or peft) wrote into a freshly loaded base model.

    Args:
        tensors: the folder's adapter_model.safetensors.

    Raises:
        UserError: the adapter belongs to another model.
    """
    mismatch = UserError(f"{folder}: its adapters don't fit the base model; give the one that it was trained on")
    config = read_adapter_config(folder)
    config.modules_to_save = None  # the head is loaded like any weight
    try:
        _inject(model, config, seed=0)
    except ValueError:  # none of its target modules exists
        raise mismatch from None
    names = {}
    for key in tensors:
        name = key.removeprefix("base_model.model.")
        for which in "AB":
            name = name.replace(f".lora_{which}.weight", f".lora_{which}.{ADAPTER}.weight")
        names[name] = key
    own = model.state_dict()
    wanted = {name for name in own if f".{ADAPTER}." in name}
    if not wanted <= names.keys() <= own.keys() or any(own[n].shape != tensors[k].shape for n, k in names.items()):
        raise mismatch
    model.load_state_dict({name: tensors[key] for name, key in names.items()}, strict=False)
    scale = Path(folder) / SCALE_FILE
    if scale.is_file():
        model.config.update(json.loads(scale.read_text()))
