"""A verb of `mmrl` in the process of the test: `run_command` of tests/processes.py without a process."""

from pathlib import Path

from typer.testing import CliRunner

from mmrl.cli import app
from mmrl.rollout import Rollout


def run_verb(verb: str, *arguments: object) -> str:
    """Run `mmrl VERB ARGUMENTS`, which must end well.

    Returns:
        What it printed.
    Raises:
        Exception: what the verb raised, as it was raised.
    """
    done = CliRunner().invoke(app, [verb, *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def stored_rollouts(folder: Path) -> list[Rollout]:
    """All batches of a folder that `rollouts: FOLDER` wrote, in order."""
    return [Rollout.load(batch) for batch in sorted(folder.glob("0*"))]
