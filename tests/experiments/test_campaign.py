"""``foreshock campaign``: which runs it chooses, and a whole campaign on tiny runs."""

import re

import pandas as pd
import pytest

from foreshock.experiments import campaign, faults, trace
from foreshock.experiments.campaign_runs import Campaign, cells, chosen_rows
from foreshock.experiments.cli import guarded
from foreshock.experiments.faults import NEEDS
from foreshock.experiments.training import checkpoint
from foreshock.faults.base import Fault
from tests.experiments.test_resume import Killed

SMOKE = {
    "name": "mine",
    "faults": None,
    "doses": "largest",
    "onsets": [10],
    "own_onset": ["adam_step_stuck", "init_scale", "warmup_off"],
    "seeds": 1,
    "draw": None,
    "overrides": [],
}


LARGER = ["model.n_heads=4", "train.steps=40"]
"""Of a tiny run: heads for groups of two."""


@pytest.fixture(scope="module")
def rows():
    return faults.rows()


@pytest.fixture
def healthy(make_run):
    """By need, a tiny run that has it."""
    return {need: make_run(*overrides, *LARGER) for need, overrides in NEEDS.items()}


def test_every_fault_is_there_once_at_its_largest_dose(rows, healthy):
    chosen = cells(Campaign(**SMOKE), rows, healthy, 0)
    assert [cell.fault for cell in chosen] == [row.name for row in rows]
    by_name = {cell.fault: cell for cell in chosen}
    assert by_name["bf16_shift"].keys == {"bits": 7, "onset": 10}
    assert by_name["init_scale"].onset is None and by_name["combined"].keys == {}
    assert by_name["clip_off"].overrides == ["fault=clip_off", "fault.factor=null", "fault.onset=10"]


def test_doses_onsets_and_seeds_multiply(rows, healthy):
    named = SMOKE | {"faults": ["label_noise"], "doses": "all", "onsets": [3, 5], "seeds": 2}
    chosen = cells(Campaign(**named), chosen_rows(Campaign(**named), rows), healthy, 0)
    assert len(chosen) == 3 * 2 * 2 == len({(cell.dose["share"], cell.onset, cell.seed) for cell in chosen})


def test_a_draw_is_pure_in_its_seed_distinct_and_wide(rows, healthy):
    draw = Campaign(**SMOKE | {"draw": 40, "onsets": [5, 30], "doses": "all", "seeds": 3})
    without_controls = chosen_rows(draw, rows)
    assert {row.family for row in rows} - {row.family for row in without_controls} == {"benign"}
    chosen = cells(draw, without_controls, healthy, 7)
    assert chosen == cells(draw, without_controls, healthy, 7)
    assert chosen != cells(draw, without_controls, healthy, 8)
    assert len(chosen) == len({repr(cell) for cell in chosen}) == 40
    family = {row.name: row.family for row in rows}
    assert len({family[cell.fault] for cell in chosen}) >= 8  # of 14, each as likely as the others
    assert {cell.seed for cell in chosen} == {3000, 3001, 3002}
    onsets = [cell.onset for cell in chosen if cell.onset is not None]
    assert len(set(onsets)) > 5 and min(onsets) >= 5 and max(onsets) <= 30
    assert any(cell.site for cell in chosen)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["campaign=smoke", "n=5"], "n=5 has no effect on campaign=smoke, which draws nothing"),
        (["campaign=random", "n=0"], "n=0 is not allowed: at least 1"),
        (["campaign=smok"], "campaign=smok is not an option of campaign (did you mean 'smoke'?"),
        (["campaign.faults=[clip_of]"], "campaign.faults='clip_of' is not allowed"),
        (
            ["campaign.faults=[clip_off]", "campaign.onsets=[500]"],
            "campaign.onsets=[500] is not allowed: 500 is after the end, train.steps=300",
        ),
        (["campaign.doses=big"], "campaign.doses='big' is not allowed: one of largest, smallest, all"),
        (["fault=clip_off"], "fault=clip_off has no effect on a campaign"),
        (["campaign.onsets=[5,5]"], "campaign.onsets=[5, 5] is not allowed: 5 stands there twice"),
        (["campaign.overrides=['seed=3']"], "campaign.overrides: seed=3 has no effect, as every run has its own"),
        (["campaign.seeds=0"], "campaign.seeds=0 is not allowed: at least 1"),
    ],
)
def test_a_mistake_is_one_line(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["campaign", *arguments, "dry_run=true"])
    with pytest.raises(SystemExit) as end:
        guarded(campaign.main, campaign.CONFIG_NAME)
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and len(error.splitlines()) == 1


def test_an_unknown_fault_is_named_with_the_nearest(rows):
    with pytest.raises(ValueError, match=re.escape("campaign.own_onset='init_scal' is not allowed")):
        chosen_rows(Campaign(**SMOKE | {"own_onset": ["init_scal"]}), rows)


