"""Every reading of the attention_update family against dense FP64 algebra on the weights, a head at a time."""

import itertools
import math

import pytest
import torch

from foreshock.monitors.attention_update import AttentionWeight, DeltaW, QKIncrement, is_attention_matrix
from foreshock.monitors.base import Masked

pytestmark = pytest.mark.numeric

LAYERS, HEADS, D = 2, 2, 8
MATRICES = "qkvo"


def block(matrix, of, head):
    """A head's (D, E) block: rows of W_Q, W_K, W_V, columns of W_O (transposed)."""
    rows = slice(head * D, (head + 1) * D)
    return of[:, rows].T if matrix == "o" else of[rows]


def statistics(matrix):
    """Entropy, stable rank and norm, by definition, from a dense SVD."""
    energy = torch.linalg.svdvals(matrix).square()
    p = energy / energy.sum()
    return {
        "entropy": -(p * p.clamp_min(1e-300).log()).sum(),
        "stable_rank": energy.sum() / energy.max(),
        "norm": energy.sum().sqrt(),
    }


def value(reading):
    return reading.value if isinstance(reading, Masked) else reading


def close(got, expected):
    assert got.dtype is torch.float64
    torch.testing.assert_close(got, torch.as_tensor(expected).double(), rtol=1e-10, atol=1e-12)


def name_of(layer, matrix):
    return f"blocks.{layer}.attention.{matrix}.weight"


MONITORS = {
    "delta_w": lambda windows, every=1: DeltaW(every, windows, whole=True),
    "qk_increment": lambda windows, every=1: QKIncrement(every, windows),
}


@pytest.mark.parametrize("window", [1, 3])
def test_delta_w_is_the_spectrum_of_the_update(tiny_run, window):
    monitor = DeltaW(1, [1, 3], whole=True)
    run = tiny_run(monitor)
    for _ in range(5):
        view = run.advance()
    got = monitor.observe(view)
    for matrix, layer in itertools.product(MATRICES, range(LAYERS)):
        delta = run.delta(name_of(layer, matrix), window)
        for statistic, name in (("entropy", "spectral_entropy"), ("stable_rank", "stable_rank"), ("norm", "norm")):
            whole = value(got[f"delta_w_{name}.{matrix}_whole.w{window}"])
            close(whole[layer], statistics(delta)[statistic])
            for head in range(HEADS):
                here = value(got[f"delta_w_{name}.{matrix}.w{window}"])
                close(here[layer, head], statistics(block(matrix, delta, head))[statistic])


@pytest.mark.parametrize("window", [1, 3])
def test_qk_increment_is_the_spectrum_of_the_formed_product(tiny_run, window):
    monitor = QKIncrement(1, [3, 1])
    run = tiny_run(monitor, n_heads=4)  # 2D < E: the small core; test_spectra has the other shapes
    for _ in range(5):
        view = run.advance()
    got = monitor.observe(view)
    past, width = run.past[run.step - window], 4
    for layer, head in itertools.product(range(LAYERS), range(4)):
        rows = slice(head * width, (head + 1) * width)
        q0, k0 = (past[name_of(layer, m)][rows].T for m in "qk")
        dq, dk = (run.delta(name_of(layer, m), window)[rows].T for m in "qk")
        products = {"delta1": (q0 + dq) @ (k0 + dk).T - q0 @ k0.T, "delta2": dq @ k0.T + q0 @ dk.T, "delta3": dq @ dk.T}
        for order, product in products.items():
            for statistic, expected in statistics(product).items():
                reading = value(got[f"qk_{order}_spectrum.{statistic}.w{window}"])
                torch.testing.assert_close(reading[layer, head], expected, rtol=1e-9, atol=1e-12)
        coupling = (dq @ dk.T).square().sum() / (dq.square().sum() * dk.square().sum())
        close(value(got[f"qk_coupling.w{window}"])[layer, head], coupling)


