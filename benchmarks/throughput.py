"""Training throughput and peak memory of Tunesmith beside TRL's SFTTrainer: same model, data, LoRA, batch and dtype.

    python benchmarks/throughput.py --data train.jsonl [--pairs 3] [--steps 8] [--model FOLDER] [--device cpu|cuda]

Each side runs as a process of its own, in turn, `--pairs` times, the order swapped from pair to pair; both train once
over the same (warm + steps) * batch examples, truncated on the right at `--max-length`. Counted are real tokens (no
padding) of the optimizer steps after the first `--warm`, and their wall time; memory is the process's peak resident set
(`ru_maxrss`) on a CPU, the allocator's peak on a GPU. `--data` is JSONL in the Alpaca form (instruction, input,
output), targets are the answers.

Tunesmith runs as its user runs it, `python -m trainer train RECIPE`. TRL runs with its defaults (gradient checkpointing
on, bf16 autocast, fp32 adapters, sdpa) but for what must be equal: bf16 base, LoRA rank, batch, length, learning rate.
`--trl-checkpointing off` and `--trl-padding-free` give it other settings; the rows say which.

Rows are appended to benchmarks/results/throughput.csv; the last lines are `name: value`, medians over the pairs.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "peft", "trl")
COLUMNS = [
    *(
        "when",
        "pair",
        "order",
        "side",
        "tokens_per_second",
        "tokens",
        "seconds",
        "peak_memory_mib",
        "ratio",
        "memory_ratio",
    ),
    *(
        "device",
        "threads",
        "model",
        "data",
        "batch",
        "max_length",
        "rank",
        "dtype",
        "steps",
        "settings",
        "versions",
        "load",
    ),
]


def main() -> None:
    """Parse the arguments and run one side (in a child) or all pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="JSONL with instruction, input, output")
    parser.add_argument(
        "--model", default=None, help="folder or hub id; default: the demo model, SmolLM2-135M-Instruct"
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps that are timed")
    parser.add_argument("--warm", type=int, default=2, help="optimizer steps before them")
    parser.add_argument("--batch", type=int, default=4, help="examples of one optimizer step")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="OMP_NUM_THREADS of both sides")
    parser.add_argument("--trl-checkpointing", choices=["on", "off"], default="on")
    parser.add_argument("--trl-padding-free", action="store_true")
    parser.add_argument("--sides", nargs="+", choices=["tunesmith", "trl"], default=["tunesmith", "trl"])
    parser.add_argument("--results", type=Path, default=HERE / "results" / "throughput.csv")
    parser.add_argument("--side", choices=["trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side == "trl":
        train_with_trl(arguments)
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Run the pairs in turn, append their rows and print the headline."""
    if arguments.model is None:
        from trainer.demo.model import demo_model

        arguments.model = str(demo_model())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="throughput-") as name:
        folder = Path(name)
        conversations = write_conversations(arguments, folder)
        print(f"{conversations} examples, {arguments.pairs} pairs", flush=True)
        for pair in range(arguments.pairs):
            sides = arguments.sides[:: 1 if pair % 2 == 0 else -1]
            results = {side: run_side(arguments, side, folder / f"{side}-{pair}") for side in sides}
            rows += pair_rows(arguments, pair, sides, results)
            append(arguments.results, rows[-len(sides) :])
            for row in rows[-len(sides) :]:
                print(*(f"{k}={row[k]}" for k in COLUMNS[1:10]), flush=True)
    for side in arguments.sides:
        mine = [row for row in rows if row["side"] == side]
        print(f"{side}_tokens_per_second: {statistics.median(row['tokens_per_second'] for row in mine):.1f}")
        print(f"{side}_peak_memory_mib: {statistics.median(row['peak_memory_mib'] for row in mine):.0f}")
    if len(arguments.sides) == 2:
        paired = [row for row in rows if row["side"] == "tunesmith"]
        print(f"memory_ratio: {statistics.median(row['memory_ratio'] for row in paired):.2f}")
        print(f"speed_ratio_least: {min(row['ratio'] for row in paired):.2f}")
        print(f"speed_ratio: {statistics.median(row['ratio'] for row in paired):.2f}")


def write_conversations(arguments: argparse.Namespace, folder: Path) -> int:
    """The conversations of both sides, as JSONL of `messages`; returns how many. Raises SystemExit for too few."""
    wanted = (arguments.warm + arguments.steps) * arguments.batch
    written = 0
    with (
        arguments.data.open(encoding="utf-8") as source,
        (folder / "train.jsonl").open("w", encoding="utf-8") as target,
    ):
        for line in source:
            row = json.loads(line)
            question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
            if written == wanted or not question.strip() or not row["output"].strip():
                continue
            # A prompt that fills the length would leave a truncated example without targets.
            if len(question) > 2 * arguments.max_length:
                continue
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
            target.write(json.dumps({"messages": turns}) + "\n")
            written += 1
    if written < wanted:
        raise SystemExit(f"{arguments.data}: {written} usable rows, {wanted} needed: lower --steps")
    return written


def run_side(arguments: argparse.Namespace, side: str, output: Path) -> dict[str, float]:
    """Train in a process of its own; {tokens, seconds, memory (MiB)} of the timed steps."""
    data = output.parent / "train.jsonl"
    if side == "tunesmith":
        recipe = output.with_suffix(".yaml")
        recipe.write_text(json.dumps(tunesmith_recipe(arguments, data, output)))  # JSON is YAML
        command = [sys.executable, "-m", "trainer", "train", str(recipe)]
    else:
        names = ("model", "batch", "max_length", "rank", "device", "trl_checkpointing", "steps", "warm")
        options = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in names]
        flags = ["--trl-padding-free"] if arguments.trl_padding_free else []
        command = [sys.executable, str(HERE / "throughput.py"), "--side=trl", f"--data={data}", f"--folder={output}"]
        command += options + flags
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")]).rstrip(
        os.pathsep
    )
    if arguments.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    log = output.with_suffix(".log")
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{side} failed ({process.returncode}):\n{log.read_text()[-3000:]}")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row.get("kind") == "step"][arguments.warm :]
    if len(steps) != arguments.steps:
        raise SystemExit(f"{side}: {len(steps)} timed steps, {arguments.steps} expected")
    resident = usage.ru_maxrss / 1024  # Linux counts KiB
    memory = resident if arguments.device == "cpu" else max(row["memory_bytes"] for row in steps) / 2**20
    tokens, seconds = (sum(row[key] for row in steps) for key in ("tokens", "seconds"))
    # A load above the number of threads: somebody else was computing too, and the speed says little.
    return {"tokens": tokens, "seconds": seconds, "memory": memory, "load": os.getloadavg()[0]}


def tunesmith_recipe(arguments: argparse.Namespace, data: Path, output: Path) -> dict[str, Any]:
    """The recipe of one run, written as a user would write it."""
    return {
        "name": "throughput",
        "output": str(output),
        "model": {"path": arguments.model, "dtype": "bfloat16", "max_length": arguments.max_length},
        "tuning": {"method": "lora", "rank": arguments.rank, "alpha": 2 * arguments.rank, "targets": "all-linear"},
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "schedule": {"name": "linear"},
        "batch": {"examples": arguments.batch},
        "sources": {"instructions": {"path": str(data), "format": "messages", "truncation": "right"}},
        "stages": [{"name": "train", "mixture": {"instructions": 1.0}, "until": {"epochs": 1}}],
    }


def train_with_trl(arguments: argparse.Namespace) -> None:
    """One TRL run; writes metrics.jsonl with the rows that Tunesmith writes: kind, tokens, seconds, memory_bytes."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        """Wall time from the end of one optimizer step to the end of the next, data loading included."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_begin(self, *unused: Any, **ignored: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_step_end(self, *unused: Any, **ignored: Any) -> None:
            self.ends.append(time.perf_counter())

    rows = [json.loads(line)["messages"] for line in arguments.data.read_text(encoding="utf-8").splitlines()]
    data = Dataset.from_list([{"prompt": turns[:1], "completion": turns[1:]} for turns in rows])
    config = SFTConfig(
        output_dir=str(arguments.folder),
        per_device_train_batch_size=arguments.batch,
        num_train_epochs=1,
        max_length=arguments.max_length,
        learning_rate=1e-4,
        gradient_checkpointing=arguments.trl_checkpointing == "on",
        padding_free=arguments.trl_padding_free,
        model_init_kwargs={"dtype": "bfloat16"},
        use_cpu=arguments.device == "cpu",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    tokens: list[int] = []
    clock = Clock()

    class Counting(SFTTrainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **keywords: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
            return super().compute_loss(model, inputs, *rest, **keywords)

    trainer = Counting(
        model=arguments.model,
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        peft_config=LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules="all-linear"),
        callbacks=[clock],
    )
    trainer.train()
    memory = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else 0
    spans = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    write_steps(arguments.folder, tokens, spans, memory)


def write_steps(folder: Path, tokens: list[int], spans: list[float], memory: int) -> None:
    """The `step` rows of a run in the form of Tunesmith's metrics.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as sink:
        for count, seconds in zip(tokens, spans, strict=True):
            row = {"kind": "step", "tokens": count, "seconds": seconds, "memory_bytes": memory}
            sink.write(json.dumps(row) + "\n")


def pair_rows(
    arguments: argparse.Namespace, pair: int, sides: list[str], results: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """The CSV rows of one pair; `ratio` and `memory_ratio` are Tunesmith over TRL and stand in Tunesmith's row."""
    rows = []
    speed = {side: result["tokens"] / result["seconds"] for side, result in results.items()}
    for order, side in enumerate(sides):
        settings = "trainer train" if side == "tunesmith" else f"checkpointing={arguments.trl_checkpointing}"
        if side == "trl" and arguments.trl_padding_free:
            settings += " padding_free"
        both = side == "tunesmith" and len(results) == 2
        rows.append(
            {
                "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "pair": pair,
                "order": order,
                "side": side,
                "tokens_per_second": round(speed[side], 1),
                "tokens": int(results[side]["tokens"]),
                "seconds": round(results[side]["seconds"], 2),
                "peak_memory_mib": round(results[side]["memory"]),
                "ratio": round(speed["tunesmith"] / speed["trl"], 3) if both else "",
                "memory_ratio": round(results["tunesmith"]["memory"] / results["trl"]["memory"], 3) if both else "",
                "device": device_name(arguments.device),
                "threads": arguments.threads,
                "model": Path(arguments.model).name,
                "data": f"{arguments.data.parent.name}/{arguments.data.name}",
                "batch": arguments.batch,
                "max_length": arguments.max_length,
                "rank": arguments.rank,
                "dtype": "bfloat16",
                "steps": arguments.steps,
                "settings": settings,
                "versions": " ".join(f"{name}={importlib.metadata.version(name)}" for name in PACKAGES),
                "load": round(results[side]["load"], 2),
            }
        )
    return rows


def device_name(device: str) -> str:
    """The processor's or the GPU's name."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to the CSV, with a header where it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as sink:
        writer = csv.DictWriter(sink, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
