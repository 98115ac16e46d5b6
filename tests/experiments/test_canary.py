"""The command ``foreshock canary``: what it is told, and its whole cycle on tiny runs."""

import re
import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from foreshock.experiments import canary
from foreshock.experiments.canary import Command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "band= is missing: foreshock canary band=DIR"),
        (["band=b", "store=0"], "store=0 is not allowed: a whole number from 1"),
        (["band=b", "store=many"], "store=many is not allowed: a whole number from 1"),
        (["band=b", "store=19", "runs=r"], "store and runs are not allowed together"),
        (["band=b", "healthy=h", "runs=r"], "healthy and runs are not allowed together"),
        (["band=b", "runs=r", "train.clip=2"], "train.clip=2 has no effect on runs that are there already (runs=r)"),
        (["band=b", "alpha=1.5"], "alpha=1.5 is not allowed: a number between 0 and 1"),
        (["band=b", "alpha=x"], "alpha=x is not allowed: a number between 0 and 1"),
        (["band=b", "seeds=[1,1]"], "seeds=[1,1] is not allowed: how many, or a list of different ones"),
        (["band=b", "seeds=[]"], "seeds=[] is not allowed"),
        (["band=b", "seeds=[1,x]"], "seeds=-1 is not allowed: an integer from 0"),
        (["band=b", "seed=3"], "seed=3 is not allowed: a canary's seeds are seeds="),
        (["band=b", "alpha=0.2"], "alpha=0.2 has no effect on a canary: alpha is that of its band"),
        (["band=b", "runs=r", "seeds=7"], "seeds=7 has no effect on runs that are there already"),
        (["band=b", "healthy=h", "at_once=1"], "at_once=1 has no effect on runs that are there already"),
        (["band=b", "store=19", "seeds=2"], "seeds=2 has no effect on a band"),
        (["band=b", "seeds=2", "seeds=3"], "seeds= is given twice: 2 and 3"),
        (["band=b", "verbose"], "'verbose' is not allowed: key=value"),
        (["band=b", "--fast=1"], "'--fast=1' is not allowed: key=value"),
    ],
)
def test_a_mistake_is_one_line(arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        Command.of(arguments)
    assert "\n" not in str(error.value)


def run(monkeypatch, capfd, *arguments: str) -> tuple[int, str]:
    """The command in this process: its exit code, and what it said."""
    monkeypatch.setattr(sys, "argv", ["foreshock canary", *arguments])
    try:
        canary.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    said = capfd.readouterr()
    return code, said.out + said.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["band={}"], "holds no band: store one with store=19"),
        (["band={}", "store=5"], "store=5 is not allowed with alpha=0.1: at least 19 healthy runs are needed"),
        (["band={}", "store=19", "fault=bf16_shift"], "fault=bf16_shift is not allowed with store"),
        (
            ["band={}", "store=19", "train.stepz=9"],
            "train.stepz is not a key of the configuration (did you mean 'steps'",
        ),
        (["band={}", "healthy={}/none"], "none' is not allowed: there is no such folder"),
        (["band={}", "healthy={}"], "holds no finished healthy run"),
    ],
)
def test_a_mistake_ends_the_command_with_code_2(arguments, said, tmp_path, monkeypatch, capfd):
    code, output = run(monkeypatch, capfd, *(argument.format(tmp_path) for argument in arguments))
    assert code == 2 and said in output and "Traceback" not in output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_cycle_stores_a_band_finds_nothing_and_finds_a_fault(text, tiny, tmp_path, monkeypatch, capfd):
    small = [*tiny, "data=text", f"data.path={text}", "monitor=[loss,gradient_norm,attention_laws]", "train.steps=40"]
    band = f"band={tmp_path / 'band'}"
    # alpha 0.25 takes 3 calibration runs beside the 10 that set bands and scales
    code, said = run(monkeypatch, capfd, band, "store=13", "alpha=0.25", "at_once=1", *small)
    assert code == 0 and "signals of 13 healthy runs of 40 steps" in said
    code, said = run(monkeypatch, capfd, band, "store=13", "alpha=0.25", *small)
    assert code == 2 and "holds a band already" in said

    code, said = run(monkeypatch, capfd, band, "seeds=2", "at_once=1")
    assert code == 0 and "changed: nothing" in said and "IDENTICAL: every reading is that of the healthy run" in said
    code, said = run(monkeypatch, capfd, band, "seeds=2", "at_once=1", "fault=bf16_shift", "fault.bits=6")
    assert code == 1 and "OUTSIDE: 2 of 2 runs stand outside the healthy band, first" in said
    assert "fault._target_ faults.none.NoFault -> faults.bf16_shift.BF16Shift" in said
    table = pd.read_csv(tmp_path / "band" / "canary-2" / "canary.csv")
    assert {"value_shift_residual.over_noise"} <= set(table.signal) and (table.statistic > table.limit).all()
    assert (tmp_path / "band" / "canary-2" / "canary.png").exists()

    # the runs of a script of one's own: folders, and no settings to train with
    other = f"band={tmp_path / 'other'}"
    code, said = run(monkeypatch, capfd, other, f"healthy={tmp_path / 'band' / 'healthy'}", "alpha=0.25")
    assert code == 0
    code, said = run(monkeypatch, capfd, other)
    assert code == 2 and "is of runs that were trained elsewhere: give yours as runs=DIR" in said
    code, said = run(monkeypatch, capfd, other, f"runs={tmp_path / 'band' / 'canary-1' / 'runs'}")
    assert code == 0 and "IDENTICAL" in said
    code, said = run(monkeypatch, capfd, other, f"runs={tmp_path / 'band' / 'canary-2' / 'runs'}")
    assert code == 1 and "OUTSIDE" in said


@pytest.mark.parametrize("line", ["train.steps=300", "+train.steps=300", "++train.steps=300"])
def test_steps_that_are_given_stay(line):
    assert canary._with_steps((line,)) == (line,)
    assert canary._with_steps(("train.clip=2",)) == ("train.clip=2", canary.STEPS)


def test_more_seeds_than_the_band_has_are_refused():
    band = SimpleNamespace(seeds=[4, 7])
    assert canary._seeds_of(band, 2) == [4, 7] and canary._seeds_of(band, (1, 2, 3)) == (1, 2, 3)
    with pytest.raises(ValueError, match="seeds=3 is not allowed: the band has 2 to choose from"):
        canary._seeds_of(band, 3)
