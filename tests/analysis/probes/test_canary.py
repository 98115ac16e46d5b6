"""Runs after a change against a healthy band: the count that it takes, twins, and what a verdict says."""

from dataclasses import asdict, replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from foreshock.analysis.figures import canary as figure
from foreshock.analysis.probes import band as bands
from foreshock.analysis.probes.canary import first_difference, judge, runs_needed
from foreshock.analysis.reports.canary import conclusion, lines, write_table
from foreshock.experiments import trace
from foreshock.experiments.trace import TraceError
from foreshock.monitors.signal import EXACT, Signal

STEPS, HEALTHY = 60, 19
SIGNALS = (
    Signal("held_out_loss", "nats", "up", every_steps=10),
    Signal("attn_entropy", "nats", "both", ("layer", "head"), 2),
    Signal("non_finite_events", "1", "up", kind=EXACT),
)


def write_run(
    folder, name, seed, jump=0.0, events=0, steps=STEPS, end_reason="completed", config=None, signals=SIGNALS
):
    """A run of noise, the same for the same seed; from step 30 on, head 1 of layer 0 is higher by ``jump``."""
    rng, columns = np.random.default_rng(seed), {column: [] for column in trace.SCHEMA.names}
    for signal in signals:
        cells = [(-1, -1)] if not signal.axes else [(layer, head) for layer in range(2) for head in range(2)]
        for step in range(signal.every_steps, steps + 1, signal.every_steps):
            for layer, head in cells:
                noise = 0.0 if signal.kind == EXACT else rng.normal()
                shift = jump * ((layer, head) == (0, 1) and step >= 30) + events * (signal.kind == EXACT and step == 40)
                row = (step, 64 * step, signal.name, layer, head, noise + shift, False)
                for column, x in zip(columns, row, strict=True):
                    columns[column].append(x)
    (folder / name).mkdir(parents=True)
    manifest = {
        "schema": trace.SCHEMA_VERSION,
        "config": {"train": {"steps": steps}, "model": {"width": 8}} | (config or {}),
        "seed": seed,
        "onset_step": None,
        "end_reason": end_reason,
        "steps_done": steps,
        "files": trace.write_part(folder / name, 1, steps, columns),
        "signals": {signal.name: asdict(signal) for signal in signals},
    }
    trace.write_manifest(folder / name, manifest)
    return trace.read(folder / name)


