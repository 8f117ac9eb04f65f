"""In-silico perturbation without training: set genes off or up, hide some others, look what changes.

Every cell is read twice with the same genes hidden, once as it is and once with the genes clamped; the change
of a gene is the difference of the two predictions. Random genes of similar detection, clamped alike, say how
large such differences are for no particular reason. What this finds is what the model associates with a gene;
it is a hypothesis about cause, no measurement.

Notable choices:
- "Off" takes the token away (a silent gene has none), or keeps it with the value 0. "Up" raises the value to
  that of strongly expressing cells and moves the gene to its new rank.
- Only cells that the clamp changes take part: a gene cannot be switched off where it is silent.
- A random set has its own control run, because its genes may not be hidden either.
- With a gene-query decoder any gene is read out of the cell embedding. Without one, hidden genes are read at
  their slots; neighbours in rank bound the values there, so changes are small.

Dimensions: N cells, B cells in a loader batch, S positions, V vocabulary, G genes read out.
Source: METHOD.md sections 5 and 7; Theodoris et al. 2023 for deleting tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy import stats
from tqdm import tqdm

from modeling_scdiva.pretrained_scdiva import evaluation_mode
from modeling_scdiva.tasks.cells import (
    CellTokenizer,
    TokenizedCells,
    check_vocabulary,
    length_batches,
    read_cells,
    refuse_path,
    shown,
)
from modeling_scdiva.tasks.genes import asked_tokens, gene_tokens

READOUTS = ("auto", "slots", "decoder")
# Random genes are drawn from this many that are detected about as often.
N_MATCHED_GENES = 50
# "Up" means the value that this share of the expressing cells stays below.
UP_QUANTILE = 0.95


@dataclass(frozen=True)
class ClampSettings:
    """How genes are clamped and what is compared.

    Attributes:
        off_mode: "remove" takes the token of a gene away, "zero" keeps it with the value 0.
        up_value: log1p value to which genes are raised; default that of strongly expressing cells here.
        hidden_fraction: Share of the other genes that are hidden and predicted anew, in (0, 1).
        n_masks: Draws of hidden genes for each cell.
        n_random_sets: Sets of random genes; with n of them no p-value is below 1 / (n + 1).
        readout: "decoder" asks the gene-query decoder, "slots" reads hidden genes at their positions, "auto"
            takes the decoder where the model has one.
        batch_size: Cells in one forward pass.
        seed: Of hidden genes and random sets.
    """

    off_mode: Literal["remove", "zero"] = "remove"
    up_value: float | None = None
    hidden_fraction: float = 0.5
    n_masks: int = 1
    n_random_sets: int = 20
    readout: Literal["auto", "slots", "decoder"] = "auto"
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.off_mode not in ("remove", "zero"):
            msg = f'off_mode must be "remove" or "zero", got {self.off_mode!r}.'
            raise ValueError(msg)
        if self.readout not in READOUTS:
            msg = f"readout must be one of {', '.join(READOUTS)}, got {self.readout!r}."
            raise ValueError(msg)
        if not 0.0 < self.hidden_fraction < 1.0:
            msg = f"hidden_fraction must lie in (0, 1), got {self.hidden_fraction}."
            raise ValueError(msg)
        if self.up_value is not None and not 0.0 < self.up_value < np.inf:
            msg = f"up_value must be a log1p value above 0, got {self.up_value}."
            raise ValueError(msg)
        for name, least in (("n_masks", 1), ("n_random_sets", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                msg = f"{name} must be at least {least}, got {getattr(self, name)}."
                raise ValueError(msg)


@dataclass(frozen=True)
class ClampedGenes:
    """What clamping changed.

    Attributes:
        effects: One row per gene read out (index: gene id): ``gene_symbols``; ``expression_delta``, mean
            change of the predicted log1p value; ``random_mean`` and ``random_sd`` of the random sets;
            ``z_score``; ``p_value``, two-sided against the random sets; ``fdr``, Benjamini-Hochberg;
            ``n_readouts``. NaN where a gene was not read out often enough.
        embedding_shift: Mean cosine distance that the cell embedding moves.
        random_embedding_shifts: (n_random_sets,) the same of the random sets.
        embedding_p_value: Share of the random sets that move it as far.
        n_cells: Cells that the clamp changes.
        random_sets: Gene ids of each random set.
        readout: "slots" or "decoder".
    """

    effects: pd.DataFrame
    embedding_shift: float
    random_embedding_shifts: np.ndarray
    embedding_p_value: float
    n_cells: int
    random_sets: list[list[str]]
    readout: str


@dataclass(frozen=True)
class _Clamp:
    """Genes to switch off, and genes to raise with the value they get."""

    off: np.ndarray
    up: Mapping[int, float]

    @property
    def genes(self) -> np.ndarray:
        return np.concatenate([self.off, np.array(list(self.up), dtype=np.int64)]).astype(np.int64)


def clamp_genes(
    adata: Any,
    *,
    model: Any,
    tokenizer: CellTokenizer,
    off: Sequence[str] = (),
    up: Sequence[str] = (),
    genes: Sequence[str] | None = None,
    settings: ClampSettings | None = None,
    show_progress: bool = True,
    **reading: Any,
) -> ClampedGenes:
    """Switch genes off or up in cells and predict what changes, against random genes.

    Args:
        adata: AnnData of cells, unperturbed ones as a rule.
        model: `ScDivaForMaskedDiffusion`, pretrained; nothing is trained.
        tokenizer: The tokenizer of this model.
        off: Genes to switch off together, ids or symbols.
        up: Genes to raise together.
        genes: Genes to read out; default all that these cells express.
        settings: How to clamp and compare.
        show_progress: Show a progress bar.
        **reading: How to read the AnnData, as in `ScDivaTokenizer.iter_cells`.

    Returns:
        The changes of the genes and of the cell embedding.

    Raises:
        TypeError: If the model cannot predict values.
        ValueError: If no gene is clamped, one is clamped both ways, or no cell is changed.
    """
    refuse_path(adata)
    if not hasattr(model, "predict_expression"):
        msg = f"Clamping needs ScDivaForMaskedDiffusion, which predicts values; got {type(model).__name__}."
        raise TypeError(msg)
    check_vocabulary(model, tokenizer)
    settings = ClampSettings() if settings is None else settings
    vocabulary = tokenizer.vocabulary
    off_ids = np.unique(gene_tokens(off, vocabulary=vocabulary, what="genes to switch off"))
    up_ids = np.unique(gene_tokens(up, vocabulary=vocabulary, what="genes to raise"))
    both = [vocabulary.gene_symbols[token] for token in np.intersect1d(off_ids, up_ids)]
    if both or not len(off_ids) + len(up_ids):
        wrong = f"{shown(both)} in both" if both else "none"
        msg = f"Name genes in off=[...] or up=[...], each in one of them; got {wrong}."
        raise ValueError(msg)
    cells = read_cells(adata, tokenizer=tokenizer, **reading)
    asked = np.unique(cells.token_ids)
    if genes is not None:
        asked = asked_tokens(genes, vocabulary=vocabulary, what="genes to read out")
    clamp = _Clamp(off_ids, {int(gene): _up_value(cells, gene, settings) for gene in up_ids})
    runner = _Runner(model, tokenizer, cells, asked, settings)
    rng = np.random.default_rng((settings.seed, 1))
    sets = [_random_clamp(cells, clamp, settings, rng) for _ in range(settings.n_random_sets)]
    n_cells = len(runner.changed_cells(clamp))
    if n_cells == 0:
        names = [vocabulary.gene_symbols[token] for token in clamp.genes]
        msg = (
            f"None of the {cells.n_cells} cells is changed: {shown(names)} are silent in all of them, or "
            "cut from their tokens. Choose cells that express the genes, or raise max_genes."
        )
        raise ValueError(msg)
    found = [
        runner.compare(chosen)
        for chosen in tqdm([clamp, *sets], unit=" gene sets", desc="Clamping", disable=not show_progress)
    ]
    random_shifts = np.array([shift for _, _, shift in found[1:]])
    return ClampedGenes(
        effects=_effects(found, asked, clamp, vocabulary),
        embedding_shift=found[0][2],
        random_embedding_shifts=random_shifts,
        embedding_p_value=float((1 + (random_shifts >= found[0][2]).sum()) / (1 + len(random_shifts))),
        n_cells=n_cells,
        random_sets=[[vocabulary.gene_ids[token] for token in chosen.genes] for chosen in sets],
        readout=runner.readout,
    )


class _Runner:
    """Reads cells with and without a clamp and sums up the differences."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        cells: TokenizedCells,
        asked: np.ndarray,
        settings: ClampSettings,
    ) -> None:
        self.model, self.cells, self.asked, self.settings = model, cells, asked, settings
        self.weights = None if tokenizer.gene_order == "random" else tokenizer.ranking_weights
        has_decoder = getattr(model, "query_decoder", None) is not None
        if settings.readout == "decoder" and not has_decoder:
            msg = 'This model has no gene-query decoder. Use readout="slots", or "auto".'
            raise ValueError(msg)
        self.readout = "decoder" if has_decoder and settings.readout != "slots" else "slots"
        self.place_of = np.full(model.config.vocab_size, -1)
        self.place_of[asked] = np.arange(len(asked))

    def cell(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and values of a cell."""
        entries = slice(self.cells.offsets[row], self.cells.offsets[row + 1])
        return self.cells.token_ids[entries], self.cells.values[entries]

    def clamped(self, row: int, clamp: _Clamp) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and values of a cell with genes clamped, in their new ranking order."""
        tokens, values = self.cell(row)
        is_off = np.isin(tokens, clamp.off)
        if self.settings.off_mode == "remove":
            tokens, values = tokens[~is_off], values[~is_off].copy()
        else:
            values = np.where(is_off, np.float32(0.0), values)
        for gene, value in clamp.up.items():
            places = np.flatnonzero(tokens == gene)
            if len(places):
                values[places] = np.maximum(values[places], value)
            else:
                tokens, values = np.append(tokens, gene), np.append(values, np.float32(value))
        if self.weights is not None:
            order = np.lexsort((tokens, -(values / self.weights[tokens])))
            tokens, values = tokens[order], values[order]
        return tokens, values

    def changed_cells(self, clamp: _Clamp) -> np.ndarray:
        """Rows of the cells that the clamp changes."""
        changed = []
        for row in range(self.cells.n_cells):
            tokens, values = self.cell(row)
            is_raised = any(
                not (values[tokens == gene] >= np.float32(value)).any() for gene, value in clamp.up.items()
            )
            if is_raised or np.isin(tokens, clamp.off).any():
                changed.append(row)
        return np.array(changed, dtype=np.int64)

    def compare(self, clamp: _Clamp) -> tuple[np.ndarray, np.ndarray, float]:
        """Sum the changes of the genes (G,), count them (G,), and average the shift of the embedding."""
        total, number = np.zeros(len(self.asked)), np.zeros(len(self.asked), dtype=np.int64)
        shifts = []
        changed = self.changed_cells(clamp)
        for draw in range(self.settings.n_masks):
            for places in length_batches(self.cells.n_genes[changed], self.settings.batch_size):
                rows = changed[places]
                hidden = [self._hidden(row, clamp, draw) for row in rows]
                controls = self._read([self.cell(row) for row in rows], hidden)
                clamped = self._read([self.clamped(row, clamp) for row in rows], hidden)
                difference = clamped[0] - controls[0]
                is_read = np.isfinite(difference)
                total += np.where(is_read, difference, 0.0).sum(axis=0)
                number += is_read.sum(axis=0)
                cosine = torch.nn.functional.cosine_similarity(clamped[1].double(), controls[1].double())
                shifts += (1.0 - cosine).tolist()
        return total, number, float(np.mean(shifts)) if shifts else 0.0

    def _hidden(self, row: int, clamp: _Clamp, draw: int) -> np.ndarray:
        """Tokens to hide in a cell: the same for every clamp, but for the clamped genes themselves."""
        tokens, _ = self.cell(row)
        rng = np.random.default_rng((self.settings.seed, 2, row, draw))
        is_hidden = rng.random(len(tokens)) < self.settings.hidden_fraction
        return np.setdiff1d(tokens[is_hidden], clamp.genes)

    def _read(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], hidden: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Predict genes (B, G) of cells, NaN where they are not read out, and embed the cells (B, D)."""
        lengths = np.array([len(tokens) for tokens, _ in pairs])
        cells = TokenizedCells(
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            token_ids=np.concatenate([tokens for tokens, _ in pairs]).astype(np.int64),
            values=np.concatenate([values for _, values in pairs]).astype(np.float32),
            lat_token_id=self.cells.lat_token_id,
            pad_token_id=self.cells.pad_token_id,
        )
        inputs = cells.batch(np.arange(len(pairs)))
        true_ids = inputs["input_ids"]
        is_hidden = torch.stack(
            [torch.isin(row, torch.from_numpy(own)) for row, own in zip(true_ids, hidden, strict=True)]
        )
        inputs["input_ids"] = true_ids.masked_fill(is_hidden, self.model.config.mask_token_id)
        device = self.model.device
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        with evaluation_mode(self.model), torch.inference_mode():
            states = self.model.model(**inputs).last_hidden_state  # (B, S, D)
            if self.readout == "decoder":
                queries = torch.from_numpy(self.asked).to(device)
                log_odds, values = self.model.decode_genes(states[:, 0], queries)
                read = (torch.sigmoid(log_odds) * values).double().cpu().numpy()
            else:
                values = self.model.predict_expression(states, true_ids.to(device)).double().cpu().numpy()
                read = np.full((len(pairs), len(self.asked)), np.nan)
                rows, places = np.nonzero(is_hidden.numpy())
                columns = self.place_of[true_ids.numpy()[rows, places]]
                is_asked = columns >= 0
                read[rows[is_asked], columns[is_asked]] = values[rows, places][is_asked]
        return read, states[:, 0].float().cpu()


def _up_value(cells: TokenizedCells, gene: int, settings: ClampSettings) -> float:
    """Value to which a gene is raised: that of cells which express it strongly, else any strong value."""
    if settings.up_value is not None:
        return settings.up_value
    own = cells.values[cells.token_ids == gene]
    return float(np.quantile(own if len(own) else cells.values, UP_QUANTILE))


def _random_clamp(
    cells: TokenizedCells, clamp: _Clamp, settings: ClampSettings, rng: np.random.Generator
) -> _Clamp:
    """Draw other genes that are detected in about as many cells, one for each clamped gene.

    Returns:
        A clamp of the same kind.

    Raises:
        ValueError: If the cells express too few other genes.
    """
    genes, n_cells = np.unique(cells.token_ids, return_counts=True)
    is_free = ~np.isin(genes, clamp.genes)
    genes, n_cells = genes[is_free], n_cells[is_free]
    if len(genes) < 2 * len(clamp.genes):
        msg = f"The cells express {len(genes)} other genes, too few for random sets of {len(clamp.genes)}."
        raise ValueError(msg)
    drawn: list[int] = []
    for gene in clamp.genes:
        distance = np.abs(n_cells - (cells.token_ids == gene).sum())
        distance = np.where(np.isin(genes, drawn), np.inf, distance)
        # Ties are many among rarely detected genes: broken at random, not by token.
        nearest = np.lexsort((rng.random(len(genes)), distance))[:N_MATCHED_GENES]
        nearest = nearest[np.isfinite(distance[nearest])]
        drawn.append(int(genes[rng.choice(nearest)]))
    n_off = len(clamp.off)
    up = {gene: _up_value(cells, gene, settings) for gene in drawn[n_off:]}
    return _Clamp(np.array(drawn[:n_off], dtype=np.int64), up)


def _effects(
    found: Sequence[tuple[np.ndarray, np.ndarray, float]], asked: np.ndarray, clamp: _Clamp, vocabulary: Any
) -> pd.DataFrame:
    """Compare the changes of the clamp with those of the random sets, gene by gene."""
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.stack([np.where(number > 0, total / number, np.nan) for total, number, _ in found])
        own, random = means[0], means[1:]
        n_random = np.isfinite(random).sum(axis=0)
        filled = np.where(np.isfinite(random), random, 0.0)
        random_mean = np.where(n_random > 0, filled.sum(axis=0) / n_random, np.nan)
        squares = np.where(np.isfinite(random), (random - random_mean) ** 2, 0.0).sum(axis=0)
        random_sd = np.where(n_random > 1, np.sqrt(squares / (n_random - 1)), np.nan)
        z_score = np.where(random_sd > 0, (own - random_mean) / random_sd, np.nan)
        is_as_far = np.abs(random) >= np.abs(own)
    p_value = (1 + is_as_far.sum(axis=0)) / (1 + n_random)
    is_tested = np.isfinite(own) & (n_random > 1) & ~np.isin(asked, clamp.genes)
    p_value = np.where(is_tested, p_value, np.nan)
    fdr = np.full(len(asked), np.nan)
    if is_tested.any():
        fdr[is_tested] = stats.false_discovery_control(p_value[is_tested])
    return pd.DataFrame(
        {
            "gene_symbols": [vocabulary.gene_symbols[token] for token in asked],
            "expression_delta": own,
            "random_mean": random_mean,
            "random_sd": random_sd,
            "z_score": np.where(is_tested, z_score, np.nan),
            "p_value": p_value,
            "fdr": fdr,
            "n_readouts": found[0][1],
        },
        index=pd.Index([vocabulary.gene_ids[token] for token in asked], name="gene_id"),
    )