def test_a_grouped_head_has_its_group_s_key_update(tiny_run):
    """Delta W of each query or key-value head, Delta2 of each query head with the keys that it reads."""
    monitors = DeltaW(1, [2], whole=True), QKIncrement(1, [2]), AttentionWeight(1)
    run = tiny_run(*monitors, n_heads=4, n_kv_heads=2)
    for _ in range(3):
        view = run.advance()
    delta_w, increment, weight = (monitor.observe(view) for monitor in monitors)
    for matrix, layer in itertools.product(MATRICES, range(LAYERS)):
        delta = run.delta(name_of(layer, matrix), 2)
        blocks = (delta.T if matrix == "o" else delta).unflatten(0, (-1, 4))
        assert len(blocks) == (4 if matrix in "qo" else 2)
        for head, of_head in enumerate(blocks):
            got = value(delta_w[f"delta_w_spectral_entropy.{matrix}.w2"])
            assert got.shape == (LAYERS, len(blocks))
            close(got[layer, head], statistics(of_head)["entropy"])
        close(value(delta_w[f"delta_w_stable_rank.{matrix}_whole.w2"])[layer], statistics(delta)["stable_rank"])
        now = statistics(run.past[run.step][name_of(layer, matrix)])
        close(weight[f"weight_norm.{matrix}"][layer], now["norm"])
        close(value(weight[f"weight_stable_rank.{matrix}"])[layer], now["stable_rank"])
    past = run.past[run.step - 2]
    for layer, head in itertools.product(range(LAYERS), range(4)):
        q0, dq = (
            w.unflatten(0, (4, 4))[head].T for w in (past[name_of(layer, "q")], run.delta(name_of(layer, "q"), 2))
        )
        k0, dk = (
            w.unflatten(0, (2, 4))[head // 2].T for w in (past[name_of(layer, "k")], run.delta(name_of(layer, "k"), 2))
        )
        delta2 = statistics(dq @ k0.T + q0 @ dk.T)["entropy"]
        reading = value(increment["qk_delta2_spectrum.entropy.w2"])[layer, head]
        torch.testing.assert_close(reading, delta2, rtol=1e-9, atol=1e-12)
        coupling = (dq @ dk.T).square().sum() / (dq.square().sum() * dk.square().sum())
        close(value(increment["qk_coupling.w2"])[layer, head], coupling)


def test_coupling_is_one_for_one_direction_and_zero_for_orthogonal_ones(tiny_run):
    """dW_Q dW_K^T sums over d_head: head 0 updates the same d_head row, head 1 two different ones."""
    monitor = QKIncrement(1, [1])
    run = tiny_run(monitor)

    def change(name, weight):
        row = {"q": (1, D + 2), "k": (1, D + 5)}.get(name.split(".")[-2])
        if not is_attention_matrix(name) or row is None:
            return None
        update = torch.zeros_like(weight)
        update[list(row)] = torch.randn(2, 16, generator=torch.Generator().manual_seed(len(name)))
        return weight + update

    got = monitor.observe(run.advance(change))["qk_coupling.w1"]
    close(got.value, [[1.0, 0.0]] * LAYERS)
    assert not got.undefined.any()


def test_a_collapsed_update_has_no_entropy_left(tiny_run):
    """The fault's signature: rank-1 updates of one head, seen in that head alone."""
    monitors = DeltaW(1, [1], whole=False), QKIncrement(1, [1])
    run = tiny_run(*monitors)

    def change(name, weight):
        if not is_attention_matrix(name):
            return None
        generator = torch.Generator().manual_seed(len(name) + ord(name.split(".")[-2]))
        update = 1e-3 * torch.randn(16, 16, generator=generator)
        if name == name_of(1, "q"):
            update[:D] = update[:D, :1] * update[:1]
        return weight + update

    view = run.advance(change)
    entropy = monitors[0].observe(view)["delta_w_spectral_entropy.q.w1"].value
    assert entropy[1, 0] < 1e-4 and (entropy.flatten()[[0, 1, 3]] > 1.0).all()
    entropy = monitors[1].observe(view)["qk_delta3_spectrum.entropy.w1"].value
    assert entropy[1, 0] < 1e-4 and (entropy.flatten()[[0, 1, 3]] > 0.5).all()


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("head", range(HEADS))
def test_an_update_of_one_head_reads_in_that_head_alone(tiny_run, matrix, head):
    monitor = DeltaW(1, [1], whole=True)
    run = tiny_run(monitor)

    def change(name, weight):
        if name != name_of(1, matrix):
            return None
        new = weight.clone()
        block(matrix, new, head).mul_(2.0)
        return new

    got = monitor.observe(run.advance(change))
    for other in MATRICES:
        norm = got[f"delta_w_norm.{other}.w1"]
        expected = torch.zeros(LAYERS, HEADS).double()
        if other == matrix:
            expected[1, head] = block(matrix, run.past[0][name_of(1, matrix)], head).norm()
        close(norm, expected)
        for statistic in ("spectral_entropy", "stable_rank"):
            assert torch.equal(got[f"delta_w_{statistic}.{other}.w1"].undefined, expected == 0)
            whole = got[f"delta_w_{statistic}.{other}_whole.w1"].undefined
            assert torch.equal(whole, expected.sum(-1) == 0)


@pytest.mark.parametrize("kind", MONITORS)
def test_no_update_has_a_norm_of_zero_and_no_other_reading(tiny_run, kind):
    monitor = MONITORS[kind]([1])
    run = tiny_run(monitor)
    got = monitor.observe(run.advance(lambda name, weight: None))
    assert set(got) == {signal.name for signal in monitor.signals}
    for name, reading in got.items():
        if "norm" in name:
            assert not isinstance(reading, Masked) and (reading == 0).all(), name
        else:
            assert reading.undefined.all(), name


def test_where_one_weight_stands_still_only_the_second_order_is_undefined(tiny_run):
    monitor = QKIncrement(1, [1])
    run = tiny_run(monitor)
    view = run.advance(lambda name, weight: weight * 1.5 if name.endswith("attention.q.weight") else None)
    got = monitor.observe(view)
    for order, missing in (("delta1", False), ("delta2", False), ("delta3", True)):
        for statistic in ("entropy", "stable_rank"):
            reading = got[f"qk_{order}_spectrum.{statistic}.w1"]
            assert torch.equal(reading.undefined, torch.full((LAYERS, HEADS), missing))
            assert missing or reading.value.isfinite().all()
    assert got["qk_coupling.w1"].undefined.all()


@pytest.mark.parametrize("kind", MONITORS)
def test_a_broken_weight_is_a_reading_of_nan_and_not_a_missing_one(tiny_run, kind):
    monitor = MONITORS[kind]([1])
    run = tiny_run(monitor)

    def change(name, weight):
        new = weight * 1.5
        if name in (name_of(1, "q"), name_of(1, "k")):
            new[0, 3] = math.nan  # layer 1, head 0
        return new

    got = monitor.observe(run.advance(change))
    for name, reading in got.items():
        if any(part in name for part in (".v", ".o", "_whole")):
            continue
        if isinstance(reading, Masked):
            assert not reading.undefined.any(), name
        broken = value(reading).isnan()
        assert broken.tolist() == [[False, False], [True, False]], name


@pytest.mark.parametrize("kind", MONITORS)
def test_nothing_is_said_of_a_window_before_it_has_passed(tiny_run, kind):
    monitor = MONITORS[kind]([4, 2])
    run = tiny_run(monitor)
    for step in range(1, 7):
        got = monitor.observe(run.advance())
        assert {int(name.rpartition(".w")[2]) for name in got} == {window for window in (2, 4) if window <= step}


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: DeltaW(1, [1, 2], whole=True), 2 * 3 * 8),
        (lambda: DeltaW(1, [1, 2], whole=False), 2 * 3 * 4),
        (lambda: QKIncrement(1, [1, 2]), 2 * 10),
        (lambda: AttentionWeight(1), 8),
    ],
)
def test_the_readings_are_the_signals(tiny_run, make, count):
    monitor = make()
    run = tiny_run(monitor, n_heads=4, n_layers=3)
    run.advance()
    got = monitor.observe(run.advance())
    assert set(got) == {signal.name for signal in monitor.signals} and len(got) == len(monitor.signals) == count
    for signal in monitor.signals:
        size = {"layer": 3, "head": 4}
        reading = got[signal.name]
        assert value(reading).shape == tuple(size[axis] for axis in signal.axes), signal.name
        assert signal.every_steps == 1
        if isinstance(reading, Masked):
            assert reading.undefined.shape == reading.value.shape and reading.undefined.dtype is torch.bool