@pytest.fixture(scope="module")
def band(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canary")
    runs = [write_run(folder / "before", f"run-{seed:02d}", seed) for seed in range(HEALTHY)]
    bands.store(folder / "band", runs, 0.1, ("train.steps=60",))
    return bands.read(folder / "band")


def above_at_least(n: int, rank: int, count: int, number: int) -> float:
    """P(at least ``number`` of ``count`` new values above the rank-th smallest of n old ones), by every order."""
    orders = list(combinations(range(n + count), count))  # places of the new ones among all, each as likely
    hits = 0
    for places in orders:
        old = [place for place in range(n + count) if place not in places]
        hits += sum(place > old[rank - 1] for place in places) >= number
    return hits / len(orders)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_so_many_runs_must_stand_outside_as_healthy_ones_seldom_do(band, count):
    needed = runs_needed(band.thresholds, count)
    n = len(band.thresholds.runs)
    assert n == 9 and above_at_least(n, 9, count, needed) <= 0.1 + 1e-9
    assert needed == 1 or above_at_least(n, 9, count, needed - 1) > 0.1
    assert {1: 1, 3: 2}.get(count, needed) == needed  # 1/10; 3 of 3 orders above: 1/4, then 1/22


def test_the_same_run_is_identical_and_inside(band, tmp_path):
    seed = band.seeds[0]
    verdict = judge(band, [write_run(tmp_path, "same", seed)])
    assert verdict.identical and not verdict.outside
    assert conclusion(verdict).startswith("IDENTICAL")


def test_another_seed_is_inside_and_has_no_twin(band, tmp_path):
    verdict = judge(band, [write_run(tmp_path, f"other-{seed}", 100 + seed) for seed in range(3)])
    assert not verdict.identical and all(canary.twin is None for canary in verdict.canaries)
    assert any("no healthy run of its seed" in line for line in lines(band, verdict))


def test_a_change_is_outside_with_its_signal_place_and_step(band, tmp_path):
    runs = [write_run(tmp_path, f"run-{seed}", seed, jump=30.0) for seed in band.seeds[:3]]
    verdict = judge(band, runs)
    assert verdict.outside and verdict.needed == 2
    for canary, breach in zip(verdict.canaries, verdict.breaches, strict=True):
        assert (breach.signal, breach.step, breach.layer, breach.head) == ("attn_entropy", 30, 0, 1)
        assert breach.over_limit > 1 and canary.difference.step == 30 and canary.difference.signals == ("attn_entropy",)
    assert "first attn_entropy (layer 0, head 1) at step 30" in conclusion(verdict)
    write_table(tmp_path / "canary.csv", verdict)
    table = pd.read_csv(tmp_path / "canary.csv")
    assert list(table.signal) == ["attn_entropy"] * 3 and (table.statistic > table.limit).all()
    figure.draw(tmp_path / "canary.png", band, verdict)
    assert figure.drawn_signals(band, verdict) == ["held_out_loss", "attn_entropy"]
    assert (tmp_path / "canary.png").stat().st_size > 10_000


def test_one_outside_run_of_three_is_not_enough_but_an_exact_signal_is(band, tmp_path):
    one = [write_run(tmp_path, f"run-{i}", seed, jump=30.0 * (i == 0)) for i, seed in enumerate(band.seeds[:3])]
    assert not judge(band, one).outside
    counted = [write_run(tmp_path, f"events-{i}", seed, events=i == 0) for i, seed in enumerate(band.seeds[:3])]
    verdict = judge(band, counted)
    assert verdict.outside and [(b.signal, b.step, b.value) for b in verdict.breaches] == [
        ("non_finite_events", 40, 1.0)
    ]


def test_a_run_that_ends_early_is_outside_and_a_shorter_one_an_error(band, tmp_path):
    diverged = write_run(tmp_path, "diverged", band.seeds[0], steps=40, end_reason="diverged")
    verdict = judge(band, [diverged])
    assert verdict.outside and "diverged at step 40" in "\n".join(lines(band, verdict))
    with pytest.raises(ValueError, match=r"run short has 40 steps, and the band 60: train it as long"):
        judge(band, [write_run(tmp_path, "short", 5, steps=40)])
    with pytest.raises(ValueError, match="no run after the change"):
        judge(band, [])


def test_a_run_that_was_killed_or_stopped_is_judged_where_it_is_long_enough(band, tmp_path):
    """Attached runs alone are read then: how a process or a watch ended says nothing of the training."""
    seed = band.seeds[0]
    killed = replace(write_run(tmp_path, "killed", seed), manifest=None)
    whole = trace.read(tmp_path / "killed").manifest
    for reason in ("running", "stopped", "interrupted"):
        assert not judge(band, [replace(killed, manifest={**whole, "end_reason": reason})]).outside
        with pytest.raises(ValueError, match=rf"run killed \({reason}\) has 40 steps, and the band 60"):
            judge(band, [replace(killed, manifest={**whole, "end_reason": reason, "steps_done": 40})])


def test_less_than_the_twin_is_not_identical(band, tmp_path):
    """A signal or a reading that is not there is no equal one; a signal that only the run has is no difference."""
    seed = band.seeds[0]
    fewer = judge(band, [write_run(tmp_path, "fewer", seed, signals=SIGNALS[:1])])
    assert not fewer.identical and fewer.canaries[0].not_compared == ("attn_entropy",)
    whole = write_run(tmp_path, "whole", seed)
    cut = whole.signals["attn_entropy"]
    whole.signals["attn_entropy"] = trace.Series(cut.steps[:-1], cut.tokens[:-1], cut.values[:-1], cut.undefined[:-1])
    assert judge(band, [whole]).canaries[0].difference.step == STEPS
    more = (*SIGNALS, Signal("a_new_signal", "1", "up"))  # read after the others, from the same draws
    assert judge(band, [write_run(tmp_path, "more", seed, signals=more)]).identical


def test_a_run_that_has_or_describes_nothing_of_the_band_is_an_error(band, tmp_path):
    said = "has none of the 2 signals of the band as they were read there"
    with pytest.raises(ValueError, match=f"run other {said}"):
        judge(band, [write_run(tmp_path, "other", 5, signals=(Signal("train_loss_raw", "nats", "up"),))])
    run = write_run(tmp_path, "silent", 5)
    with pytest.raises(ValueError, match=f"run silent {said}"):
        judge(band, [replace(run, manifest={**run.manifest, "signals": {}})])


def test_copies_of_a_run_are_no_runs(band, tmp_path):
    copies = [write_run(tmp_path, name, 5) for name in ("one", "two")]
    with pytest.raises(ValueError, match="runs one and two are copies of one run: other seeds are needed"):
        judge(band, copies)
    with pytest.raises(ValueError, match="are copies of one run"):
        bands.store(tmp_path / "band", [write_run(tmp_path, f"copy-{i:02d}", 5) for i in range(HEALTHY)], 0.1)


def test_limits_that_were_changed_are_damage(tmp_path):
    runs = [write_run(tmp_path / "before", f"run-{seed:02d}", seed) for seed in range(HEALTHY)]
    bands.store(tmp_path / "band", runs, 0.1)
    path = tmp_path / "band" / bands.THRESHOLDS
    path.write_text(path.read_text().replace('"alpha": 0.1', '"alpha": 0.2'))
    with pytest.raises(TraceError, match=r"thresholds.json is damaged .*: store the band again"):
        bands.read(tmp_path / "band")


def test_a_signal_that_is_missing_or_read_otherwise_is_named(band, tmp_path):
    fewer = write_run(tmp_path, "fewer", 200, signals=SIGNALS[:1] + SIGNALS[2:])
    assert judge(band, [fewer]).canaries[0].not_compared == ("attn_entropy",)
    slower = write_run(tmp_path, "slower", 201, signals=(SIGNALS[0], replace(SIGNALS[1], every_steps=4), SIGNALS[2]))
    assert judge(band, [slower]).canaries[0].not_compared == ("attn_entropy",)


def test_what_changed_is_named_by_its_key(band, tmp_path):
    wider = write_run(tmp_path, "wider", 202, config={"model": {"width": 16}})
    assert "changed: model.width 8 -> 16" in lines(band, judge(band, [wider]))


def test_a_difference_of_one_bit_is_a_difference(band, tmp_path):
    run, twin = write_run(tmp_path, "a", 1), write_run(tmp_path, "b", 1)
    assert first_difference(run, twin, STEPS) is None
    values = twin.signals["attn_entropy"].values
    values[3, 1, 0] = np.nextafter(values[3, 1, 0], np.inf)
    assert first_difference(run, twin, STEPS).step == 8
    assert first_difference(run, twin, 7) is None


def test_a_folder_without_a_band_or_with_a_damaged_one_is_said(band, tmp_path):
    with pytest.raises(ValueError, match="holds no band: store one with store=19, or with healthy=DIR"):
        bands.read(tmp_path)
    (tmp_path / bands.SETTINGS).write_text('{"sha256": "0",\n"runs": []}\n')
    with pytest.raises(TraceError, match="is damaged"):
        bands.read(tmp_path)
    with pytest.raises(ValueError, match="holds a band already"):
        bands.check_new(tmp_path)
    with pytest.raises(ValueError, match=r"store=18 is not allowed with alpha=0\.1: at least 19"):
        bands.check_count(18, 0.1)


def test_paired_seeds_show_a_shift_that_the_band_does_not(band, tmp_path):
    same = [write_run(tmp_path, f"run-{i}", seed) for i, seed in enumerate(band.seeds[:3])]
    shifts = (0.011, 0.012, 0.013)
    for run, shift in zip(same, shifts, strict=True):
        run.signals["held_out_loss"].values[-1] += shift
    verdict = judge(band, same)
    assert not verdict.outside and verdict.shifted and verdict.held_out_changes == pytest.approx(shifts)
    half = 4.302652729911275 * 0.001 / 3**0.5  # the quantile of Student's t at 0.975 with 2 degrees of freedom
    assert verdict.held_out_interval == pytest.approx((0.012 - half, 0.012 + half))
    assert "Held-out loss has shifted all the same: +0.0120 nats" in conclusion(verdict)
    unchanged = judge(band, [write_run(tmp_path, f"again-{i}", seed) for i, seed in enumerate(band.seeds[:3])])
    assert unchanged.held_out_interval is None and not unchanged.shifted


def test_another_held_out_text_is_not_compared(band, tmp_path):
    other = [
        write_run(tmp_path, f"run-{i}", seed, config={"data": {"held_out": 0.1}}) for i, seed in enumerate(band.seeds)
    ]
    assert judge(band, other).held_out_changes == []
