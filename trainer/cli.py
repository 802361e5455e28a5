"""The command line. Each verb imports what it needs when it runs: help and checks stay quick."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from trainer import __version__, heartbeat
from trainer.reserve import await_call, in_reserve
from trainer.signals import STOPPED, StoppedEarly, follow_launcher, stop_early

app = typer.Typer(
    name="tunesmith",
    help="Fine-tune language models from one recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew; the old folder is kept under another name.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on the console.")]
AllowDataChange = Annotated[
    bool, typer.Option("--allow-data-change", help="Go on although data, order, batch or seed changed; recorded.")
]
StepOption = Annotated[int | None, typer.Option("--step", help="This step's checkpoint, not the newest good one.")]
BestOption = Annotated[bool, typer.Option("--best", help="The best step by checkpoint.metric.")]
AverageOption = Annotated[str | None, typer.Option("--average", help="An average in RUN/averages, by name.")]
EmaOption = Annotated[bool, typer.Option("--ema", help="The moving average that training kept (ema.decay).")]


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Fine-tune language models from one recipe."""
    if local_rank is not None and str(local_rank) != os.environ.get("LOCAL_RANK"):  # DeepSpeed's launcher says it twice
        from trainer.config.errors import UserError

        raise UserError(f"--local_rank: {local_rank}: differs from the environment's LOCAL_RANK; leave it out")
    if debug:
        os.environ["TUNESMITH_DEBUG"] = "1"
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    no_data: Annotated[bool, typer.Option("--no-data", help="Do not read the data; needs no torch.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a recipe: resolved keys, examples, tokens, steps, memory."""
    from trainer.check import check_recipe, render
    from trainer.config import load_recipe

    result = check_recipe(load_recipe(recipe, overrides), data=not no_data)
    typer.echo(json.dumps(result, indent=2) if as_json else render(result))


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="The recipe reference instead.")] = False,
) -> None:
    """Print the recipe's JSON schema, for editors."""
    from trainer.config.reference import json_schema, recipe_reference

    typer.echo(recipe_reference() if markdown else json.dumps(json_schema(), indent=2))


@app.command()
def prepare(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Read, check and tokenise the data into the cache, without training."""
    from trainer.config import load_recipe
    from trainer.data.prepare import prepare as prepare_sources
    from trainer.session import preflight

    loaded = load_recipe(recipe, overrides)
    preflight(loaded)
    for name, source in prepare_sources(loaded).items():
        typer.echo(f"{name}: {json.dumps(source.counts)}")


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    fresh: Fresh = False,
    quiet: Quiet = False,
    allow_data_change: AllowDataChange = False,
) -> None:
    """Train; goes on from the newest checkpoint if the run's folder has one."""
    from launchers.environment import cpu_environment, restart_with

    restart_with(cpu_environment())
    stop_early()
    follow_launcher()
    if in_reserve():
        import_module("trainer.train")  # with all that it stands on: what the waiting is for
        await_call()
    heartbeat.begin()
    from trainer.config import load_recipe
    from trainer.session import open_session, preflight, standing

    loaded = load_recipe(recipe, overrides)
    preflight(loaded)
    before = standing(loaded, fresh=fresh, allow_data_change=allow_data_change)
    if before.nothing_to_do:
        typer.echo(f"{loaded.output}: complete already; nothing to do (--fresh starts anew)")
        return
    if os.environ.get("RANK", "0") == "0":
        for change in before.changes:
            typer.echo(f"resume: {change} ({change.verdict})")
    with open_session(loaded, fresh=fresh, console=not quiet, allow_data_change=allow_data_change) as run:
        from trainer.train import train as walk  # torch is loaded by now

        run.status = walk(run)
        heartbeat.phase("finish")
        main_rank = run.world.is_main
    if main_rank:
        _report(Path(loaded.output))
    if run.status == "preempted":
        raise typer.Exit(STOPPED)


@app.command()
def launch(
    recipe: RecipePath,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Processes on this machine; default one a GPU, else one.")
    ] = None,
    max_restarts: Annotated[
        int, typer.Option("--max-restarts", min=0, help="Restarts in all; a run that does not get on stops before.")
    ] = 10,
    hang_seconds: Annotated[
        float, typer.Option("--hang-seconds", min=0, help="Silence in a step that is taken for a hang; 0: never.")
    ] = 60.0,
    standby: Annotated[
        bool, typer.Option("--standby", help="Keep ranks in reserve, all imported (0.5 GB each), for quick restarts.")
    ] = False,
    fresh: Fresh = False,
    quiet: Quiet = False,
    allow_data_change: AllowDataChange = False,
) -> None:
    """Train on several processes under a supervisor that starts them again when one dies or hangs.

    Exit codes: 0 complete; 75 stopped by a signal and saved, the same command goes on; 2 recipe or data refused;
    1 failed for good. Logs of each attempt and rank: RUN/logs/attempt-NN/rank-NNNNN.log.
    """
    from launchers.local import Launch
    from launchers.machine import devices
    from launchers.supervisor import supervise
    from trainer.config import load_recipe
    from trainer.config.owner import check_writable
    from trainer.tracking.run_folder import check_run_folder

    folder = Path(load_recipe(recipe, overrides).output)
    check_run_folder(folder)
    check_writable(folder, "output")  # the logs of the ranks come before the ranks
    arguments = ["train", str(recipe), *(overrides or [])]
    arguments += ["--quiet"] * quiet + ["--allow-data-change"] * allow_data_change
    size = nproc or max(1, devices())
    code = supervise(Launch(folder, tuple(arguments), size, max_restarts, hang_seconds, standby, fresh))
    if code:
        raise typer.Exit(code)


