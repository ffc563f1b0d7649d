__version__ = "0.1.0"

from effnet_repro.registration import register_with_keras

register_with_keras()
