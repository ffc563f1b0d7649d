"""Weights and slots of a training model, read as arrays and put back."""

from typing import Dict

import keras
import numpy as np

from effnet_repro.efficientnet import get_weights, weights_by_name
from effnet_repro.training.step import TrainingModel


def training_state(
    model: TrainingModel,  # On JAX after `jax_state_sync`
) -> Dict[str, np.ndarray]:  # Weights by full name, and "slots/<slot>/<full name>"
    "Read weights and slots of a training model"
    arrays = get_weights(model.network)
    by_id = {id(v): n for n, v in weights_by_name(model.network).items()}
    names = [by_id[id(v)] for v in model.trainable_variables]
    for slot, values in model.optimizer.slots.items():
        for name, value in zip(names, values):
            arrays[f"slots/{slot}/{name}"] = np.array(keras.ops.convert_to_numpy(value))
    return arrays


def set_slots(
    model: TrainingModel,  # Its weights are there already
    arrays: Dict[str, np.ndarray],  # "slots/<slot>/<full name>", and others
    step: int,  # Training steps behind them
):
    "Give the optimizer of a training model its slots; ValueError where one is missing or has another shape"
    by_id = {id(v): n for n, v in weights_by_name(model.network).items()}
    for slot, values in model.optimizer.slots.items():
        for v, target in zip(model.trainable_variables, values):
            value = arrays.get(f"slots/{slot}/{by_id[id(v)]}")
            if np.shape(value) != tuple(target.shape) or value is None:
                raise ValueError(
                    f"the slot {slot} of {by_id[id(v)]} has shape "
                    f"{None if value is None else value.shape}, the network {tuple(target.shape)}."
                )
            target.assign(value)
    model.optimizer.iterations.assign(step)
