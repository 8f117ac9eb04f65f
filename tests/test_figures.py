"""Figures: what is drawn is what came.

Needs no data. Run: pytest tests/test_figures.py
"""

import io

import numpy as np
import pytest

from modeling_scdiva.evaluation.figures import (
    draw_calibration,
    draw_confusion,
    draw_delta_scatter,
    draw_mask_curve,
    draw_paired_scores,
    draw_umap,
)


def png_of(figure):
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=40)
    assert picture.getvalue().startswith(b"\x89PNG")
    return picture.getvalue()


def test_umap_panels_show_classes_and_numbers():
    points = np.random.default_rng(0).normal(size=(30, 2))
    colours = {"cell type": ["T", "B", "NK"] * 10, "genes detected": np.arange(30.0)}
    figure = draw_umap(points, colours)
    types, genes, colour_bar = figure.axes
    assert [types.get_title(), genes.get_title()] == ["cell type", "genes detected"]
    drawn = np.asarray(types.collections[0].get_offsets())
    np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(points, axis=0))
    legend = types.get_legend()
    assert [entry.get_text() for entry in legend.get_texts()] == ["B", "NK", "T"]
    # Every cell has the colour that the legend gives its type.
    order = np.random.default_rng(0).permutation(30)
    shown = types.collections[0].get_facecolors()[:, :3]
    of_type = {e.get_label(): e.get_facecolors()[0, :3] for e in types.collections[1:]}
    np.testing.assert_allclose(shown, [of_type[name] for name in np.array(colours["cell type"])[order]])
    assert genes.get_legend() is None
    assert colour_bar.get_ylim() == (0.0, 29.0)
    png_of(figure)


@pytest.mark.slow
def test_umap_of_wide_embeddings_is_seeded():
    rng = np.random.default_rng(0)
    cells = np.concatenate([rng.normal(0, 1, (20, 8)), rng.normal(20, 1, (20, 8))])
    layouts = [
        np.asarray(
            draw_umap(cells, {"side": ["a"] * 20 + ["b"] * 20}, seed).axes[0].collections[0].get_offsets()
        )
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(layouts[0], layouts[1])
    assert np.abs(layouts[0] - layouts[2]).max() > 0.1


def test_umap_refuses():
    with pytest.raises(ValueError, match="at least 4 cells"):
        draw_umap(np.zeros((3, 2)), {})
    with pytest.raises(ValueError, match="'donor' has 3 entries for 5 cells"):
        draw_umap(np.zeros((5, 2)), {"donor": ["a"] * 3})


def test_confusion_rows_are_shares_of_the_true_class():
    figure = draw_confusion(["T", "T", "T", "T", "B"], ["T", "T", "B", "NK", "B"])
    panel = figure.axes[0]
    assert [text.get_text() for text in panel.get_yticklabels()] == ["B (1)", "NK (0)", "T (4)"]
    assert [text.get_text() for text in panel.get_xticklabels()] == ["B", "NK", "T"]
    expected = [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.25, 0.25, 0.5]]
    np.testing.assert_allclose(panel.images[0].get_array(), expected)
    assert sorted(text.get_text() for text in panel.texts) == ["0.25", "0.25", "0.50", "1.00"]
    png_of(figure)
    with pytest.raises(ValueError, match="got 0 and 0"):
        draw_confusion([], [])


def test_calibration_draws_each_filled_bin():
    figure = draw_calibration({"before": ([0.1, 0.5, 0.9], [0.2, np.nan, 0.7]), "after": ([0.3], [0.3])})
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_allclose(lines["before"].get_xydata(), [[0.1, 0.2], [0.9, 0.7]])
    np.testing.assert_allclose(lines["perfect"].get_xydata(), [[0, 0], [1, 1]])
    png_of(figure)
    with pytest.raises(ValueError, match="'x' has 2 points for 1 places"):
        draw_calibration({"x": ([0.1], [0.1, 0.2])})


def test_delta_scatter_names_the_correlation():
    true = np.array([[1.0, 2.0, 3.0], [1.0, -1.0, 0.0]])
    figure = draw_delta_scatter(true, np.array([[2.0, 4.0, 6.0], [0.0, 0.0, 0.0]]), ["IFNB", "STAT1"])
    assert [panel.get_title() for panel in figure.axes] == ["IFNB (r = 1.00)", "STAT1 (r = undefined)"]
    np.testing.assert_allclose(figure.axes[0].collections[0].get_offsets(), [[1, 2], [2, 4], [3, 6]])
    png_of(figure)
    one = draw_delta_scatter(true[0], -true[0], "IFNB")
    assert one.axes[0].get_title() == "IFNB (r = -1.00)"


def test_delta_scatter_keeps_the_strongest():
    true = np.arange(1.0, 16.0)[:, None] * np.ones(4)
    figure = draw_delta_scatter(true, true, [f"p{row}" for row in range(15)])
    assert [panel.get_title().split()[0] for panel in figure.axes] == [f"p{row}" for row in range(3, 15)]
    with pytest.raises(ValueError, match="one entry per perturbation, got 2"):
        draw_delta_scatter(true, true, ["a", "b"])


def test_mask_curve():
    figure = draw_mask_curve([10, 50], {"scDiVa": [0.5, None], "unigram": [0.1, 0.2]}, "% hidden", "accuracy")
    panel = figure.axes[0]
    model, baseline = panel.lines
    assert (model.get_linestyle(), baseline.get_linestyle()) == ("-", "--")
    np.testing.assert_array_equal(model.get_ydata(), [0.5, np.nan])
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("% hidden", "accuracy")
    png_of(figure)
    with pytest.raises(ValueError, match="no curve"):
        draw_mask_curve([], {}, "x", "y")
    with pytest.raises(ValueError, match="'a' has 1 points for 2 places"):
        draw_mask_curve([1, 2], {"a": [1]}, "x", "y")


def test_paired_scores_name_where_the_second_is_ahead():
    first, second = [0.1, 0.9, np.nan, 0.5], [0.8, 0.2, 0.5, 0.6]
    figure = draw_paired_scores(first, second, "|Pearson|", "scDiVa", ["STAT1", "IRF7", "JUN", "FOS"])
    panel = figure.axes[0]
    np.testing.assert_allclose(panel.collections[0].get_offsets(), [[0.1, 0.8], [0.9, 0.2], [0.5, 0.6]])
    assert [text.get_text() for text in panel.texts] == ["STAT1", "FOS", "IRF7"]
    png_of(figure)
    with pytest.raises(ValueError, match=r"first \(4,\), second \(3,\)"):
        draw_paired_scores(first, second[:3], "a", "b")
