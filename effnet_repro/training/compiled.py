"""Keeps what JAX compiles for a GPU for the next process, together with the program it was compiled from.

Before a GPU trains, Python traces the training step and lowers it to a program of XLA, and XLA compiles that. JAX's
own cache keeps what was compiled. It finds it by the program, so tracing and lowering would be done again each time,
and they take longer: `compile_once` keeps the program as well (`jax.export`), under a name that stands for all it was
made from.

Both caches lie in `<cache>/jax` (see `data.cache`). The oldest files go when they exceed `MOST_BYTES`. CPUs have no
such cache: there JAX may reject its own entries, with lines of errors.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, Callable

from effnet_repro.data.cache import cache_folder, keep
from effnet_repro.messages import BestEffort
from effnet_repro.training.device import has_jax_gpu, has_other_processes

LOG = logging.getLogger(__name__)
#: Of all that is kept
MOST_BYTES = 2 * 2**30
_KERNELS = "__gpu$xla.gpu.triton"  # The call that a kernel becomes; JAX promises nothing about it across versions


def keep_compiled() -> None:
    """Keep what JAX compiles from here on, where it computes on a GPU. A folder that the user chose stays."""
    if not has_jax_gpu():
        return
    import jax

    with BestEffort("kept programs", LOG):
        if jax.config.jax_compilation_cache_dir is not None:
            return
        folder = _folder()
        _make_room(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _folder() -> Path:
    return cache_folder() / "jax"


def _make_room(folder: Path) -> None:
    "Remove the files that were not used for the longest time, until the rest has at most MOST_BYTES"
    found = []
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                stat = path.stat()
                found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
        except OSError:  # another process has removed it
            continue
    size = sum(one for _, one, _ in found)
    for _, one, path in sorted(found, key=lambda f: f[0]):
        if size <= MOST_BYTES:
            break
        path.unlink(missing_ok=True)
        size -= one


def _sources() -> str:
    "A digest of this package's code"
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _name(key, args) -> str:
    "Digits that stand for a function's key, its arguments' shapes and places, and all that turns it into a program"
    import jax
    import jaxlib
    import keras

    leaves, tree = jax.tree.flatten(args)
    shapes = [(v.shape, str(v.dtype), str(getattr(v, "sharding", None))) for v in leaves]
    devices = [d.device_kind for d in jax.devices()]
    versions = jax.__version__, jaxlib.__version__, keras.__version__
    flags = os.environ.get("XLA_FLAGS"), os.environ.get("EFFNET_KERNELS")
    all_of_it = [key, shapes, str(tree), devices, versions, flags, _sources()]
    return hashlib.sha256(json.dumps(all_of_it, default=str).encode()).hexdigest()[:32]


def compile_once(
    function: Callable,  # Pure, of trees of arrays made of tuples, lists and dictionaries
    args: tuple,  # Arrays, or `jax.ShapeDtypeStruct`
    key: Any,  # What the program depends on besides code and shapes, as plain values
    donate: tuple = (),  # Numbers of the arguments whose memory the results take over
) -> Callable:  # The compiled function of such arguments
    """Compile a function; on a GPU its program is kept, and a later process neither traces nor lowers it.

    Whatever is wrong with what was kept, the function is compiled as if nothing had been.
    """
    import jax

    jitted = jax.jit(function, donate_argnums=donate)
    if not has_jax_gpu() or has_other_processes():  # JAX's own cache keeps what several compile
        return jitted.lower(*args).compile()
    path = _folder() / "programs" / f"{_name(key, args)}.bin"
    try:
        program = jax.export.deserialize(bytearray(path.read_bytes()))
        return _compiled(program, args, donate)
    except FileNotFoundError:
        pass
    except Exception as error:
        LOG.warning("%s is not used: %s", path, error)
    checks = [jax.export.DisabledSafetyCheck.custom_call(_KERNELS)]
    program = jax.export.export(jax.jit(function), disabled_checks=checks)(*args)
    keep(path, bytes(program.serialize()))
    return _compiled(program, args, donate)


def _compiled(program, args, donate):
    import jax

    return jax.jit(program.call, donate_argnums=donate).lower(*args).compile()
