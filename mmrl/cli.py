"""The command line. Heavy modules are imported inside the verbs, so that --help is instant."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mmrl.extras import how_to_install

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=("Train models from rewards on steps: vision-language, diffusion, video."),
)

Format = Annotated[str, typer.Option("--format", help="Of the data: `mmrl list formats`, or module:function")]
Recipe = Annotated[Path, typer.Argument(help="A recipe, such as configs/diffusion/digits_branch.yaml")]
SCORER = (
    "A saved scorer's folder, a name of `mmrl list scorers`, or a section: '{name: generative_prm, policy: {...}}'"
)
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value, such as optim.lr=1e-4")]


@app.command()
def train(recipe: Recipe, overrides: Overrides = None) -> None:
    """Run a recipe."""
    from mmrl.config import load_config
    from mmrl.trainers import trainer_of
    from mmrl.trainers.preflight import check_folder

    config = load_config(recipe, overrides or [])
    check_folder(config)
    trainer = trainer_of(config)
    trainer.train()
    page = trainer.loop.folder.root / "report.html"
    if trainer.loop.is_main and page.exists():
        typer.echo(f"report: {page.resolve()}")


@app.command()
def doctor(recipe: Recipe, overrides: Overrides = None) -> None:
    """Try a recipe before it costs hours: forecast, one iteration, verdicts; exits with 1 when it cannot learn."""
    from mmrl.config import load_config

    config = load_config(recipe, overrides or [])
    from mmrl.doctor import examine

    hopeless = False
    for line in examine(config):
        typer.echo(str(line))
        hopeless = hopeless or line.hopeless
    if hopeless:
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The run.output of a run")],
    against: Annotated[list[Path] | None, typer.Option(help="Another run whose curves are drawn beside")] = None,
) -> None:
    """Write RUN/report.html: curves, samples, trees."""
    from mmrl.report.page import write_report

    typer.echo(f"report: {write_report(run, against or [])}")


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="estimators, transforms, readings, rewards ...; default all kinds")] = "",
    name: Annotated[str, typer.Argument(help="One row of the kind, in full")] = "",
    reads: Annotated[str | None, typer.Option(help="Only rows that read this field, such as value")] = None,
    writes: Annotated[str | None, typer.Option(help="Only rows that write this field, such as tags.wrong")] = None,
    page: Annotated[
        str, typer.Option(help="Print a reference page of docs/: callbacks, capabilities, credit, readings")
    ] = "",
) -> None:
    """List what a recipe can name: what each row reads and writes, where it fits and comes from."""
    from mmrl import registry_pages

    if page:
        typer.echo(registry_pages.page(page), nl=False)
        return
    if name:
        typer.echo(registry_pages.describe(kind, name))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "reads", "writes", "fits", "source") if kind else Table("kind", "names")
    for row in registry_pages.table(kind, reads, writes) if kind else registry_pages.overview():
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@app.command()
def annotate(recipe: Recipe, overrides: Overrides = None) -> None:
    """Label the steps of solutions: Monte Carlo, OmegaPRM, judges, scorers."""
    from mmrl.config import load_section
    from mmrl.reasoning.annotate.recipe import AnnotateConfig

    config = load_section(recipe, AnnotateConfig, overrides or [])
    from mmrl.reasoning.annotate.verb import run_annotate

    report = run_annotate(config)
    if report:
        typer.echo(f"{report['records']} records, {report['steps']} steps: {config.output / 'records.jsonl'}")


@app.command()
def rollouts(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="Folder; repeat the command to go on where it was cut short")],
    overrides: Overrides = None,
) -> None:
    """Sample and reward branch rollouts and keep them: run.iterations batches for `rollouts: DIR` of other recipes."""
    from mmrl.config import load_config

    config = load_config(recipe, overrides or [])
    from mmrl.trainers.rollouts import run_rollouts

    numbers = run_rollouts(config, out)
    if numbers:
        typer.echo(
            f"{numbers['rollouts']} rollouts, {numbers['prompts']} prompts, {numbers['leaves']} leaves, "
            f"mean reward {numbers['reward']:.3f}: {out}"
        )


@app.command()
def score(
    scorer: Annotated[str, typer.Option(help=SCORER)],
    data: Annotated[Path, typer.Option(help="Solutions, JSON lines")],
    out: Annotated[Path, typer.Option(help="Where the scores go, JSON lines")] = Path("scores.jsonl"),
    format_: Annotated[
        str, typer.Option("--format", help="Of the data: `mmrl list formats`, or module:function")
    ] = "records",
) -> None:
    """Score every step of written solutions."""
    from mmrl.reasoning.verbs import run_score

    numbers = run_score(_section(scorer), data, out, _section(format_))
    typer.echo(
        f"{numbers['records']} solutions, {numbers['unscored']} unscored, {numbers['quarantined']} set aside: {out}"
    )


@app.command()
def convert(
    data: Annotated[Path, typer.Argument(help="Step-labelled solutions: JSON lines, a .json array or parquet")],
    out: Annotated[Path, typer.Argument(help="JSON lines to write")],
    format_: Format,
    to: Annotated[str, typer.Option(help="`mmrl list exporters`, or module:function")] = "records",
    media_root: Annotated[Path | None, typer.Option(help="Folder that pictures are relative to")] = None,
    max_bad: Annotated[float, typer.Option(help="Share of bad rows above which nothing is written")] = 0.05,
) -> None:
    """Write step-labelled solutions in another of the published formats."""
    from mmrl.reasoning.formats import convert as convert_file

    count, bad = convert_file(data, out, _section(format_), _section(to), media_root=media_root, max_bad=max_bad)
    typer.echo(f"{count} rows, {len(bad)} set aside: {out}")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run folder, RUN/checkpoints/000040, or RUN/model")],
    out: Annotated[Path, typer.Argument(help="New folder")],
    merge: Annotated[bool, typer.Option("--merge", help="With LoRA: add it to the weights of its base")] = False,
) -> None:
    """Write the model of a run, at any time, as a folder that transformers, PEFT or diffusers load."""
    from mmrl.trainers.export import export_model

    typer.echo(f"{export_model(source, out, merge=merge)}: {out}")


@app.command()
def search(recipe: Recipe, overrides: Overrides = None) -> None:
    """Best-of-N, votes, guided search, beams, MCTS with a step scorer."""
    from mmrl.config import load_section
    from mmrl.search.recipe import SearchConfig

    config = load_section(recipe, SearchConfig, overrides or [])
    from mmrl.search.verb import run_search

    report = run_search(config)
    for name, row in report["reward" if "reward" in report else "accuracy"].items():
        typer.echo(f"{name:24} {row['mean']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]")


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="processbench, prmbench, visualprocessbench, mpbench, ...")],
    data: Annotated[Path, typer.Option(help="File or folder in the benchmark's own layout")],
    scorer: Annotated[str, typer.Option(help=SCORER)],
    out: Annotated[Path | None, typer.Option(help="JSON report")] = None,
    threshold: Annotated[float, typer.Option(help="A step is right from here on")] = 0.5,
    tune_on: Annotated[Path | None, typer.Option(help="Another split on which the threshold is chosen")] = None,
    aggregate: Annotated[str, typer.Option(help="Step scores -> score of a response; default the scorer's own")] = "",
    media_root: Annotated[Path | None, typer.Option(help="Folder that pictures are relative to")] = None,
) -> None:
    """Measure a step scorer on a public benchmark's file."""
    from mmrl.reasoning.verbs import run_benchmark
    from mmrl.scorers.scoring import aggregate_of

    chosen = _section(scorer)
    run_benchmark(
        name,
        data,
        chosen,
        out,
        threshold=threshold,
        tune_on=tune_on,
        media_root=media_root,
        aggregate=aggregate or aggregate_of(chosen),
    )