def _report(folder: Path) -> None:
    from trainer.tracking.report import write_report  # matplotlib: only at the end

    typer.echo(f"report: {write_report(folder)}")


@app.command()
def report(run: RunPath) -> None:
    """Write RUN/report.html: curves, evaluation, examples, configuration, in one file."""
    _report(run)


@app.command()
def evaluate(
    run: RunPath,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[evaluation.KEY=VALUE]...", help="Overrides of evaluation.")
    ] = None,
    step: StepOption = None,
    best: BestOption = False,
    average: AverageOption = None,
    ema: EmaOption = False,
) -> None:
    """Evaluate a run's newest checkpoint, or the one chosen, on its suites."""
    from launchers.environment import cpu_environment, restart_with

    restart_with(cpu_environment())
    from trainer.revisit import Choice, evaluate_run

    for line in evaluate_run(run, overrides or [], Choice(step, best, average, ema)):
        typer.echo(line)


@app.command()
def average(
    run: RunPath,
    last: Annotated[int | None, typer.Option("--last", help="The newest k checkpoints.")] = None,
    best: Annotated[int | None, typer.Option("--best", help="The best k by the metric measured in training.")] = None,
    steps: Annotated[str | None, typer.Option("--steps", help="These steps: 10,20,30.")] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Those that make the average better, measured on the recipe's suites.")
    ] = False,
    metric: Annotated[
        str | None, typer.Option("--metric", help="With --best and --greedy; default checkpoint.metric.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the average; default from the rule.")] = None,
) -> None:
    """Average a run's checkpoints into RUN/averages, for evaluate and export."""
    from launchers.environment import cpu_environment, restart_with

    restart_with(cpu_environment())
    from trainer.averaging import Pick, average_run, parse_steps

    average_run(run, Pick(last, best, parse_steps(steps), greedy, metric), name, typer.echo)


@app.command()
def compare(run_a: RunPath, run_b: RunPath) -> None:
    """Compare two runs on the suites they share, paired by example, with significance."""
    from trainer.evaluation.compare import compare as compare_runs
    from trainer.evaluation.compare import table

    typer.echo(table(compare_runs(run_a, run_b)))


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path | None, typer.Option("--out", help="Folder; default RUN/export.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Only the adapter, unmerged.")] = False,
    step: StepOption = None,
    best: BestOption = False,
    average: AverageOption = None,
    ema: EmaOption = False,
) -> None:
    """Write an ordinary Hugging Face folder of a run's newest or chosen checkpoint, checked by its logits."""
    from trainer.revisit import Choice, export_run

    result = export_run(run, out or run / "export", adapter, Choice(step, best, average, ema))
    typer.echo(json.dumps(result))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where data and run go.")] = Path("runs/demo"),
    overrides: Overrides = None,
) -> None:
    """Fine-tune a real small model on the demo's data, evaluate, export, report."""
    from trainer.demo.run import demo as run_demo

    raise typer.Exit(run_demo(folder, overrides or []))


def main() -> None:
    """Run a verb; errors become one line and an exit code."""
    from trainer.tracking.streams import keep_secrets

    keep_secrets(debug="--debug" in sys.argv)
    os.umask(os.umask(0o077) | 0o002)  # whatever the shell says, what a run writes is not for everybody to change
    logging.basicConfig(level=os.environ.get("TUNESMITH_LOG", "WARNING"), format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # tells every CPU run of kernels it could not download
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft asks transformers the old way
    from trainer.config.errors import RunError, UserError

    try:
        app()
    except (UserError, RunError) as error:
        _fail(error, error.exit_code)
    except StoppedEarly as stop:
        print(f"tunesmith: {stop}", file=sys.stderr, flush=True)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt as error:
        _fail(error, 130)
    except Exception as error:  # noqa: BLE001 - the last resort: one line and exit 1, traceback by --debug
        _fail(error, 1)


def _fail(error: BaseException, code: int) -> None:
    from trainer.tracking.redact import known_secrets, redact

    if os.environ.get("TUNESMITH_DEBUG"):
        traceback.print_exception(error)
    message = str(error) or type(error).__name__
    known = hasattr(error, "exit_code")
    text = message if known else f"{type(error).__name__}: {message.splitlines()[0]} (--debug shows the traceback)"
    text = redact(text, known_secrets(os.environ))  # the heartbeat's file holds it too
    heartbeat.ended(text)
    print(f"tunesmith: error: {text}", file=sys.stderr, flush=True)
    sys.exit(code)
