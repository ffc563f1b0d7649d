"""Files of cases: our sections and the published flat form, read as plain values.

A repeated key, an unknown section and a syntax error are refused with the place. What the values mean is `config`'s.
"""

import copy
import functools
import math
import re
from pathlib import Path

import yaml

from effnet_repro.fields import unknown_name
from effnet_repro.outside import file_kind, read_file
from effnet_repro.paths import local_path
from effnet_repro.scaling import SIZE_TABLE, size_name


class _Unreadable(ValueError):
    "A scalar that cannot be what its tag says"


class _UniqueKeys(yaml.SafeLoader):
    "YAML that refuses a key given twice in one mapping; files of the published form may repeat `<<`"

    def compose_mapping_node(self, anchor):
        node, lines = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {line}: a key must be a plain name.")
            if key.value in lines:
                self.repeated = getattr(self, "repeated", [])
                self.repeated.append((key, lines[key.value], line))
            lines[key.value] = line
        return node

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
            yaml.YAMLError,
        ) as e:
            if isinstance(e, _Unreadable) or (
                isinstance(e, yaml.YAMLError) and "base64" not in str(e)
            ):
                raise
            kind = node.tag.rpartition(":")[2]
            line, text = node.start_mark.line + 1, str(getattr(node, "value", ""))[:40]
            raise _Unreadable(f"line {line}: {text!r} is no value of the kind {kind}") from None

    def get_single_node(self):
        node, mapping = super().get_single_node(), yaml.MappingNode
        own = isinstance(node, mapping) and "cases" in [key.value for key, _ in node.value]
        for key, first, line in getattr(self, "repeated", []):
            if own or key.tag != "tag:yaml.org,2002:merge":
                place = f"lines {first} and {line}" if line != first else f"line {line}"
                raise ValueError(f"Key {key.value!r} stands twice, in {place}. Keep one of them.")
        return node


def _as_it_looks(construct):
    "A constructor of numbers that refuses 017, which YAML takes for 15, and 1:30, which it takes for 90"

    def number(loader, node):
        value = construct(loader, node)
        if re.match(r"[-+]?0[0-7_]|.*:", node.value):
            line = node.start_mark.line + 1
            raise _Unreadable(
                f"line {line}: {node.value!r} means {value} in YAML. Write the number itself"
            )
        return value

    return number


for kind in ("int", "float"):
    number = _as_it_looks(getattr(yaml.SafeLoader, f"construct_yaml_{kind}"))
    _UniqueKeys.add_constructor(f"tag:yaml.org,2002:{kind}", number)


_SECTIONS = ("sizes", "convolutions", "norms", "layouts", "fits", "plans", "cases", "budgets")


def _default_path():
    "The `config.yml` beside the installed module, or above the working directory"
    here = Path(__file__).resolve().parent
    for folder in (here, *Path.cwd().parents):
        if (folder / "config.yml").exists():
            return folder / "config.yml"
    raise FileNotFoundError(f"No config.yml in {here} nor above {Path.cwd()}. Pass `path`.")


_ONLY = {"model": "efficientnet", "dataset": "imagenet", "standard_imagenet": True}
_DROPPED = ("name_suffix", "pipeline", *_ONLY)


def _from_published(name, values, path, keys):
    "The fields of `Case` that a case of the published file stands for"
    for key, only in _ONLY.items():
        if values.get(key, only) != only:
            raise ValueError(
                f"{path}: {key}={values[key]!r} of {name} is not supported. Supported: {only!r}."
            )
    averages = values.get("weight_avg_exp", [0.97])
    if not isinstance(averages, list) or len(averages) != 1:
        raise ValueError(f"{path}: weight_avg_exp of {name} must be a list of one decay.")
    norm = "LN" if values.get("groups") == 1 else "GN"
    special = {
        "norm": norm + ("_PN" if values.get("proxy_norm") else ""),
        "optimizer": str(values.get("optimiser", "RMSprop")).lower(),
        "stochastic_rounding": not values.get("no_stochastic_rounding", False),
        "weight_average_decay": averages[0],
    }
    memory = values.get("available_memory_proportion", ())
    read = ("proxy_norm", "optimiser", "no_stochastic_rounding", "weight_avg_exp")
    rest = {keys.get(k, k): v for k, v in values.items() if k not in read + _DROPPED}
    for theirs, ours in keys.items():
        if theirs in values and ours in values:
            raise ValueError(f"{path}: {name} has both {theirs!r} and {ours!r}. Keep one of them.")
    fields = {"gradient_accumulation": 1, "num_replicas": 1, **rest, **special}
    size = SIZE_TABLE.get(size_name(fields.get("model_size")))
    if size:
        fields.setdefault("image_size", size.native)
    factors = [fields.get(f) for f in ("micro_batch_size", "gradient_accumulation", "num_replicas")]
    try:
        fields["available_memory_proportion"] = [float(v) for v in memory]
        fields["global_batch_size"] = math.prod(int(f) for f in factors)
    except (TypeError, ValueError):
        raise ValueError(
            f"{path}: {name} needs whole numbers for batch_size, gradient_accumulation_count and replicas, and "
            f"numbers for available_memory_proportion. Received: {factors}, {memory!r}."
        ) from None
    return fields


def _as_sections(data, path, keys):
    "The sections of a file; those of a published, flat one are made from its cases"
    if not isinstance(data, dict) or "cases" in data:
        return data
    flat = lambda v: isinstance(v, dict) and {"model_size", "batch_size", "group_dim"} <= set(v)
    found = {name: _from_published(name, v, path, keys) for name, v in data.items() if flat(v)}
    return {"cases": found} if found else data


@functools.lru_cache(maxsize=4)
def _parse(text):
    "What a text in YAML holds; a command asks for the same file several times"
    return yaml.load(text, Loader=_UniqueKeys)


def _text_of(path):
    "The text of a configuration file. ValueError or OSError names the file"
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None
    except OSError as e:
        raise OSError(e.errno, f"Cannot read {path}: {e.strerror}.") from None


def read_sections(
    path,  # A file in the form of `config.yml`, or the published flat one; None = the published cases
    keys: dict,  # Key of the published form -> field
) -> dict:  # Its sections as plain dictionaries
    "Read a file of cases"
    path = _default_path() if path is None else local_path(path, "config_path")
    if not path.is_file():
        what = f", which is {file_kind(path)}" if path.exists() else ""
        raise FileNotFoundError(
            f"No configuration file {path}{what}. Leave it out for the published cases."
        )
    try:
        data = copy.deepcopy(_parse(_text_of(path)))
    except RecursionError:
        raise ValueError(f"{path} is not a valid configuration: it is nested too deeply.") from None
    except (yaml.YAMLError, ValueError) as e:
        mark, problem = getattr(e, "problem_mark", None), getattr(e, "problem", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        text = " ".join(str(problem or e).split()).rstrip(".")
        text = re.sub(r"'[\w-]+' codec can't .*", "bytes that are no text", text)
        raise ValueError(
            f"{path} is not a valid configuration: {place}{text}. Compare it with the published config.yml."
        ) from None
    data = _as_sections(data, path, keys)
    if not isinstance(data, dict) or not isinstance(data.get("cases"), dict):
        raise ValueError(f"{path} has no section `cases:` that maps names to cases.")
    for section in data:
        if section not in _SECTIONS:
            raise unknown_name("section", section, _SECTIONS, str(path))
    return data
