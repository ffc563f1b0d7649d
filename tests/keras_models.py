"""Networks of keras.applications for tests, without anybody's weights."""

import keras


def scatter(model, rng):
    """Move every array that starts the same everywhere: norms, biases and the input norm."""
    for v in model.weights:
        if v.name in ("moving_variance", "variance"):
            v.assign(rng.uniform(0.5, 2, v.shape))
        elif v.name in ("moving_mean", "mean", "beta", "bias", "gamma"):
            v.assign(rng.normal(v.name == "gamma", 0.2, v.shape))
    next(la for la in model.layers if isinstance(la, keras.layers.Normalization)).finalize_state()
    return model
