"""`ipu.normalization_ops`, `gen_popnn_ops` and `ipu.nn_ops`: exact arithmetic, strided by default."""

import warnings

import tensorflow as tf

from .machine import machine

tf1 = tf.compat.v1


def _moments(x, groups, strided):
    "Mean and biased variance seen by each channel, (N, 1, 1, C), in float32"
    n, h, w, c = x.shape.as_list()
    y = tf.cast(x, tf.float32) if x.dtype.size < 4 else x
    cut = (n, h * w, c // groups, groups) if strided else (n, h * w, groups, c // groups)
    axes = (1, 2) if strided else (1, 3)
    y = tf.reshape(y, cut)
    mean = tf.reduce_mean(y, axes, keepdims=True)
    if machine().config and machine().config["norms.use_stable_statistics"]:
        variance = tf.reduce_mean(tf.square(y - mean), axes, keepdims=True)
    else:
        square = tf.reduce_mean(tf.square(y), axes, keepdims=True)
        variance = tf.maximum(square - tf.square(mean), 0.0)
    spread = lambda v: tf.reshape(tf.broadcast_to(v, (n, 1, *cut[2:])), (n, 1, 1, c))
    return spread(mean), spread(variance)


def popnn_group_norm_training(
    inputs, gamma, beta, data_format, epsilon, num_groups, strided_channel_grouping=True, name=None
):
    if not inputs.dtype == gamma.dtype == beta.dtype:
        raise TypeError(
            f"PopnnGroupNormTraining: one dtype for inputs, gamma, beta, got {inputs.dtype.name}, "
            f"{gamma.dtype.name}, {beta.dtype.name}"
        )
    if data_format != "NHWC":
        raise NotImplementedError("The stand-in speaks NHWC only.")
    machine().note(
        "group_norm",
        groups=num_groups,
        epsilon=epsilon,
        strided=strided_channel_grouping,
        dtype=inputs.dtype.name,
        shape=tuple(inputs.shape),
    )
    mean, variance = _moments(inputs, num_groups, strided_channel_grouping)
    inv_std = tf.math.rsqrt(variance + epsilon)
    kind = inputs.dtype  # mean and 1/std are kept in the type of the activations
    out = (inputs - tf.cast(mean, kind)) * tf.cast(inv_std, kind) * gamma + beta
    return out, tf.cast(mean, kind), tf.cast(inv_std, kind)


def make_norms(at_least):
    default = 1.53e-5 if at_least("2.4") else 1e-6

    def _norm(inputs, groups, axis, center, scale, epsilon, trainable, scope, name, strided):
        inputs = tf.convert_to_tensor(inputs)
        if inputs.shape.rank is None:
            raise ValueError(f"Inputs {inputs.name} has undefined rank.")
        rank = inputs.shape.rank
        if not -rank <= axis < rank:
            raise ValueError("Axis is out of bounds.")
        if axis % rank not in (1, rank - 1):
            raise ValueError("Only channels_axis 1 and last are supported.")
        channels = inputs.shape[axis]
        if channels is None:
            raise ValueError(f"Inputs {inputs.name} has undefined channel dimension.")
        if groups < 1 or groups > channels:
            raise ValueError(f"Invalid groups {groups} for {channels} channels.")
        if channels % groups:
            raise ValueError(f"{channels} channels is not commensurate with {groups} groups.")
        if at_least("2.4") and epsilon < 1.53e-5:
            warnings.warn("epsilon below 1.53e-5", stacklevel=3)
        with tf1.variable_scope(scope, name):
            make = lambda n, wanted, start: (
                tf1.get_variable(
                    n,
                    [channels],
                    inputs.dtype,
                    tf1.constant_initializer(start),
                    trainable=trainable,
                )
                if wanted
                else tf.fill([channels], tf.cast(start, inputs.dtype))
            )
            beta, gamma = make("beta", center, 0.0), make("gamma", scale, 1.0)
        gamma, beta = tf.convert_to_tensor(gamma), tf.convert_to_tensor(beta)
        out, _, _ = popnn_group_norm_training(inputs, gamma, beta, "NHWC", epsilon, groups, strided)
        return out

    def group_norm(
        inputs,
        groups=2,
        channels_axis=-1,
        center=True,
        scale=True,
        epsilon=default,
        param_initializers=None,
        reuse=None,
        variables_collections=None,
        training=True,
        trainable=True,
        scope=None,
        strided_channel_grouping=True,
    ):
        how = (center, scale, epsilon, trainable, scope, "GroupNorm", strided_channel_grouping)
        return _norm(inputs, groups, channels_axis, *how)

    def layer_norm(
        inputs,
        channels_axis=-1,
        center=True,
        scale=True,
        epsilon=default,
        param_initializers=None,
        reuse=None,
        variables_collections=None,
        training=True,
        trainable=True,
        scope=None,
    ):
        how = (center, scale, epsilon, trainable, scope, "LayerNorm", False)
        return _norm(inputs, 1, channels_axis, *how)

    def instance_norm(
        inputs,
        channels_axis=-1,
        center=True,
        scale=True,
        epsilon=default,
        param_initializers=None,
        reuse=None,
        variables_collections=None,
        training=True,
        trainable=True,
        scope=None,
    ):
        groups = tf.convert_to_tensor(inputs).shape[channels_axis]
        how = (center, scale, epsilon, trainable, scope, "InstanceNorm", False)
        return _norm(inputs, groups, channels_axis, *how)

    return group_norm, layer_norm, instance_norm


def swish(x, name=None):
    return x * tf.sigmoid(x)
