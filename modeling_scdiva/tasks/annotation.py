"""Cell types from a fine-tuned classifier: train one on labelled cells, name the types of new cells.

Notable choices:
- By default low-rank adapters (LoRA) on every layer and a new head are trained; "full", "last_layers" and
  "head" are arguments. The model that comes in is never changed: its weights are copied into the classifier.
- Validation cells come out of the given cells only, whole groups (donors, plates) where a column names them
  and there are enough. They choose the epoch (by macro-F1, then log-loss), the temperature and the threshold.
- Threshold: the lowest probability from which the accepted validation cells are right in the wanted share of
  cases, after temperature scaling. Below it a cell is `Unknown`. The epoch was chosen on the same cells, so
  the promise is slightly optimistic, and it holds for cells like these only.

Dimensions: N cells, B cells in a loader batch, C classes.
Source: METHOD.md section 7; Guo et al. 2017 for the temperature.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from scipy.special import log_softmax, softmax
from sklearn.metrics import f1_score
from transformers import PreTrainedModel

from modeling_scdiva.adapters import Trainable, make_trainable
from modeling_scdiva.finetuning import FinetuningArguments, finetune
from modeling_scdiva.metrics.calibration import choose_threshold, fit_temperature
from modeling_scdiva.splits import split_validation
from modeling_scdiva.tasks.cells import (
    CellTokenizer,
    TokenizedCells,
    check_vocabulary,
    obs_column,
    read_cells,
    refuse_path,
)
from modeling_scdiva.tasks.classifier import (
    WeightedClassifier,
    encode_labels,
    make_classifier,
    predict_logits,
)

logger = logging.getLogger(__name__)

UNKNOWN = "Unknown"
OBS_KEYS = ("scdiva_cell_type", "scdiva_cell_type_probability")
HEAD = "classifier"
# Weight of the log-loss beside macro-F1 when epochs are compared: it only decides between equals.
LOSS_IN_SCORE = 1e-3


@dataclass(frozen=True)
class AnnotatorSettings:
    """How an annotator is fine-tuned.

    Attributes:
        trainable: "lora", "full", "last_layers" or "head".
        lora_rank: Rank of the adapters.
        lora_alpha: Adapters are multiplied by ``lora_alpha / lora_rank``.
        lora_dropout: Dropout in front of the adapters.
        n_last_layers: Layers that "last_layers" trains; all where there are fewer.
        class_weights: "balanced" weighs every class alike in the loss, None every cell alike.
        group_key: Column of ``obs`` with donors or technical batches; validation takes whole groups where at
            least three are there and every type remains. None takes single cells.
        validation_fraction: Share of the cells, about, that validate.
        wanted_accuracy: Accuracy of accepted validation cells that the threshold is chosen for.
        hides_genes: Train on cells with a random share of their genes hidden, as in pretraining: for a
            classifier that guides generation (`Steering`) and must judge unfinished cells.
    """

    trainable: Trainable = "lora"
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    n_last_layers: int = 4
    class_weights: Literal["balanced"] | None = "balanced"
    group_key: str | None = None
    validation_fraction: float = 0.15
    wanted_accuracy: float = 0.95
    hides_genes: bool = False

    def __post_init__(self) -> None:
        if self.class_weights not in ("balanced", None):
            msg = f'class_weights must be "balanced" or None, got {self.class_weights!r}.'
            raise ValueError(msg)
        if not 0.0 < self.wanted_accuracy <= 1.0:
            msg = f"wanted_accuracy must lie in (0, 1], got {self.wanted_accuracy}."
            raise ValueError(msg)


@dataclass(frozen=True)
class AnnotationCalibration:
    """From when on a predicted type is believed.

    Attributes:
        temperature: Logits are divided by it.
        threshold: Types with a lower probability become `Unknown`.
        wanted_accuracy: What the threshold was chosen for.
        accuracy: Accuracy of the validation cells accepted at it.
        coverage: Share of the validation cells accepted at it.
        is_reached: Whether ``accuracy`` is the wanted one.
        n_cells: Validation cells.
    """

    temperature: float
    threshold: float
    wanted_accuracy: float
    accuracy: float
    coverage: float
    is_reached: bool
    n_cells: int


# For a classifier that comes without validation cells: probabilities as they are, every cell named.
UNCALIBRATED = AnnotationCalibration(1.0, 0.0, 0.0, 0.0, 1.0, is_reached=False, n_cells=0)


@dataclass
class CellAnnotator:
    """A classifier of cells with what belongs to it.

    Attributes:
        model: The classifier, with or without adapters; ``config.id2label`` names its classes.
        calibration: Temperature and threshold; None for a classifier that was never calibrated.
        max_genes: Genes of a cell it was trained with; None for the tokenizer's own number.
        history: One entry per epoch, of the losses and the validation score.
        facts: What it was trained on: settings and numbers of cells.
    """

    model: Any
    calibration: AnnotationCalibration | None = None
    max_genes: int | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def label_names(self) -> list[str]:
        """Names of the C classes, in the order of the logits."""
        names: Mapping[int, str] = self.model.config.id2label
        return [str(names[index]) for index in range(len(names))]


@dataclass(frozen=True)
class CellAnnotation:
    """Types of N cells.

    Attributes:
        predicted_cell_types: (N,) likeliest type, `Unknown` where its probability lies below the threshold.
        likeliest_cell_types: (N,) likeliest type in any case.
        probability: (N,) float32 probability of the likeliest type.
        probabilities: (N, C) float32 of all types.
        label_names: The C types.
        threshold: What was applied.
    """

    predicted_cell_types: np.ndarray
    likeliest_cell_types: np.ndarray
    probability: np.ndarray
    probabilities: np.ndarray
    label_names: list[str]
    threshold: float


def default_arguments(trainable: Trainable, **changes: Any) -> FinetuningArguments:
    """Give the run numbers that suit what is trained: new weights take a higher rate than pretrained ones.

    Args:
        trainable: As in `make_trainable`.
        **changes: Fields of `FinetuningArguments` to set otherwise.

    Returns:
        Run numbers.
    """
    learning_rate = 1e-3 if trainable in ("lora", "head") else 2e-4
    return FinetuningArguments(**({"learning_rate": learning_rate} | changes))


def finetune_annotator(
    adata: Any,
    *,
    model: PreTrainedModel,
    tokenizer: CellTokenizer,
    label_key: str,
    settings: AnnotatorSettings | None = None,
    arguments: FinetuningArguments | None = None,
    accelerator: Accelerator | None = None,
    show_progress: bool = True,
    **reading: Any,
) -> CellAnnotator:
    """Train a classifier of cell types.

    Args:
        adata: AnnData with N labelled cells.
        model: A pretrained scDiVa model of any class; it stays as it is.
        tokenizer: Its tokenizer.
        label_key: Column of ``obs`` with the cell types.
        settings: What is trained and how it is calibrated.
        arguments: Run numbers; default see `default_arguments`.
        accelerator: Where the run happens.
        show_progress: Show a progress bar.
        **reading: ``max_genes``, genes kept of a cell (default the tokenizer's), and how to read the AnnData,
            as in `ScDivaTokenizer.iter_cells`.

    Returns:
        The annotator with the weights of its best epoch.

    Raises:
        ValueError: If there is one type only, or one is called `Unknown`.
    """
    refuse_path(adata)
    settings = settings or AnnotatorSettings()
    arguments = arguments or default_arguments(settings.trainable)
    labels = obs_column(adata, label_key, what="cell types")
    groups = None
    if settings.group_key is not None:
        groups = obs_column(adata, settings.group_key, what="donors or technical batches")
    check_vocabulary(model, tokenizer)
    if UNKNOWN in _refuse_one_class(labels):
        msg = (
            f"{int((labels == UNKNOWN).sum())} cells have the type {UNKNOWN!r}, which is the answer for "
            "cells below the threshold. Leave them out, or give the type another name."
        )
        raise ValueError(msg)
    train, validation, kind = split_validation(
        labels, groups, fraction=settings.validation_fraction, seed=arguments.seed
    )
    reading = {"max_genes": tokenizer.max_genes} | reading
    cells = read_cells(adata, tokenizer=tokenizer, **reading)
    annotator = fit_annotator(
        cells,
        labels,
        rows=(train, validation),
        model=model,
        settings=settings,
        arguments=arguments,
        accelerator=accelerator,
        show_progress=show_progress,
    )
    reached = annotator.calibration
    if reached is not None and not reached.is_reached:
        logger.warning(
            "No threshold makes %.0f %% of the accepted validation cells right; %.3f is best, with %.0f %%.",
            100 * reached.wanted_accuracy, reached.threshold, 100 * reached.accuracy,
        )  # fmt: skip
    annotator.max_genes = reading["max_genes"]
    annotator.facts |= {"label_key": label_key, "validation_kind": kind}
    return annotator


def fit_annotator(
    cells: TokenizedCells,
    labels: Sequence[str] | np.ndarray,
    *,
    rows: tuple[np.ndarray, np.ndarray],
    model: PreTrainedModel,
    settings: AnnotatorSettings,
    arguments: FinetuningArguments,
    accelerator: Accelerator | None = None,
    show_progress: bool = True,
) -> CellAnnotator:
    """Train a classifier on some of the cells and calibrate it on others.

    Args:
        cells: N tokenised cells.
        labels: (N,) cell types; only those of ``rows`` are read.
        rows: Rows of training and rows of validation. Validation cells of a type that no training cell has
            count as wrong.
        model: As in `finetune_annotator`, and so is all that follows.
        settings: What is trained and how it is calibrated.
        arguments: Run numbers.
        accelerator: Where the run happens.
        show_progress: Show a progress bar.

    Returns:
        The annotator with the weights of its best epoch.
    """
    train, validation = rows
    labels = np.asarray(labels).astype(str)
    names = _refuse_one_class(labels[train])
    codes = encode_labels(labels, names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        classifier = make_classifier(model, names)
        n_layers = min(settings.n_last_layers, classifier.config.num_hidden_layers)
        trained = make_trainable(
            classifier,
            settings.trainable,
            lora_rank=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            n_last_layers=n_layers,
            modules_to_save=(HEAD,),
        )
    weights = None
    if settings.class_weights == "balanced":
        sizes = np.bincount(codes[train], minlength=len(names))
        weights = torch.tensor(len(train) / (len(names) * sizes), dtype=torch.float32)

    def make_batch(chosen: np.ndarray, epoch: int) -> dict[str, torch.Tensor]:
        inputs = cells.batch(train[chosen])
        if settings.hides_genes:  # otherwise the same input in every epoch
            rng = np.random.default_rng([arguments.seed, epoch, *chosen.tolist()])
            inputs = hide_genes(inputs, trained.config, rng)
        return inputs | {"labels": torch.from_numpy(codes[train[chosen]])}

    def validate() -> float:
        logits = predict_logits(trained, cells, validation, batch_size=2 * arguments.batch_size)
        return validation_score(logits, codes[validation])

    history = finetune(
        WeightedClassifier(trained, weights),
        n_examples=len(train),
        make_batch=make_batch,
        arguments=arguments,
        accelerator=accelerator,
        validate=validate,
        show_progress=show_progress,
    )
    logits = predict_logits(trained, cells, validation, batch_size=2 * arguments.batch_size)
    calibration = calibrate(logits, codes[validation], wanted_accuracy=settings.wanted_accuracy)
    facts: dict[str, Any] = {"n_train_cells": len(train), "n_validation_cells": len(validation)}
    facts |= {"settings": asdict(settings), "arguments": asdict(arguments)}
    return CellAnnotator(trained.eval(), calibration, history=history, facts=facts)


def hide_genes(
    inputs: dict[str, torch.Tensor], network: Any, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Hide each gene of a cell with a probability t of the cell's own, t uniform on (0, 1).

    Args:
        inputs: What `TokenizedCells.batch` returns.
        network: `ScDivaConfig`.
        rng: Source of randomness.

    Returns:
        Inputs with hidden genes and values.
    """
    ids = inputs["input_ids"]
    coins = torch.from_numpy(rng.random(ids.shape) < rng.random((len(ids), 1)))
    is_hidden = coins & (ids >= network.n_special_tokens)
    return inputs | {
        "input_ids": ids.masked_fill(is_hidden, network.mask_token_id),
        "expression_values": inputs["expression_values"].masked_fill(is_hidden, 0.0),
    }


def validation_score(logits: np.ndarray, codes: np.ndarray) -> float:
    """Score validation cells: macro-F1, and among equals the smaller log-loss.

    Args:
        logits: (n, C).
        codes: (n,) int true classes, -1 for one that is none of the C.

    Returns:
        Macro-F1 minus a thousandth of the mean log-loss in nats of the cells that have a class.
    """
    macro_f1 = f1_score(codes, logits.argmax(axis=1), average="macro", zero_division=0.0)
    known = np.flatnonzero(codes >= 0)
    loss = -log_softmax(logits[known].astype(np.float64), axis=1)[np.arange(len(known)), codes[known]]
    return float(macro_f1 - LOSS_IN_SCORE * (loss.mean() if len(known) else 0.0))


def annotate_cells(
    adata: Any,
    *,
    model: Any,
    tokenizer: CellTokenizer,
    threshold: float | None = None,
    batch_size: int = 64,
    write_obs: bool = False,
    show_progress: bool = True,
    **reading: Any,
) -> CellAnnotation:
    """Name the types of cells.

    Args:
        adata: AnnData with N cells.
        model: A `CellAnnotator`, or a bare classifier with named classes, which has no threshold of its own.
        tokenizer: Tokenizer of the model.
        threshold: Least probability of a type, in [0, 1]; default the annotator's, calibrated on its
            validation cells, or 0, which names every cell.
        batch_size: Cells in one forward pass.
        write_obs: Also write ``obs["scdiva_cell_type"]`` and ``obs["scdiva_cell_type_probability"]``.
        show_progress: Show a progress bar.
        **reading: ``max_genes`` (default the annotator's), and how to read the AnnData, as in
            `ScDivaTokenizer.iter_cells`.

    Returns:
        Types and probabilities, rows in the order of ``adata.obs_names``.

    Raises:
        ValueError: If the classes have no names, or ``threshold`` is out of range.
    """
    refuse_path(adata)
    annotator = model if isinstance(model, CellAnnotator) else CellAnnotator(model)
    names = annotator.label_names
    if all(name == f"LABEL_{index}" for index, name in enumerate(names)):
        msg = (
            f"The {len(names)} classes of the model have no names. Load it with load_annotator, or pass "
            "id2label={0: ...} to from_pretrained."
        )
        raise ValueError(msg)
    calibration = annotator.calibration or UNCALIBRATED
    threshold = calibration.threshold if threshold is None else threshold
    if not 0.0 <= threshold <= 1.0:
        msg = f"threshold must lie in [0, 1], got {threshold}."
        raise ValueError(msg)
    check_vocabulary(annotator.model, tokenizer)
    reading = {"max_genes": annotator.max_genes} | reading
    cells = read_cells(adata, tokenizer=tokenizer, **reading)
    logits = predict_logits(
        annotator.model, cells, np.arange(cells.n_cells), batch_size=batch_size, show_progress=show_progress
    )
    annotation = annotate_logits(logits, names, temperature=calibration.temperature, threshold=threshold)
    if write_obs:
        adata.obs[OBS_KEYS[0]] = annotation.predicted_cell_types.astype(str)
        adata.obs[OBS_KEYS[1]] = annotation.probability
    return annotation


def annotate_logits(
    logits: np.ndarray, label_names: Sequence[str], *, temperature: float = 1.0, threshold: float = 0.0
) -> CellAnnotation:
    """Turn logits into types.

    Args:
        logits: (N, C).
        label_names: The C types.
        temperature: Logits are divided by it.
        threshold: Types with a lower probability become `Unknown`.

    Returns:
        Types and probabilities.
    """
    probabilities = softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1)
    probability = probabilities.max(axis=1)
    likeliest = np.asarray(list(label_names), dtype=object)[probabilities.argmax(axis=1)]
    return CellAnnotation(
        predicted_cell_types=np.where(probability >= threshold, likeliest, UNKNOWN).astype(object),
        likeliest_cell_types=likeliest,
        probability=probability.astype(np.float32),
        probabilities=probabilities.astype(np.float32),
        label_names=list(label_names),
        threshold=threshold,
    )


def calibrate(logits: np.ndarray, codes: np.ndarray, *, wanted_accuracy: float) -> AnnotationCalibration:
    """Fit temperature and threshold to validation cells.

    Args:
        logits: (n, C) of validation cells.
        codes: (n,) int true classes, -1 for one that is none of the C.
        wanted_accuracy: Accuracy that the accepted cells are to have.

    Returns:
        Both, and what they achieve there.
    """
    temperature = fit_temperature(logits, codes)
    probabilities = softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1)
    is_correct = probabilities.argmax(axis=1) == codes
    chosen = choose_threshold(probabilities.max(axis=1), is_correct, wanted_accuracy=wanted_accuracy)
    return AnnotationCalibration(temperature=temperature, wanted_accuracy=wanted_accuracy, **chosen)


def _refuse_one_class(labels: np.ndarray) -> list[str]:
    names = sorted(set(map(str, labels)))
    if len(names) < 2:
        found = repr(names[0]) if names else "none"
        msg = f"The cells have one class only ({found}); at least two are needed to tell cells apart."
        raise ValueError(msg)
    return names