@app.command()
def demo(
    name: Annotated[str, typer.Argument(help="vision, diffusion, or all: side by side, one report")] = "all",
    overrides: Overrides = None,
    folder: Annotated[Path | None, typer.Option(help="Where the runs go; by default a new one below runs/")] = None,
) -> None:
    """Run the built-in jobs from nothing, in a few minutes on two CPU cores."""
    from mmrl.demo import run_all, run_demo

    where = folder or _unused(Path("runs/demo"))
    page = run_all(where, overrides or []) if name == "all" else run_demo(name, where, overrides or [])
    typer.echo(f"report: {page.resolve()}")


def _section(text: str) -> str | dict[str, Any]:
    """A name or folder as it is, or the section in a text in braces, which is YAML."""
    if not text.startswith("{"):
        return text
    import yaml

    from mmrl.config import read_yaml

    try:
        return dict(read_yaml(text))
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is no YAML mapping: {error}") from None


def _unused(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3 ... that does not exist: a demo can be repeated."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def main() -> None:
    """Entry point; errors that a user can mend print as one message, without a traceback (MMRL_DEBUG=1 shows it)."""
    # Spinning OpenMP threads of several processes fight for the cores: several times slower on two of them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("accelerate", "httpx", "urllib3", "filelock", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        app(standalone_mode=True)
    except Exception as error:
        message = _message(error)
        if message is None or os.environ.get("MMRL_DEBUG"):
            raise
        typer.echo(f"error: {message}", err=True)
        raise SystemExit(2) from None


def _message(error: Exception) -> str | None:
    """The message of an error that a user can mend; None for a mistake of the program, which needs its traceback."""
    from safetensors import SafetensorError

    text = str(error)
    if isinstance(error, ImportError):
        remedy = how_to_install(error)
        return text + remedy if remedy else None
    if not isinstance(error, ValueError | RuntimeError | OSError | SafetensorError):
        return None
    # The message of gloo, which has a stack, when another process has ended.
    if isinstance(error, RuntimeError) and re.search(r"Connection (closed|reset) by peer", text):
        return "another process of this run has ended; its own message says why"
    disk_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # Libraries that write by themselves raise errors of their own with this text.
    if disk_full or "No space left on device" in text:
        return f"{text}; make room and repeat the command, with run.resume=true where it trained"
    return text
