"""What of a model is trained: low-rank adapters (LoRA), everything, the last layers, or the head alone.

Notable choices:
- Adapters are PEFT's, on the seven matrices of every layer; a new head is trained and saved whole.
- The folder of an adapter names its base by an absolute path or a Hub id, so that it loads from anywhere. A
  base in a folder is compared with the one in memory: over other weights the adapter would be silently wrong.

Source: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models"; METHOD.md section 7.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel
from transformers.utils import cached_file

Trainable = Literal["lora", "full", "last_layers", "head"]
TRAINABLE = ("lora", "full", "last_layers", "head")
ADAPTER_CARD = """---
library_name: peft
{base_model}tags: [scdiva, lora, single-cell]
---

# Adapter of a scDiVa model

Low-rank adapter of a masked diffusion model of single cells. It loads over its base, which
`adapter_config.json` names.
"""
ADAPTER_FILE, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_trainable(
    model: Any,
    trainable: Trainable,
    *,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    n_last_layers: int = 4,
    modules_to_save: Sequence[str] = (),
) -> nn.Module:
    """Choose what fine-tuning changes.

    Args:
        model: A scDiVa model, with its head.
        trainable: "lora" adds adapters to every layer and freezes the rest, "full" trains everything,
            "last_layers" the last layers and the final norm, "head" nothing of the encoder.
        lora_rank: Rank of the adapters.
        lora_alpha: Scale of the adapters, which are multiplied by ``lora_alpha / lora_rank``.
        lora_dropout: Dropout in front of the adapters, in [0, 1).
        n_last_layers: Layers that "last_layers" trains.
        modules_to_save: Names of modules (a head) that are trained whole in every mode.

    Returns:
        A `peft.PeftModel` around the model for "lora", else the model itself.

    Raises:
        ValueError: If ``trainable`` is unknown, a number is out of range, a module does not exist, or the
            model carries an adapter already.
    """
    refuse_adapter(model)
    if trainable not in TRAINABLE:
        msg = f"trainable must be one of {', '.join(TRAINABLE)}, got {trainable!r}."
        raise ValueError(msg)
    for name in modules_to_save:
        if not any(_is_named(part, name) for part, _ in model.named_modules()):
            msg = (
                f"{type(model).__name__} has no module {name!r} to train; it has "
                f"{', '.join(part for part, _ in model.named_children())}."
            )
            raise ValueError(msg)
    if trainable == "lora":
        return _with_lora(model, lora_rank, lora_alpha, lora_dropout, modules_to_save)
    model.requires_grad_(trainable == "full")
    if trainable == "last_layers":
        layers = model.base_model.layers
        if not 1 <= n_last_layers <= len(layers):
            msg = f"n_last_layers must lie in [1, {len(layers)}], got {n_last_layers}."
            raise ValueError(msg)
        layers[-n_last_layers:].requires_grad_()
        model.base_model.norm.requires_grad_()
    for part, module in model.named_modules():
        if any(_is_named(part, name) for name in modules_to_save):
            module.requires_grad_()
    return model


def refuse_adapter(model: Any) -> None:
    """Refuse a model with adapters where a base is wanted: what is built on it would forget them when saved.

    Args:
        model: Any model.

    Raises:
        ValueError: If it carries an adapter.
    """
    if hasattr(model, "peft_config"):
        msg = (
            f"The {type(model).__name__} carries an adapter already. Merge it with merge_and_unload(), save "
            "the result with save_pretrained, and load that."
        )
        raise ValueError(msg)


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy the weights that fine-tuning changes.

    Args:
        model: Model after `make_trainable`.

    Returns:
        Name -> detached copy of each parameter that requires a gradient.
    """
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def save_adapter(
    model: Any, folder: str | Path, *, tokenizer: Any = None, base_model: str | Path | None = None
) -> None:
    """Save a fine-tuned model: the adapter alone for LoRA, else all weights.

    Args:
        model: What `make_trainable` returned.
        folder: Where to.
        tokenizer: Saved beside a whole model; an adapter takes that of its base.
        base_model: Path or Hub id that the adapter is to name as its base; default where the base was loaded
            from. Name the Hub id before an adapter is pushed.

    Raises:
        ValueError: If it is not known where the base of an adapter is, or the folder of the base holds other
            weights than the base in memory.
    """
    folder = Path(folder)
    if not hasattr(model, "peft_config"):
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return
    for settings in model.peft_config.values():
        base = str(base_model or settings.base_model_name_or_path or "")
        if not base:
            msg = (
                "An adapter needs to say where its base is, and this base was never loaded from anywhere. "
                "Save it with save_pretrained and pass that folder, or its Hub id, as base_model=..."
            )
            raise ValueError(msg)
        # A relative path would be looked up on the Hub from any other folder.
        is_local = Path(base).is_dir()
        if is_local:
            _check_base(model, Path(base))
        settings.base_model_name_or_path = str(Path(base).resolve()) if is_local else base
    model.save_pretrained(folder)
    # Of a base with its own code PEFT notes a module that exists in this process only.
    saved = json.loads((folder / ADAPTER_FILE).read_text("utf-8"))
    if "transformers_modules" in str(saved.get("auto_mapping")):
        text = json.dumps(saved | {"auto_mapping": None}, indent=2, sort_keys=True)
        (folder / ADAPTER_FILE).write_text(text, "utf-8")
    # PEFT's own card names local paths and leaves the rest to be filled in.
    named = "" if is_local else f"base_model: {base}\n"
    (folder / "README.md").write_text(ADAPTER_CARD.format(base_model=named), encoding="utf-8")


