"""Cases build as Graphcore programs, at their real size, precision and options; all thirty in the long run."""

import pytest

tf = pytest.importorskip("tensorflow")

import ipu_standin  # noqa: E402

from effnet_repro import ipu  # noqa: E402
from effnet_repro.config import load_cases  # noqa: E402
from effnet_repro.network import params, segments  # noqa: E402
from effnet_repro.pipeline import split_segments  # noqa: E402
from effnet_repro.scaling import ModelSpec  # noqa: E402

CASES = load_cases()


def build(case):
    "Stages traced at real size; gradients are placeholders, and the step is built for one variable a kind"
    spec = ModelSpec.from_case(case)

    def dataset():
        n, side = case.global_batch_size, case.image_size
        batch = lambda i: (tf.zeros((n, side, side, 3), "uint8"), tf.zeros(n, "int32"))
        return ipu.element_stream(case, spec, tf.data.Dataset.range(1).map(batch))

    with ipu_standin.install(shallow=True) as machine:
        graphcore = ipu.Graphcore()
        ipu.configure(graphcore, ipu.machine_options(case, 16), case.num_stages)
        program = ipu.TrainingProgram(graphcore, case, spec, dataset)
        machine.programs[0].check()  # what compiling would refuse
        assert machine.programs[0].replicas == case.num_replicas
    return spec, program, machine


def facts(case):
    "What a program may depend on, each by itself"
    names = """model_size num_stages precision enable_conv_dithering offload_fp32_weight_copy
    disable_variable_offloading internal_exchange_optimisation_target"""
    arm = (case.group_size, case.norm, case.norm_groups)
    found = {n: getattr(case, n) for n in names.split()}
    found.update(arm=arm, half="-Half_" in case.name, shares=len(case.available_memory_proportion))
    return set(found.items())


def fewest(cases):
    "Names of cases that have every fact of all of them: the others are built in the long run"
    seen, found = set(), []
    for name, case in cases.items():
        if not facts(case) <= seen:
            seen |= facts(case)
            found.append(name)
    return found


def test_every_fact_is_built():
    built = fewest(CASES)
    assert len(built) < 10
    assert set.union(*(facts(CASES[n]) for n in built)) == set.union(*map(facts, CASES.values()))


@pytest.mark.parametrize("name", CASES)
def test_a_case_s_machine_has_its_options(name):
    "Of all thirty: no network is needed for it"
    with ipu_standin.install(shallow=True) as machine:
        case = CASES[name]
        ipu.configure(ipu.Graphcore(), ipu.machine_options(case, 16), case.num_stages)
        check_options(case, machine)


def check_options(case, machine):
    (config,) = machine.calls["configure_ipu_system"]
    share = case.available_memory_proportion
    convolutions = {"partialsType": "half"}
    if len(share) == 1:
        convolutions["availableMemoryProportion"] = str(share[0])
    if case.enable_conv_dithering:
        convolutions["enableConvDithering"] = "true"
    assert config["convolutions.poplar_options"] == convolutions
    assert config["matmuls.poplar_options"] == {"partialsType": "half"}
    assert config["auto_select_ipus"] == case.num_replicas * case.num_stages == 16
    assert config["allow_recompute"] is case.enable_recomputation is True
    assert config["floating_point_behaviour.esr"].name == "OFF"
    assert config["floating_point_behaviour.nanoo"] is config["norms.use_stable_statistics"] is True
    target = {"opt.internalExchangeOptimisationTarget": case.internal_exchange_optimisation_target}
    target["target.deterministicWorkers"] = "false"
    assert config["compilation_poplar_options"] == target


@pytest.mark.parametrize(
    "name",
    [n if n in fewest(CASES) else pytest.param(n, marks=pytest.mark.long) for n in CASES],
)
def test_case_builds_with_its_options(name):
    case = CASES[name]
    spec, program, machine = build(case)
    half = case.precision == "16.16"
    check_options(case, machine)
    (made,), share = machine.calls["pipeline"], case.available_memory_proportion
    assert made["schedule"].name == case.pipeline_schedule == "Grouped"
    assert made["gradient_accumulation_count"] == case.gradient_accumulation
    assert made["mapping"] == list(range(case.num_stages)) and made["repeat_count"] == 1
    assert made["offload_weight_update_variables"] is (not case.disable_variable_offloading)
    memory = made["forward_propagation_stages_poplar_options"]
    assert memory == made["backward_propagation_stages_poplar_options"]
    if len(share) > 1:
        key = "availableMemoryProportion"
        found = [
            float(o.values[kind][key])
            for o in memory
            for kind in ("convolution_options", "matmul_options")
        ]
        assert found == list(share)
    else:
        assert memory is None
    kinds = {v.dtype.base_dtype.name for v in program.variables.values()}
    assert kinds == {"float16" if half else "float32"}
    assert set(program.variables) == {p.name for p in params(spec)}
    assert {a.dtype.name for a in machine.calls["optimizer"][0]["accumulators"]} == kinds
    assert ("fp32" in program.optimizer.slots) is half is case.offload_fp32_weight_copy
    norms = machine.calls["group_norm"]
    assert {(n["groups"], n["dtype"]) for n in norms} == {(case.norm_groups, "float16")}
    assert len(norms) == len([p for p in params(spec) if p.name.endswith("/gamma")])
    assert program.queue._element["images"].dtype == tf.uint8
    # each stage uses the variables of its own segments, and no other
    pipe = made["pipeline"]
    own = [
        sum(len(s.params) for s in stage) for stage in split_segments(spec, case.pipeline_splits)
    ]
    assert [len(used) for used in pipe.uses] == own and sum(own) == len(params(spec))
    assert len(segments(spec)) == sum(map(len, split_segments(spec, case.pipeline_splits)))
