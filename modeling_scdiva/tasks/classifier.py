"""A classifier of cells made from any scDiVa model, its weighted loss, and its logits.

Notable choices:
- The model that comes in stays as it is: its encoder is copied.
- The classifier is of the same code as the encoder, also where that came with a checkpoint
  (``trust_remote_code``).

Dimensions: N cells, B cells in a loader batch, C classes.
Source: METHOD.md section 7.
"""

import copy
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_scdiva.adapters import refuse_adapter
from modeling_scdiva.pretrained_scdiva import evaluation_mode
from modeling_scdiva.tasks.cells import TokenizedCells, encoder_of, length_batches


def make_classifier(model: PreTrainedModel, label_names: Sequence[str]) -> PreTrainedModel:
    """Copy the encoder of a model into a classifier with a fresh head.

    Args:
        model: A scDiVa model of any class, also one loaded with ``trust_remote_code``.
        label_names: Names of the C classes, stored in ``config.id2label``.

    Returns:
        `ScDivaForSequenceClassification` of the same code, on the same device and in the same dtype. It
        remembers where the model came from, which an adapter refers to. A model that carries an adapter
        raises ``ValueError``.
    """
    refuse_adapter(model)
    encoder = encoder_of(model)
    config = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(map(str, label_names)))
    config.label2id = {name: index for index, name in config.id2label.items()}
    # The class beside the encoder's own: code that came with a checkpoint stays with it.
    classifier: Any = sys.modules[type(encoder).__module__].ScDivaForSequenceClassification(config)
    classifier.model.load_state_dict(encoder.state_dict())
    return classifier.to(device=encoder.device, dtype=encoder.dtype)


def encode_labels(labels: np.ndarray, names: Sequence[str] | np.ndarray) -> np.ndarray:
    """Number the classes of cells (N,) by their place in ``names``; -1 for one that is not there."""
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers.get(str(label), -1) for label in labels], dtype=np.int64)


def predict_logits(
    model: Any, cells: TokenizedCells, rows: np.ndarray, *, batch_size: int = 64, show_progress: bool = False
) -> np.ndarray:
    """Run a classifier over cells.

    Args:
        model: The classifier, with or without adapters; runs where it is, in evaluation mode.
        cells: Tokenised cells.
        rows: (n,) which of them.
        batch_size: Cells in one forward pass.
        show_progress: Show a progress bar.

    Returns:
        (n, C) float32 logits.

    Raises:
        FloatingPointError: If a logit is not finite.
    """
    rows = np.asarray(rows)
    logits = np.empty((len(rows), len(model.config.id2label)), dtype=np.float32)
    device = next(model.parameters()).device
    bar = tqdm(total=len(rows), unit=" cells", desc="Annotating", disable=not show_progress)
    with bar, evaluation_mode(model), torch.inference_mode():
        for chosen in length_batches(cells.n_genes[rows], batch_size):
            inputs = {name: tensor.to(device) for name, tensor in cells.batch(rows[chosen]).items()}
            logits[chosen] = model(**inputs).logits.float().cpu().numpy()
            bar.update(len(chosen))
    if not np.isfinite(logits).all():
        n_broken = int((~np.isfinite(logits)).any(axis=1).sum())
        msg = f"{n_broken} of {len(rows)} cells have logits that are not finite. Load the model in float32."
        raise FloatingPointError(msg)
    return logits


class WeightedClassifier(nn.Module):
    """A classifier with cross-entropy that may weigh the classes.

    The loss is the mean over cells of weight times cross-entropy. It is not divided by the weights of the
    batch: how cells are dealt out to processes would change what is trained.

    Args:
        model: The classifier.
        class_weights: (C,) weights whose mean over the training cells is one; None weighs all alike.
    """

    class_weights: torch.Tensor | None

    def __init__(self, model: nn.Module, class_weights: torch.Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, labels: torch.Tensor, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the loss and the logits (B, C) for ``labels`` (B,) int64."""
        logits = self.model(**inputs).logits.float()
        losses = functional.cross_entropy(logits, labels, weight=self.class_weights, reduction="none")
        return {"loss": losses.mean(), "logits": logits}
