"""ZeRO 1, 2 and 3 on real processes give the single process's numbers: loss, gradient norm, parameters."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed_cases import LR, OFFLOAD, PARTITIONED, SCRIPTS, SETTINGS, Case, build, reference, settings_of
from test_engines_agree import whole_parameters
from tiny import run_ranks

from trainer.model.load import DTYPES
from trainer.world import World, connected, environment_world

STAGES: dict[str, dict[str, Any]] = {"1": {"stage": 1}, "2": {"stage": 2}, "3": PARTITIONED}
CASES: dict[str, Case] = {
    **{f"zero{s}-{m}": Case(zero, m) for s, zero in STAGES.items() for m in ("full", "lora", "qlora")},
    "zero1-bf16": Case(STAGES["1"], dtype="bfloat16"),
    "zero2-bf16-pulled": Case(STAGES["2"], dtype="bfloat16", script="pulled"),
    "zero2-stages": Case(STAGES["2"], script="stages"),
    "zero3-stages": Case(STAGES["3"], script="stages"),
    **{f"zero{s}-skips": Case(zero, script="skips") for s, zero in STAGES.items()},
    "zero1-pulled": Case(STAGES["1"], script="pulled"),
    "zero3-pulled": Case(STAGES["3"], script="pulled"),
    "zero2-last-layers-checkpointed": Case(STAGES["2"], "last-layers", checkpointing=True),
    "zero2-offloaded-skips": Case({"stage": 2, **OFFLOAD}, script="skips"),
    "zero3-offloaded-pulled": Case(PARTITIONED | OFFLOAD | {"offload_param": {"device": "cpu"}}, script="pulled"),
}
SLOW: dict[str, Case] = {
    "zero2-bf16": Case(STAGES["2"], dtype="bfloat16"),
    "zero3-bf16": Case(STAGES["3"], dtype="bfloat16"),
    "zero1-stages": Case(STAGES["1"], script="stages"),
    "zero2-pulled": Case(STAGES["2"], script="pulled"),
    "zero3-lora-checkpointed": Case(STAGES["3"], "lora", checkpointing=True),
    "zero1-offloaded": Case({"stage": 1, **OFFLOAD}),
    "zero2-offloaded-bf16": Case({"stage": 2, **OFFLOAD}, dtype="bfloat16"),
    "zero3-offloaded": Case(PARTITIONED | OFFLOAD | {"offload_param": {"device": "cpu"}}),
    **{f"zero{s}-{m}-4": Case(zero, m, ranks=4) for s, zero in STAGES.items() for m in ("full", "lora")},
    **{f"zero{s}-lora-bf16": Case(zero, "lora", "bfloat16") for s, zero in STAGES.items()},
    **{f"zero{s}-qlora-bf16": Case(zero, "qlora", "bfloat16") for s, zero in STAGES.items()},
    "zero1-offloaded-bf16": Case({"stage": 1, **OFFLOAD}, dtype="bfloat16"),
    "zero1-offloaded-pulled": Case({"stage": 1, **OFFLOAD}, script="pulled"),
    "zero2-offloaded-stages": Case({"stage": 2, **OFFLOAD}, script="stages"),
    "zero3-offloaded-skips": Case(PARTITIONED | OFFLOAD, script="skips"),
    "zero3-offloaded-lora-bf16": Case(PARTITIONED | OFFLOAD | {"offload_param": {"device": "cpu"}}, "lora", "bfloat16"),
    "zero3-persistent": Case({"stage": 3}, script="stages"),
    **{
        f"zero{stage}-{key}": Case((STAGES["3"] if stage == 3 else {"stage": stage}) | {key: value})
        for stage in (1, 2, 3)
        for key, value in {
            "contiguous_gradients": False,
            "overlap_comm": stage != 3,
            "reduce_scatter": False,
            "reduce_bucket_size": 3000,
            **({"allgather_bucket_size": 2000, "use_multi_rank_bucket_allreduce": False} if stage < 3 else {}),
            **({"parameter_alignment": True, "round_robin_gradients": True} if stage < 3 else {}),
            **({"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 1000} if stage == 3 else {}),
        }.items()
    },
}


def distributed(rank: int, names: dict[str, Case], model: str, out: str) -> None:
    """All cases of a world size in one set of processes: starting them costs more than the steps."""
    from trainer.engine.deepspeed import DeepSpeedEngine

    with connected(environment_world(), alone=True) as world:
        for name, case in names.items():
            trainee = build(Path(model), case.method, case.dtype, case.checkpointing)
            settings = settings_of(case, Path(out))
            engine = DeepSpeedEngine(trainee, SETTINGS, LR, settings, DTYPES[case.dtype], world)
            result = SCRIPTS[case.script](engine, world) | {"parameters": whole_parameters(engine, world)}
            result |= {"replicas": replicas(engine, world), "stage": case.zero["stage"]}
            if world.is_main:
                Path(out, f"{name}.json").write_text(json.dumps(result))


def replicas(engine: Any, world: World) -> dict[str, Any]:
    """Names and ranks of the copies, and whether every rank holds the same bits."""
    mine = [[copy.name, copy.tensor.float().tolist(), list(copy.ranks)] for copy in engine.replicas()]
    everywhere = world.gather(mine)
    return {
        "names": [name for name, _, _ in mine],
        "ranks": [ranks for _, _, ranks in mine],
        "equal": all(rank == mine for rank in everywhere),
    }


def run(cases: dict[str, Case], folder: Path, model: Path) -> dict[str, Any]:
    for ranks in sorted({case.ranks for case in cases.values()}):
        run_ranks(ranks, distributed, {n: c for n, c in cases.items() if c.ranks == ranks}, str(model), str(folder))
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in cases}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Any]:
    return run(CASES, tmp_path_factory.mktemp("deepspeed"), tiny_folder)


@pytest.fixture(scope="module")
def slow_results(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Any]:
    return run(SLOW, tmp_path_factory.mktemp("deepspeed-slow"), tiny_folder)


@pytest.fixture(scope="module")
def alone(tiny_folder: Path) -> Any:
    return functools.cache(functools.partial(reference, tiny_folder))


def agree(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """fp32: losses within 1e-5 and norms within 1e-4, relative; parameters within 1e-5."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    if "same" in found:
        assert found["same"] == expected["same"] == [True] * 3
        assert [norm for norm in found["norms"] if norm == "nan"] == ["nan", "nan"]
    norms = [[float(norm) for norm in result["norms"]] for result in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4, nan_ok=True)
    assert max(norm for norm in norms[0] if norm == norm) > 0.5  # clipping was at work
    assert found["parameters"].keys() == expected["parameters"].keys()
    for name, values in expected["parameters"].items():
        assert found["parameters"][name] == pytest.approx(values, abs=1e-5), name
    if "clipped" in found:
        assert found["elements"] == expected["elements"]  # each element once, on one rank
        assert found["clipped"] == pytest.approx(expected["clipped"], rel=1e-4)
        assert max(found["clipped"]) <= 0.5 * (1 + 1e-4)


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """bf16: the same until the first rounding falls otherwise (another order of sums), and near to it from then on."""
    assert found["losses"][:2] == pytest.approx(expected["losses"][:2], rel=1e-5)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-2)
    for name, values in expected["parameters"].items():
        differences = [abs(a - b) for a, b in zip(found["parameters"][name], values, strict=True)]
        assert sum(differences) / len(differences) < 1e-3, name


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", CASES)
def test_zero_gives_the_single_process_numbers(name: str, results: dict[str, Any], alone: Any) -> None:
    compare = agree if CASES[name].dtype == "float32" else close
    compare(results[name], alone(*CASES[name].alone))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SLOW)
def test_zero_gives_the_same_under_every_setting(name: str, slow_results: dict[str, Any], alone: Any) -> None:
    compare = agree if SLOW[name].dtype == "float32" else close
    compare(slow_results[name], alone(*SLOW[name].alone))


def test_copies_are_named_and_the_same_bits(results: dict[str, Any]) -> None:
    for name, result in results.items():
        copies = result["replicas"]
        assert copies["equal"], name
        expected = list(result["parameters"]) if result["stage"] < 3 else []
        assert copies["names"] == expected or sorted(copies["names"]) == sorted(expected), name
        assert all(ranks == [0, 1] for ranks in copies["ranks"])
