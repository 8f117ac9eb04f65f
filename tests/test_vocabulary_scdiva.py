"""The vocabulary numbers genes behind the special tokens and survives its file unchanged, or says so.

Needs no data. Run: pytest tests/test_vocabulary_scdiva.py
"""

import hashlib
import json
import pickle

import numpy as np
import pytest

from tokenization_scdiva.vocabulary_scdiva import FORMAT_VERSION, SPECIAL_TOKENS, GeneVocabulary

IDS = ["ENSG00000000003", "ENSG00000000005", "ENSG00000000419", "XIST"]
SYMBOLS = ["TSPAN6", "TNMD", "DPM1", None]
ALIASES = {"TSPAN-6": "ENSG00000000003", "MPDS": "ENSG00000000419"}
ENTROPY = [0.5, 0.0, 1.25, 2.0]


def make_vocabulary(**changes):
    arguments = {"aliases": ALIASES, "gene_entropy": ENTROPY, "source": {"n_cells": 7}} | changes
    ids = arguments.pop("gene_ids", IDS)
    symbols = arguments.pop("gene_symbols", SYMBOLS)
    return GeneVocabulary(ids, symbols, **arguments)


def test_hand_made_vocabulary():
    vocabulary = make_vocabulary()
    assert vocabulary.gene_ids == ["<pad>", "<mask>", "<lat>", "<unk>", "<pert>", *IDS]
    assert vocabulary.gene_symbols[5:] == ["TSPAN6", "TNMD", "DPM1", "XIST"]
    assert (len(vocabulary), vocabulary.n_genes, vocabulary.n_special_tokens) == (9, 4, 5)
    assert [vocabulary.token_ids[name] for name in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert vocabulary.token_ids["ENSG00000000419"] == 7
    assert vocabulary.gene_entropy.tolist() == [0, 0, 0, 0, 0, 0.5, 0, 1.25, 2]
    assert vocabulary.ranking_weights(1.0).tolist() == [1, 1, 1, 1, 1, 1.5, 1, 2.25, 3]
    assert "<mask>" not in vocabulary.gene_token_ids


def test_shared_symbols_identify_no_gene():
    vocabulary = GeneVocabulary(["ENSG1", "ENSG2", "ENSG3"], ["TBCE", "TBCE", "CD3D"])
    assert vocabulary.symbol_token_ids == {"CD3D": 7}


def test_ranking_weights_leave_the_entropies_alone():
    vocabulary = make_vocabulary()
    vocabulary.ranking_weights(1.0)[:] = -1
    assert vocabulary.gene_entropy[5] == 0.5


def test_file_holds_one_gene_a_line_and_its_hash(tmp_path):
    vocabulary = make_vocabulary()
    path = tmp_path / "folder" / "gene_vocabulary.json"
    vocabulary.save(path)
    stored = json.loads(path.read_text())
    assert (stored["format_version"], stored["genes"][2]) == (FORMAT_VERSION, [IDS[2], "DPM1", 1.25])
    assert sum(line.startswith("[") for line in path.read_text().splitlines()) == len(IDS)
    # The hash, computed a second way.
    content = [FORMAT_VERSION, stored["special_tokens"], stored["genes"], stored["aliases"]]
    text = json.dumps(content, separators=(",", ":"), sort_keys=True)
    assert stored["content_hash"] == hashlib.sha256(text.encode()).hexdigest() == vocabulary.content_hash
    assert [file.name for file in path.parent.iterdir()] == ["gene_vocabulary.json"]


@pytest.mark.parametrize("seed", range(10))
def test_random_vocabularies_survive_their_file(tmp_path, seed):
    rng = np.random.default_rng(seed)
    n_genes = int(rng.integers(1, 200))
    ids = [f"ENSG{i:011d}" if rng.random() < 0.9 else f"gène{i}" for i in rng.permutation(n_genes)]
    symbols = [None if rng.random() < 0.2 else f'S"{i % 50}' for i in range(n_genes)]
    aliases = {f"old{i}": ids[i] for i in rng.integers(0, n_genes, 20)}
    entropy = rng.random(n_genes) * 3 if seed % 2 else None
    before = GeneVocabulary(ids, symbols, aliases=aliases, gene_entropy=entropy, source={"seed": seed})
    before.save(tmp_path / "v.json")
    for after in (GeneVocabulary.load(tmp_path / "v.json"), pickle.loads(pickle.dumps(before))):
        assert after.content_hash == before.content_hash
        assert after.gene_ids == before.gene_ids
        assert after.gene_symbols == before.gene_symbols
        assert (after.aliases, after.source) == (before.aliases, before.source)
        np.testing.assert_array_equal(after.gene_entropy, before.gene_entropy)
    GeneVocabulary.load(tmp_path / "v.json").save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "v.json").read_bytes()