def test_a_campaign_trains_resumes_and_writes_what_came_out(text, tiny, tmp_path, monkeypatch, capsys):
    """Faults of different needs share twins that are the same runs; the second time nothing is trained."""
    report = tmp_path / "report"
    arguments = [
        "campaign.faults=[label_noise,clip_off,untied]", "campaign.onsets=[5]", "campaign.seeds=2", *tiny, "data=text",
        f"data.path={text}", "train.steps=20", "train.clip=0.05", "model.tie_embeddings=true",
        "campaign.overrides=['monitor=[loss]']", f"out={tmp_path / 'runs'}", f"report={report}", "at_once=1",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["campaign", *arguments])
    campaign.main()
    said = capsys.readouterr().out
    assert "6 faulty runs, 2 healthy twins, 0 refused" in said
    table = pd.read_csv(report / "runs.csv")
    assert list(table.fault) == ["label_noise"] * 2 + ["clip_off"] * 2 + ["untied"] * 2
    assert (
        table.run_id.is_unique
        and (table.end_reason == "completed").all()
        and (table.elements > 0).all()
        and (table.twins == 2).all()
    )
    assert table.outcome.notna().all()
    injections = pd.read_csv(report / "injections.csv")
    assert set(injections.fault) == {"label_noise", "clip_off", "untied"}
    before = {folder: trace.read_manifest(folder) for folder in (tmp_path / "runs").iterdir()}
    assert len(before) == 8
    campaign.main()
    assert {folder: trace.read_manifest(folder) for folder in (tmp_path / "runs").iterdir()} == before


def test_a_campaign_killed_in_the_middle_of_a_run_comes_to_the_tables_of_an_unbroken_one(
    text, tiny, tmp_path, monkeypatch
):
    saves = iter(range(100))

    def killed(folder, state):
        save(folder, state)
        if next(saves) == 4:  # in the middle of the second of four runs, whose checkpoint is there
            raise Killed

    def trained(name: str) -> list[str]:
        command = [
            "campaign.faults=[label_noise,clip_off]", "campaign.onsets=[5]", *tiny, "data=text", f"data.path={text}",
            "train.steps=30", "train.checkpoint_every_steps=10", "train.clip=0.05",
            "campaign.overrides=['monitor=[loss]']", "at_once=1", f"out={tmp_path / name / 'runs'}",
            f"report={tmp_path / name / 'report'}",
        ]  # fmt: skip
        monkeypatch.setattr("sys.argv", ["campaign", *command])
        campaign.main()
        return [
            (tmp_path / name / "report" / f"{table}.csv").read_text() for table in ("runs", "injections", "outcomes")
        ]

    save = checkpoint.save
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "save", killed)
        trained("killed")
    assert len(list((tmp_path / "killed" / "runs").glob("*/checkpoint.pt"))) == 1
    assert trained("killed") == trained("whole")


@pytest.mark.slow
def test_a_refused_fault_is_a_row_and_an_exit_code(text, tiny, tmp_path, monkeypatch, capsys):
    report = tmp_path / "report"
    arguments = [
        "campaign.faults=[label_noise,clip_off]", "campaign.onsets=[5]", *tiny, "data=text", f"data.path={text}",
        "train.steps=20", "train.clip=null", "campaign.overrides=['monitor=[loss]']", f"out={tmp_path / 'runs'}",
        f"report={report}", "at_once=1",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["campaign", *arguments])
    with pytest.raises(SystemExit) as end:
        campaign.main()
    said = capsys.readouterr()
    assert end.value.code == 2 and "1 of 2 faults are refused; the first, clip_off" in said.err
    assert said.out.index("refused: clip_off factor=null, onset=5") < said.out.index("1 faulty runs")
    table = pd.read_csv(report / "runs.csv").set_index("fault")
    assert table.end_reason.to_dict() == {"label_noise": "completed", "clip_off": "refused"}
    assert "train.clip" in table.reason["clip_off"]


def test_what_a_cell_says_is_what_its_run_has(rows, healthy, make_run):
    draw = Campaign(**SMOKE | {"draw": 12, "onsets": [5, 30], "doses": "all"})
    for cell in cells(draw, rows, healthy, 3):
        run = make_run(*NEEDS[cell.needs], *cell.overrides, *LARGER)
        assert isinstance(run.fault, Fault)
        assert {key: run.config["fault"][key] for key in cell.keys} == cell.keys


@pytest.mark.slow
def test_every_dose_of_the_catalogue_is_a_run_of_its_own(rows, healthy, make_run):
    chosen = cells(Campaign(**SMOKE | {"doses": "all", "onsets": [30]}), rows, healthy, 0)
    runs = [make_run(*NEEDS[cell.needs], *cell.overrides, "train.steps=400", tiny=False) for cell in chosen]
    assert len({run.run_id for run in runs}) == len(runs) > 120


@pytest.mark.slow
def test_a_fault_that_changes_nothing_says_so_in_its_row(text, tiny, tmp_path, monkeypatch, capsys):
    arguments = [
        "campaign.faults=[clip_off]", "campaign.onsets=[5]", *tiny, "data=text", f"data.path={text}", "train.steps=20",
        "train.clip=1000", "campaign.overrides=['monitor=[loss]']", f"out={tmp_path / 'runs'}",
        f"report={tmp_path / 'report'}", "at_once=1",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["campaign", *arguments])
    with pytest.raises(SystemExit) as end:
        campaign.main()
    assert end.value.code == 2 and "1 of 2 runs failed" in capsys.readouterr().err
    (row,) = pd.read_csv(tmp_path / "report" / "runs.csv").itertuples()
    assert row.end_reason == "failed" and "changed no element" in row.reason
    assert len(pd.read_csv(tmp_path / "report" / "injections.csv").columns) == 8