@pytest.mark.parametrize("kind", MONITORS)
def test_a_window_need_not_be_a_multiple_of_the_cadence(tiny_run, kind):
    sparse, dense = MONITORS[kind]([3, 5], 4), MONITORS[kind]([3, 5])
    run, twin = tiny_run(sparse), tiny_run(dense)
    for step in range(1, 13):
        view, full = run.advance(), twin.advance()
        if step % 4 == 0:
            got, expected = sparse.observe(view), dense.observe(full)
            assert set(got) == set(expected)
            assert all(torch.equal(value(got[name]), value(expected[name])) for name in got)


def test_attention_weight_reads_the_weights_themselves(tiny_run):
    monitor = AttentionWeight(5)
    run = tiny_run(monitor)
    got = monitor.observe(run.advance())
    assert monitor.needs.history == () and {signal.every_steps for signal in monitor.signals} == {5}
    for matrix, layer in itertools.product(MATRICES, range(LAYERS)):
        expected = statistics(run.past[1][name_of(layer, matrix)])
        close(got[f"weight_norm.{matrix}"][layer], expected["norm"])
        close(got[f"weight_stable_rank.{matrix}"].value[layer], expected["stable_rank"])


def test_a_zero_weight_has_no_stable_rank(tiny_run):
    monitor = AttentionWeight(1)
    run = tiny_run(monitor)
    got = monitor.observe(run.advance(lambda name, weight: weight * 0 if name == name_of(0, "o") else None))
    for matrix in MATRICES:
        assert got[f"weight_stable_rank.{matrix}"].undefined.tolist() == [matrix == "o", False]


