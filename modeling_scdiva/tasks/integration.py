"""Batch integration: fine-tune the encoder until its cell embedding tells types apart and batches no longer.

Three losses on two corruptions of each cell (genes masked, depth scaled down): the checkpoint's own masked
diffusion loss; the cross-entropy of a batch discriminator behind a gradient reversal, so that the encoder
unlearns what the discriminator finds; and a contrastive loss.

Notable choices:
- ``label_free`` (default): the two corruptions of one cell are each other's positive (NT-Xent). No label is
  read, early stopping included. ``label_informed``: all corruptions of all cells of one type are positives
  (SupCon). Scores on the labels that were trained on then say nothing about integration, so this mode is
  named in ``obsm``, in ``uns`` and in every table.
- Early stopping looks at held-out cells and at what the encoder itself minimises: reconstruction, contrast,
  and the information about the batch that the discriminator still finds, log p(batch | cell) above chance.
- Where batch and type go together, no method can take the one away and keep the other.

Dimensions: N cells, D width.
Source: METHOD.md section 7.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from modeling_scdiva.adapters import Trainable, make_trainable
from modeling_scdiva.finetuning import finetune
from modeling_scdiva.pretrained_scdiva import evaluation_mode
from modeling_scdiva.tasks.cells import (
    CellTokenizer,
    check_vocabulary,
    obs_column,
    read_cells,
    refuse_path,
    shown,
)
from modeling_scdiva.tasks.embedding import embed_cells
from modeling_scdiva.tasks.integration_network import (
    VALIDATION_STREAM,
    CellViews,
    IntegrationArguments,
    IntegrationModel,
)

Mode = Literal["label_free", "label_informed"]
# Where the embedding goes: labels that were seen are named in the key, too.
INTEGRATED_KEYS = {
    "label_free": "X_scdiva_integrated",
    "label_informed": "X_scdiva_integrated_label_informed",
}


@dataclass(frozen=True)
class IntegratedCells:
    """What `integrate_batches` returns.

    Attributes:
        embeddings: (N, D) float32, also in ``obsm[obsm_key]``.
        obsm_key: "X_scdiva_integrated", for the label-informed mode with "_label_informed" behind it.
        model: The trained model, for `embed_cells` of further cells or `save_adapter`.
        history: One mapping per epoch with the mean of each loss and the score.
    """

    embeddings: np.ndarray
    obsm_key: str
    model: nn.Module
    history: list[dict[str, float]]


def integrate_batches(
    adata: Any,
    *,
    model: Any,
    tokenizer: CellTokenizer,
    batch_key: str,
    label_key: str | None = None,
    mode: Mode = "label_free",
    trainable: Trainable = "lora",
    arguments: IntegrationArguments | None = None,
    **reading: Any,
) -> IntegratedCells:
    """Fine-tune a copy of the model on these cells and embed them, technical batches mixed.

    Writes ``obsm["X_scdiva_integrated"]`` or, for the label-informed mode,
    ``obsm["X_scdiva_integrated_label_informed"]``, and ``uns["scdiva"]["integration"]``: mode, keys,
    arguments, versions. A path instead of an AnnData raises ``TypeError``, a missing column ``KeyError``;
    mode, labels or ``trainable`` that do not fit together, one batch or one type only, or a tokenizer of
    another vocabulary, ``ValueError``.

    Args:
        adata: AnnData with N cells of at least two batches.
        model: `ScDivaForMaskedDiffusion` checkpoint; it stays as it is.
        tokenizer: The tokenizer of this model.
        batch_key: Column of ``obs`` with the technical batch.
        label_key: Column of ``obs`` with cell types; for the label-informed mode only.
        mode: "label_free" or "label_informed".
        trainable: "lora", "full" or "last_layers".
        arguments: Numbers of the run, its seed among them.
        **reading: How to read the AnnData, as in `ScDivaTokenizer.iter_cells`, and ``show_progress``.

    Returns:
        The embedding, the trained model and the log.
    """
    arguments = IntegrationArguments() if arguments is None else arguments
    show_progress = bool(reading.pop("show_progress", True))
    refuse_path(adata)
    _check_request(model, label_key, mode, trainable, reading)
    check_vocabulary(model, tokenizer)
    batch_codes = _batch_codes(obs_column(adata, batch_key, what="technical batches"), batch_key)
    contrast_codes = np.arange(adata.n_obs)
    if label_key is not None:
        labels = obs_column(adata, label_key, what="cell types")
        contrast_codes = _contrast_codes(labels, label_key, arguments.unlabeled_category)
    cells = read_cells(adata, tokenizer=tokenizer, max_genes=arguments.max_genes, **reading)
    views = CellViews(cells, batch_codes, contrast_codes, model.config.mask_token_id, arguments)

    with _seeded(arguments.seed):
        backbone: Any = make_trainable(
            copy.deepcopy(model),
            trainable,
            lora_rank=arguments.lora_rank,
            n_last_layers=arguments.n_last_layers,
        )
        network = IntegrationModel(
            backbone, hidden_size=model.config.hidden_size, n_batches=int(batch_codes.max()) + 1,
            arguments=arguments,
        )  # fmt: skip
        history = _train(network, views, show_progress)
    embeddings = embed_cells(
        adata, model=backbone, tokenizer=tokenizer, max_genes=arguments.max_genes, pooling=arguments.pooling,
        show_progress=show_progress, **reading,
    )  # fmt: skip
    backbone.eval()
    key = INTEGRATED_KEYS[mode]
    adata.obsm[key] = embeddings
    adata.uns["scdiva"] = dict(adata.uns.get("scdiva", {})) | {
        "integration": {
            "mode": mode,
            "labels_seen": mode == "label_informed",
            "label_key": label_key or "none",
            "batch_key": batch_key,
            "obsm_key": key,
            "trainable": trainable,
            "n_epochs_run": len(history),
        }
        | _provenance(model, arguments, reading)
    }
    return IntegratedCells(embeddings, key, backbone, history)


def _train(network: IntegrationModel, views: CellViews, show_progress: bool) -> list[dict[str, float]]:  # noqa: FBT001
    arguments = views.arguments
    order = np.random.default_rng(arguments.seed).permutation(views.cells.n_cells)
    n_held_out = round(arguments.validation_fraction * len(order))
    # Held-out cells stay shuffled: batches that lie together in the file would each be standardised away.
    held_out, trained = order[:n_held_out], np.sort(order[n_held_out:])

    def make_batch(rows: np.ndarray, epoch: int) -> dict[str, torch.Tensor]:
        return views.batch(trained[rows], epoch)

    return finetune(
        network,
        n_examples=len(trained),
        make_batch=make_batch,
        arguments=arguments,
        validate=_validation(network, views, held_out) if n_held_out else None,
        show_progress=show_progress,
    )


def _validation(network: IntegrationModel, views: CellViews, held_out: np.ndarray) -> Callable[[], float]:
    """Return a function that gives minus what the encoder minimises, on held-out cells."""
    arguments = views.arguments
    shares = np.bincount(views.batch_codes[held_out]) / len(held_out)
    entropy = float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())

    def validate() -> float:
        device = next(network.parameters()).device
        sums = dict.fromkeys(("reconstruction_loss", "adversarial_loss", "contrastive_loss"), 0.0)
        with evaluation_mode(network), torch.inference_mode():
            for start in range(0, len(held_out), arguments.batch_size):
                rows = held_out[start : start + arguments.batch_size]
                inputs = views.batch(rows, VALIDATION_STREAM)
                losses = network(**{name: tensor.to(device) for name, tensor in inputs.items()})
                for name in sums:
                    sums[name] += float(losses[name]) * len(rows) / len(held_out)
        batch_information = max(0.0, entropy - sums["adversarial_loss"])  # nats
        return -(
            arguments.reconstruction_weight * sums["reconstruction_loss"]
            + arguments.adversarial_weight * batch_information
            + arguments.contrastive_weight * sums["contrastive_loss"]
        )

    return validate


def _check_request(
    model: Any, label_key: str | None, mode: str, trainable: str, reading: Mapping[str, Any]
) -> None:
    if "max_genes" in reading:
        msg = "max_genes belongs to the run: arguments=IntegrationArguments(max_genes=...)."
        raise TypeError(msg)
    if mode not in INTEGRATED_KEYS:
        msg = f"mode must be one of {', '.join(INTEGRATED_KEYS)}, got {mode!r}."
        raise ValueError(msg)
    if mode == "label_informed" and label_key is None:
        msg = 'mode="label_informed" trains on cell types; name their column as label_key.'
        raise ValueError(msg)
    if mode == "label_free" and label_key is not None:
        msg = (
            f'label_key={label_key!r} came with mode="label_free", which never reads labels. Leave label_key '
            'out, or say mode="label_informed".'
        )
        raise ValueError(msg)
    if trainable == "head":
        msg = 'trainable="head" leaves the encoder, and so the embedding, as it is; use "lora" or "full".'
        raise ValueError(msg)
    if not hasattr(model, "lm_head"):
        msg = (
            f"Integration trains with the diffusion loss, and {type(model).__name__} has no diffusion heads. "
            "Load the checkpoint with AutoModelForMaskedLM or ScDivaForMaskedDiffusion."
        )
        raise ValueError(msg)


def _batch_codes(batches: np.ndarray, batch_key: str) -> np.ndarray:
    names, codes = np.unique(batches.astype(str), return_inverse=True)
    if len(names) < 2:
        msg = f"obs[{batch_key!r}] has one batch only ({shown(names)}); there is nothing to integrate."
        raise ValueError(msg)
    return codes.astype(np.int64)


def _contrast_codes(labels: np.ndarray, label_key: str, unlabeled_category: str) -> np.ndarray:
    names, codes = np.unique(labels.astype(str), return_inverse=True)
    is_unlabelled = labels == unlabeled_category
    n_types = len(names) - int(unlabeled_category in names)
    if n_types < 2:
        msg = (
            f"obs[{label_key!r}] has {n_types} cell type besides {unlabeled_category!r} ({shown(names)}); "
            'label-informed integration needs two. Use mode="label_free".'
        )
        raise ValueError(msg)
    return np.where(is_unlabelled, len(names) + np.arange(len(labels)), codes).astype(np.int64)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch for what draws from its global generators (initialisation, dropout), and put them back."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _provenance(model: Any, arguments: IntegrationArguments, reading: dict[str, Any]) -> dict[str, Any]:
    """Say what ran, in types that an h5ad file holds; of a checkpoint's path the last part only."""
    return {
        "arguments": _storable(asdict(arguments)),
        "reading": _storable(reading),
        "checkpoint": Path(str(getattr(model.config, "_name_or_path", "") or "not named")).name,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
    }


def _storable(settings: dict[str, Any]) -> dict[str, Any]:
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return {
        key: value if isinstance(value, bool | int | float | str | list) else str(value)
        for key, value in plain.items()
    }
