"""``align locate``: the first operation at fault."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from align.commands.people import for_people
from paddledsv4.errors import UserError

EXAMPLES = (
    "Examples:  [bold]align locate tiny-fp32 --numerics paddle[/]   "
    "[bold]align locate ./my-bundle --numerics megatron --steps 2 --out runs/mine[/]"
)


def locate(
    bundle: Annotated[str, typer.Argument(help="A bundle's directory, or a shipped one's name: tiny-fp32.")],
    numerics: Annotated[
        str | None, typer.Option(help="The candidate's preset; PADDLEDSV4_NUMERICS, or paddle, by default.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The preset that stands for Megatron; torch, or megatron without torch.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to compare, each on the reference's own state.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Directory for locate.json, which align report shows.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find the first operation at fault: forward, backward, optimizer, in execution order.

    The reference preset is first held against the tensors that the bundle recorded. Then the candidate runs with every
    op on the reference's own inputs and with its discrete choices, so an error cannot travel: what an op gets and where
    its gradients go must agree to the bit, and what it computes to within the noise of legal computations, which is
    measured for each call on the spot. Takes about ten times as long as the steps themselves.

    Exit code 0: no fault. 1: a fault; it is named. 2: bad input.
    """
    with for_people():
        from align.bundle import load_bundle
        from paddledsv4.host import prepare_host

        loaded = load_bundle(bundle)
        if loaded.parallel.world_size > 1:
            raise UserError(f"bundle {loaded.name} was recorded on several ranks; align locate looks at one card")
        if steps > loaded.training.steps:
            raise UserError(f"--steps {steps}: bundle {loaded.name} records steps 1 to {loaded.training.steps}")
        prepare_host(bitwise=True)
        from align.locate.run import Located, trainer_of
        from align.locate.run import locate as search
        from align.locate.show import as_dict, show, trace_line
        from align.locate.trace_check import check_trace
        from paddledsv4.numerics.policy import Policy, installed

        make = trainer_of(loaded)
        standard = Policy.preset(reference or ("torch" if installed("torch") else "megatron"))
        candidate = Policy.from_env(numerics)
        check = check_trace(loaded, make(standard))
        with _progress() as progress:
            found: Located = search(make, standard, candidate, steps, progress)
        result = as_dict(found, check)
        if out is not None:
            _write(out, result)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        from rich.console import Console

        print(trace_line(check, standard.name))
        show(found, Console(width=None if sys.stdout.isatty() else 130))
    trace_failed = check is not None and check.first is not None
    raise typer.Exit(1 if found.first or trace_failed else 0)


class _progress:
    """A bar on stderr for each of the two passes; silent when stderr is no terminal."""

    def __enter__(self):
        from rich.console import Console
        from rich.progress import Progress

        self.bars = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self.tasks: dict[str, int] = {}
        self.bars.start()
        return self._update

    def _update(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what, total=total)
        self.bars.update(self.tasks[what], completed=done, total=total)

    def __exit__(self, *error) -> None:
        self.bars.stop()


def _write(out: Path, result: dict) -> None:
    """locate.json, whole or not at all."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = out / "locate.json.part"
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        temporary.replace(out / "locate.json")
    except OSError as error:
        raise UserError(f"cannot write {out / 'locate.json'}: {error.strerror}") from None