def test_hash_covers_what_changes_tokens_and_nothing_else():
    reference = make_vocabulary().content_hash
    changed = [
        make_vocabulary(gene_ids=IDS[::-1], gene_symbols=SYMBOLS[::-1], gene_entropy=ENTROPY[::-1]),
        make_vocabulary(gene_symbols=["TSPAN6", "TNMD", "DPM2", None]),
        make_vocabulary(aliases={}),
        make_vocabulary(gene_entropy=[0.5, 0.0, 1.25, 2.0000001]),
        make_vocabulary(gene_entropy=None),
    ]
    assert len({reference, *(vocabulary.content_hash for vocabulary in changed)}) == 6
    same = make_vocabulary(source={}, aliases=dict(reversed(ALIASES.items())))
    assert same.content_hash == reference


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "v.json"
    make_vocabulary().save(path)

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_vocabulary(aliases={}).save(path)
    assert GeneVocabulary.load(path).aliases == ALIASES
    assert [file.name for file in tmp_path.iterdir()] == ["v.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gene_ids": [], "gene_symbols": None}, "at least one gene"),
        ({"gene_ids": ["a", " ", "b", "c"]}, r"1 gene ids are empty \(first: entry 1\)"),
        ({"gene_ids": ["a", "<mask>", "b", "c"]}, r"special tokens, got \['<mask>'\]"),
        ({"gene_ids": ["a", "ENSG00000000003.15", "b", "c"]}, "carry a version .*ENSG00000000003.15"),
        ({"gene_ids": ["a", "b", "a", "c"]}, r"1 ids are repeated, such as \['a'\]"),
        ({"gene_symbols": ["a"]}, "gene_symbols needs one entry per gene: 4 genes, got 1 entries"),
        ({"gene_entropy": [1.0]}, "gene_entropy needs one entry per gene: 4 genes, got 1 entries"),
        ({"gene_entropy": [1, -1, np.nan, 1]}, "2 of 4 are not .first: gene 'ENSG00000000005' = -1.0"),
        ({"aliases": {"old": "ENSG9"}}, r"1 aliases point to genes .*'old' -> 'ENSG9'"),
        ({"aliases": {"old": "<mask>"}}, r"1 aliases point to genes .*'old' -> '<mask>'"),
    ],
)
def test_wrong_content_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_vocabulary(**changes)


def test_ranking_weights_refuse_what_cannot_rank():
    with pytest.raises(ValueError, match=r"has no gene entropies.*gene_order='expression'"):
        make_vocabulary(gene_entropy=None).ranking_weights(1.0)
    for epsilon in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="entropy_epsilon must be finite and above 0"):
            make_vocabulary().ranking_weights(epsilon)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is not a gene vocabulary"),
        ({"format_version": 2}, r"has format version 2; this code reads version 1"),
        ({"special_tokens": ["<pad>"]}, r"has the special tokens \['<pad>'\]"),
        ({"genes": [["a", "b"]]}, "is not a whole gene vocabulary"),
        ({"genes": [["a", "a", None], ["b", "b", None]]}, "is not a whole gene vocabulary .*aliases point"),
        ({"aliases": {}}, "does not hold what was written"),
        ({"content_hash": "0" * 64}, "it states 000000000000"),
        ({"source": None}, None),
    ],
)
def test_edited_files_are_refused(tmp_path, changes, message):
    path = tmp_path / "v.json"
    make_vocabulary().save(path)
    edit(path, **changes)
    if message is None:  # where a vocabulary comes from changes no token
        assert GeneVocabulary.load(path).source == {}
        return
    with pytest.raises(ValueError, match=message):
        GeneVocabulary.load(path)


def test_damaged_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "v.json"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        GeneVocabulary.load(path)
    make_vocabulary().save(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\xff\xfe\x00"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is not valid JSON .*damaged or cut short"):
            GeneVocabulary.load(path)
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="is not a gene vocabulary"):
        GeneVocabulary.load(path)
