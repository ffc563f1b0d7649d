"""A `.keras` file loads in a fresh process after `import effnet_repro`, which itself imports no Keras."""

import subprocess
import sys

import pytest
from tiny import PYTHON, TINY

from effnet_repro.efficientnet import build_model


def python(code):
    done = subprocess.run([sys.executable, "-c", code], env=PYTHON, capture_output=True, text=True)
    return done.returncode, done.stdout.strip(), done.stderr[-2000:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    build_model(TINY, num_classes=3).save(path)
    return path


ORDERS = ["import effnet_repro, keras", "import keras, effnet_repro"]


@pytest.mark.parametrize("order", [ORDERS[0], pytest.param(ORDERS[1], marks=pytest.mark.long)])
def test_a_saved_model_loads_in_a_fresh_process(saved, order):
    code = f"{order}\nprint(keras.models.load_model({str(saved)!r}).output_shape)"
    status, out, err = python(code)
    assert (status, out) == (0, "(None, 3)"), err


def test_the_package_alone_imports_no_keras():
    status, out, err = python("import effnet_repro, sys; print('keras' in sys.modules)")
    assert (status, out) == (0, "False"), err


def test_a_keras_that_is_too_old_is_left_alone(tmp_path):
    (tmp_path / "keras.py").write_text("__version__ = '2.4.3'\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import effnet_repro, keras"
    status, out, err = python(code + "; print(keras.__version__, len(sys.meta_path))")
    assert status == 0 and out.startswith("2.4.3"), err
