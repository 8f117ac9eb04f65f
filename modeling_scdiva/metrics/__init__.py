"""Numbers that say how good something is: arrays in, numbers out, baselines beside them."""

from modeling_scdiva.metrics.annotation import depth_features, log_normalise, pca_features, probe_embedding

__all__ = ["depth_features", "log_normalise", "pca_features", "probe_embedding"]