@pytest.mark.parametrize(
    "make",
    [lambda: DeltaW(1, [1], whole=True), lambda: QKIncrement(1, [1]), lambda: AttentionWeight(1)],
)
def test_observing_changes_nothing(tiny_run, make):
    monitor = make()
    run = tiny_run(monitor)
    view = run.advance()
    history = {step: {n: w.clone() for n, w in kept.items()} for step, kept in run.history.state_dict().items()}
    rng = torch.get_rng_state()
    first, second = monitor.observe(view), monitor.observe(view)
    assert all(torch.equal(value(first[name]), value(second[name])) for name in first)
    assert not any(value(reading).requires_grad for reading in first.values())
    assert torch.equal(torch.get_rng_state(), rng)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter.detach().double(), run.past[-1][name]) and parameter.grad is None
        assert parameter.requires_grad
    for step, kept in run.history.state_dict().items():
        assert all(torch.equal(weight, history[step][name]) for name, weight in kept.items())


@pytest.mark.parametrize("kind", MONITORS)
@pytest.mark.parametrize(
    ("windows", "every_steps", "message"),
    [
        ([], 1, r"monitor.windows=\[\] "),
        ([5, 5], 1, r"monitor.windows=\[5, 5\] "),
        ([0, 5], 1, r"monitor.windows=\[0, 5\]"),
        ([5], 0, r"monitor.every_steps=0"),
        ([5], -1, r"monitor.every_steps=-1"),
    ],
)
def test_impossible_windows_are_refused_by_name(kind, windows, every_steps, message):
    with pytest.raises(ValueError, match=message):
        MONITORS[kind](windows, every_steps)


def test_attention_weight_refuses_an_impossible_cadence():
    with pytest.raises(ValueError, match=r"monitor\.every_steps=0 "):
        AttentionWeight(0)


def test_directions_of_harm():
    monitors = DeltaW(1, [1], whole=True), QKIncrement(1, [1]), AttentionWeight(1)
    harm = {signal.name: signal.bad for monitor in monitors for signal in monitor.signals}
    for name, bad in harm.items():
        expected = "up" if "coupling" in name else "both" if "norm" in name else "down"
        assert bad == expected, name


def test_only_the_four_projections_are_attention_matrices(tiny_run):
    names = set(filter(is_attention_matrix, tiny_run(qk_norm=True).past[0]))
    assert names == {name_of(layer, matrix) for layer in range(LAYERS) for matrix in MATRICES}