def load_adapter(
    name_or_folder: str | Path,
    *,
    auto_class: Any = AutoModel,
    wrap: Callable[[Any], nn.Module] | None = None,
    base_model: str | Path | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> Any:
    """Load an adapter over its base.

    Args:
        name_or_folder: Folder that `save_adapter` wrote, or its Hub id.
        auto_class: What the base is loaded as: ``AutoModelForMaskedLM`` for an adapter of integration, else
            the encoder, ``AutoModel``.
        wrap: Makes of the base the model that was fine-tuned, such as `with_delta_decoder`; its head is drawn
            first, then replaced by the adapter's. Default the base itself.
        base_model: Path or Hub id of the base, if it is no longer where the adapter says.
        revision: Branch, tag or commit of the adapter on the Hub. That of the base is the one which the
            adapter names.
        **kwargs: For ``from_pretrained`` of the base: ``trust_remote_code``, ``dtype``.

    Returns:
        The `peft.PeftModel` in evaluation mode.

    Raises:
        FileNotFoundError: If there is no adapter, or its base is not where it says.
        ValueError: If weights are missing or left over in the model that ``auto_class`` and ``wrap`` make.
            A head that the adapter never had is not noticed: it stays as it was drawn.
    """
    from peft import PeftModel, get_peft_model_state_dict

    adapter_file = find_saved_file(name_or_folder, ADAPTER_FILE, revision)
    if adapter_file is None:
        msg = f"{name_or_folder} holds no {ADAPTER_FILE}: load a whole model with from_pretrained."
        raise FileNotFoundError(msg)
    base = base_of(name_or_folder, base_model=base_model, revision=revision)
    settings = json.loads(Path(adapter_file).read_text("utf-8"))
    base_revision = settings.get("revision") if base_model is None else None
    with torch.random.fork_rng(devices=[]):
        model = auto_class.from_pretrained(base, revision=base_revision, **kwargs)
        model = model if wrap is None else wrap(model)
    adapted = PeftModel.from_pretrained(model, str(name_or_folder), revision=revision)
    # PEFT only warns of what is missing, and says nothing of what is left over.
    weights = find_saved_file(name_or_folder, ADAPTER_WEIGHTS, revision)
    saved = set() if weights is None else set(load_file(weights))
    differing = saved ^ set(get_peft_model_state_dict(adapted))
    if differing:
        msg = (
            f"The adapter {name_or_folder} does not fit a {type(model).__name__}: {len(differing)} weights "
            f"are missing or left over, such as {min(differing)}. Pass as auto_class and wrap what made the "
            "model that was fine-tuned."
        )
        raise ValueError(msg)
    return adapted.eval()


def base_of(
    name_or_folder: str | Path, *, base_model: str | Path | None = None, revision: str | None = None
) -> str:
    """Say where weights and tokenizer of a fine-tuned model are: beside it, or in the base of its adapter.

    Args:
        name_or_folder: Folder that `save_adapter` wrote, or its Hub id.
        base_model: Path or Hub id of the base, if it is no longer where the adapter says.
        revision: Branch, tag or commit of it on the Hub.

    Returns:
        Path or Hub id for ``from_pretrained``.

    Raises:
        FileNotFoundError: If an adapter names a base by a path that is not there.
    """
    adapter_file = find_saved_file(name_or_folder, ADAPTER_FILE, revision)
    if adapter_file is None:
        return str(name_or_folder)
    if base_model is not None:
        return str(base_model)
    base = json.loads(Path(adapter_file).read_text("utf-8"))["base_model_name_or_path"]
    if Path(base).is_absolute() and not Path(base).is_dir():
        msg = f"The adapter {name_or_folder} stands on {base}, which is not there. Pass base_model=..."
        raise FileNotFoundError(msg)
    return str(base)


def find_saved_file(name_or_folder: str | Path, file_name: str, revision: str | None = None) -> str | None:
    """Find a file of a saved model in its folder, or on the Hub where there is no such folder.

    Args:
        name_or_folder: Folder or Hub id.
        file_name: Name of the file.
        revision: Branch, tag or commit on the Hub.

    Returns:
        Its path, or None.
    """
    if Path(name_or_folder).is_dir():
        path = Path(name_or_folder) / file_name
        return str(path) if path.is_file() else None
    return cached_file(
        str(name_or_folder), file_name, revision=revision, _raise_exceptions_for_missing_entries=False
    )


def _check_base(model: Any, folder: Path) -> None:
    """Refuse a folder of a base whose weights are not those that the adapter was trained over."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        msg = f"{folder} holds no weights (*.safetensors), and an adapter names it as its base."
        raise ValueError(msg)
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    encoder = model.get_base_model().base_model
    prefix = f"{encoder.base_model_prefix}."
    differing = []
    for name, tensor in encoder.state_dict().items():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        name = name.replace(".base_layer", "").replace(".original_module", "")
        other = saved.get(prefix + name, saved.get(name))
        if other is None or not torch.equal(other.to(tensor.dtype), tensor.cpu()):
            differing.append(name)
    if differing:
        msg = (
            f"The base in {folder} differs in {len(differing)} weights ({', '.join(differing[:3])}) from the "
            "one the adapter was trained over. Save that one with save_pretrained and pass its folder as "
            "base_model=..."
        )
        raise ValueError(msg)


def _is_named(part: str, name: str) -> bool:
    return part == name or part.endswith(f".{name}")


def _with_lora(
    model: Any, rank: int, alpha: int, dropout: float, modules_to_save: Sequence[str]
) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        msg = f"lora_rank must be at least 1, got {rank}."
        raise ValueError(msg)
    if alpha <= 0 or not 0.0 <= dropout < 1.0:
        msg = f"lora_alpha must be positive and lora_dropout lie in [0, 1), got {alpha} and {dropout}."
        raise ValueError(msg)
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(LORA_TARGET_MODULES),
        modules_to_save=list(modules_to_save) or None,
        task_type="SEQ_CLS" if is_classifier else None,
    )
    return get_peft_model(model, settings)
