"""Registers the layers of this package with Keras as soon as both are imported, in any order.

`keras.models.load_model` finds a layer of a `.keras` file only if the module that defines it was imported. That module
needs Keras, and `import effnet_repro` must neither import Keras nor wait for it. So the import of Keras is followed by
that of the layers.
"""

import contextlib
import importlib.util
import sys

LAYERS = "effnet_repro.keras_layers"


def register() -> None:
    """Import the layers, which registers them. Where this Keras is too old for them, nothing happens.

    Whoever uses the layers then gets the error from their own import.
    """
    with contextlib.suppress(Exception):
        importlib.import_module(LAYERS)


class _AfterKeras:
    "A finder that finds Keras as the others do, once, and adds `register` to what its import does"

    def find_spec(self, name, path=None, target=None):
        if name != "keras":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if getattr(spec, "loader", None) is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                register()

            spec.loader.exec_module = exec_module
        return spec


def register_with_keras() -> None:
    """Register the layers now if Keras is imported, else right after it will be."""
    if "keras" in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterKeras())
