import itertools
import math
import re

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from bundles import export_small, listing, small_spec
from hypothesis import assume, given
from hypothesis import strategies as st

from sjepa_deploy.cli import run_command
from sjepa_deploy.cli.export import export
from sjepa_deploy.errors import BundleError, SjepaError
from sjepa_deploy.export import rewrite as rewrites
from sjepa_deploy.export.emulate import emulate_bf16
from sjepa_deploy.export.to_bundle import ExportParityError, make_reference
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.parity import TOLERANCE, Reference, batch_sizes, check_parity

N_WINDOWS, N_OUTPUTS = 10, 3
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(N_WINDOWS, 2, 5)).astype(np.float32)
INPUTS[7, 1, 2] = np.nan
WEIGHT = RNG.normal(size=(10, N_OUTPUTS))


def exact(eeg):
    """Stand for a model: linear, in float64, rounded once. A NaN in a window makes that window's outputs NaN."""
    return (eeg.reshape(len(eeg), -1).astype(np.float64) @ WEIGHT).astype(np.float32)


REFERENCE = Reference(
    kinds=tuple(f"window {i}" for i in range(N_WINDOWS)),
    inputs=INPUTS,
    outputs=INPUTS.reshape(N_WINDOWS, -1).astype(np.float64) @ WEIGHT,
)


def judge(predict, *, precision="fp32", sizes=(1, 2, 3, 4), reference=REFERENCE):
    return check_parity(predict, reference, backend="mine", precision=precision, sizes=sizes)


SCALE = np.sqrt(np.nanmean(REFERENCE.outputs**2))


# ---------------------------------------------------------------- the gate


def test_exact_outputs_pass():
    result = judge(exact)
    assert result.passed
    assert result.max_error < 1e-7
    assert (result.n_windows, result.batch_sizes) == (10, (1, 2, 3, 4))
    assert (result.spread_tolerance, result.max_relative_to_spread < 1e-6) == (1e-3, True)
    assert (result.backend, result.precision, result.tolerance) == ("mine", "fp32", 1e-5)
    assert result.nan_agrees
    assert (result.decision_flips, result.flip_margin) == (0, None)


def offset_in_one_row_of_larger_batches(eeg):
    out = exact(eeg)
    if len(eeg) > 1:
        out[1, 0] += 2 * TOLERANCE["fp32"] * SCALE
    return out


def wrong_in_the_last_row_of_the_largest_batch(eeg):
    out = exact(eeg)
    if len(eeg) == 4:
        out[3] *= 1.001
    return out


def repeats_the_first_two_rows(eeg):
    """Compute two rows of a batch, and tile them over it."""
    return exact(eeg)[np.arange(len(eeg)) % 2]


def nan_in_the_last_row_of_the_largest_batch(eeg):
    out = exact(eeg)
    if len(eeg) == 4:
        out[3] = np.nan
    return out


def a_row_leaks_into_all(eeg):
    out = exact(eeg)
    return out + np.float32(1e-4) * np.nan_to_num(out[:1])


def row_takes_the_answer_of_another(eeg):
    out = exact(eeg)
    if len(eeg) == 4:
        out[3] = out[2]
    return out


def swapped_rows(eeg):
    return exact(eeg)[::-1]


def every_row_is_the_first(eeg):
    return np.repeat(exact(eeg)[:1], len(eeg), axis=0)


def hidden_nan(eeg):
    return np.nan_to_num(exact(eeg))


def nan_leaks_into_neighbours(eeg):
    out = exact(eeg)
    if np.isnan(eeg).any():
        out[:] = np.nan
    return out


def nan_where_none_belongs(eeg):
    out = exact(eeg)
    out[eeg[:, 0, 0] == INPUTS[3, 0, 0], 1] = np.nan
    return out


def infinite(eeg):
    return np.where(np.isnan(exact(eeg)), np.nan, np.inf).astype(np.float32)


class StaleBuffer:
    """Returns what the call before has computed."""

    def __init__(self):
        self.before = {}

    def __call__(self, eeg):
        now = exact(eeg)
        return self.before.pop(len(eeg), np.zeros_like(now)), self.before.update({len(eeg): now})


def stale_buffer():
    backend = StaleBuffer()
    return lambda eeg: backend(eeg)[0]


def half_precision(eeg):
    return exact(eeg.astype(np.float16))


def constant(eeg):
    return np.where(np.isnan(exact(eeg)), np.nan, 0).astype(np.float32)


@pytest.mark.parametrize(
    ("predict", "nan_agrees", "worst"),
    [
        (offset_in_one_row_of_larger_batches, True, "at batch [234]"),
        (wrong_in_the_last_row_of_the_largest_batch, True, "at batch 4"),
        (repeats_the_first_two_rows, False, "at batch [34]"),
        (nan_in_the_last_row_of_the_largest_batch, False, "at batch 4"),
        (a_row_leaks_into_all, True, "at batch"),
        (row_takes_the_answer_of_another, False, "at batch 4"),
        (swapped_rows, False, "at batch [234]"),
        (every_row_is_the_first, False, "at batch [234]"),
        (hidden_nan, False, ""),
        (nan_leaks_into_neighbours, False, "at batch 4"),
        (nan_where_none_belongs, False, "window 3 at batch 1"),
        (infinite, False, "window 0 at batch 1"),  # as float16 that overflows
        (stale_buffer(), False, "at batch"),
        (half_precision, True, "at batch"),
        (constant, True, "at batch"),
    ],
)
def test_planted_errors_are_found(predict, nan_agrees, worst):
    result = judge(predict)
    assert not result.passed
    assert result.nan_agrees == nan_agrees
    assert re.search(worst, result.worst)
    assert math.isfinite(result.max_abs)
    assert -1 <= result.cosine <= 1


def test_each_of_these_needs_the_batches():
    """A judge that runs one window at a time is blind to them."""
    for predict in (offset_in_one_row_of_larger_batches, swapped_rows, every_row_is_the_first, nan_leaks_into_neighbours):
        assert judge(predict, sizes=(1,)).passed


def test_a_buffer_that_is_reused_is_no_error():
    buffers = {}

    def predict(eeg):
        np.copyto(buffers.setdefault(len(eeg), np.empty((len(eeg), N_OUTPUTS), np.float32)), exact(eeg))
        return buffers[len(eeg)]

    assert judge(predict).passed


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("factor", [0.9, 1.1])
@pytest.mark.parametrize("output", range(N_OUTPUTS))
def test_the_tolerance_is_the_precisions(precision, factor, output):
    def predict(eeg):
        out = exact(eeg).astype(np.float64)
        out[:, output] += factor * TOLERANCE[precision] * SCALE
        return out

    result = judge(predict, precision=precision)
    assert result.passed == (factor < 1)
    assert result.max_error == pytest.approx(factor * TOLERANCE[precision], rel=0.05)


def test_a_window_stands_alone_in_its_batches():
    """No batch holds a window twice, and every row of the largest one is judged: also where the reference has few windows."""
    batches = []

    def predict(eeg):
        batches.append(eeg.copy())
        return exact(eeg)

    assert judge(predict, sizes=(1, 3, 37)).passed
    assert {len(batch) for batch in batches} == {1, 3, 37}
    for batch in batches:
        rows = {row.tobytes() for row in batch}
        assert len(rows) == len(batch)
    with_nan = [np.isnan(batch).any(axis=(1, 2)).nonzero()[0].tolist() for batch in batches if np.isnan(batch).any()]
    assert sorted(map(tuple, with_nan)) == [(0,), (0,), (36,)]


@pytest.mark.parametrize("sizes", [(1,), (4,), (1, 3, 16)])
def test_a_row_that_is_wrong_once_is_found_whichever_it_is(sizes):
    """No row is computed without being judged."""
    finite_rows = []
    assert judge(lambda eeg: finite_rows.append(np.isfinite(exact(eeg)).all(axis=1)) or exact(eeg), sizes=sizes).passed
    for call, finite in enumerate(finite_rows):
        for row in finite.nonzero()[0]:
            calls = itertools.count()

            def predict(eeg, call=call, row=row, calls=calls):
                out = exact(eeg)
                if next(calls) == call:
                    out[row] += 1
                return out

            assert not judge(predict, sizes=sizes).passed, f"row {row} of call {call}"


@given(st.integers(2, 70), st.data())
def test_one_wrong_row_of_the_largest_batch_is_found_wherever_it_is(size, data):
    row, source = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1))
    assume(row != source)

    def predict(eeg):
        out = exact(eeg)
        if len(eeg) == size:
            out[row] = out[source]
        return out

    assert not judge(predict, sizes=(1, 2, size)).passed
    assert not judge(predict, sizes=(size,)).passed  # a graph of one batch size has no other to compare with


def scaled(mean, spread):
    """Return the reference and the exact answers of a regression with these means and spreads of its outputs."""
    outputs = REFERENCE.outputs
    centre, width = np.nanmean(outputs, axis=0), np.nanstd(outputs, axis=0)

    def change(values):
        return (values - centre) / width * spread + mean

    def right(eeg):
        return change(eeg.reshape(len(eeg), -1).astype(np.float64) @ WEIGHT).astype(np.float32)

    return Reference(kinds=REFERENCE.kinds, inputs=INPUTS, outputs=change(outputs)), right


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(("mean", "spread"), [(40.0, 1.0), (1000.0, 2.0), (0.6, 0.1)])
def test_a_graph_that_ignores_the_eeg_is_found_beside_a_large_mean(precision, mean, spread):
    reference, right = scaled(np.full(N_OUTPUTS, mean), np.full(N_OUTPUTS, spread))
    assert judge(right, precision=precision, reference=reference).passed

    def always_the_mean(eeg):
        return np.where(np.isnan(right(eeg)), np.nan, np.float32(mean))

    result = judge(always_the_mean, precision=precision, reference=reference)
    assert not result.passed
    assert result.max_relative_to_spread > 1.2


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("wrong", range(N_OUTPUTS))
def test_each_output_is_judged_in_its_own_unit(precision, wrong):
    """An age in years, a reaction time in seconds, a voltage in volts: the small ones count as much."""
    reference, right = scaled(np.array([40.0, 0.6, 2e-6]), np.array([5.0, 0.1, 1e-6]))
    assert judge(right, precision=precision, reference=reference).passed

    def zero(eeg):
        out = right(eeg)
        out[:, wrong] *= 0
        return out

    assert not judge(zero, precision=precision, reference=reference).passed


@pytest.mark.parametrize("precision", TOLERANCE)
def test_features_that_ignore_the_eeg_are_found_by_their_scale(make_bundle, precision):
    reference = make_bundle("base").reference()
    mean = np.nanmean(reference.outputs, axis=0)

    def constant(eeg):
        nan = np.isnan(eeg).any(axis=(1, 2))
        return np.where(nan[:, None, None], np.nan, mean).astype(np.float32)

    result = judge(constant, precision=precision, reference=reference)
    assert not result.passed
    assert result.nan_agrees
    assert result.max_relative_to_spread == 0


def test_a_wrong_batch_in_between_is_found():
    def predict(eeg):
        return exact(eeg) if len(eeg) in (1, 2, 3, 64) else np.nan_to_num(0 * exact(eeg))

    assert not judge(predict, sizes=batch_sizes(64)).passed


# ---------------------------------------------------------------- the measures


def test_measures_are_those_of_the_text_books():
    want = np.array([[1.0, 2.0], [3.0, -1.0], [-2.0, 0.5]])
    got = np.array([[1.1, 2.0], [3.0, -1.0], [-2.0, 0.2]], np.float32)
    inputs = np.arange(3, dtype=np.float32).reshape(3, 1, 1)
    reference = Reference(kinds=("a", "b", "c"), inputs=inputs, outputs=want)
    result = judge(lambda eeg: got[eeg[:, 0, 0].astype(int)], sizes=(1,), reference=reference)
    scale = math.sqrt((1 + 4 + 9 + 1 + 4 + 0.25) / 6)
    spread = math.sqrt((want.var(axis=0)).mean())
    assert result.max_abs == pytest.approx(0.3, rel=1e-6)
    assert result.scale == pytest.approx(scale)
    assert result.spread == pytest.approx(spread)
    assert result.max_error == pytest.approx(0.3 / scale, rel=1e-6)
    assert result.max_relative_to_spread == pytest.approx(0.3 / want[:, 1].std(), rel=1e-6)
    a, b = want.ravel(), got.ravel().astype(float)
    assert result.cosine == pytest.approx(a @ b / math.sqrt((a @ a) * (b @ b)))
    assert result.worst == "c at batch 1"
    assert result.decision_flips == 0


def test_decision_flips_and_their_margin():
    want = np.array([[1.0, 2.0, 0.0], [3.0, 2.9, 0.0], [-2.0, 0.5, 0.4], [0.0, 1.0, 5.0]])
    got = want.copy()
    got[1] = [2.8, 2.9, 0.0]  # the margin was 0.1
    got[2] = [0.6, 0.5, 0.55]  # the margin was 0.1 too, to the second, not to the one that wins
    got[3] = [6.0, 1.0, 5.0]  # the margin was 4
    inputs = np.arange(4, dtype=np.float32).reshape(4, 1, 1)
    reference = Reference(kinds=tuple("abcd"), inputs=inputs, outputs=want)
    result = judge(lambda eeg: got[eeg[:, 0, 0].astype(int)], sizes=(1,), reference=reference)
    assert result.decision_flips == 3
    assert result.flip_margin == pytest.approx(4 / result.spread)


@pytest.mark.parametrize("shape", [(N_WINDOWS, 1), (N_WINDOWS, 2, 3)])
def test_a_single_output_and_features_decide_nothing(shape):
    outputs = np.random.default_rng(1).normal(size=shape)
    inputs = np.arange(N_WINDOWS, dtype=np.float32).reshape(-1, 1, 1)
    reference = Reference(kinds=("x",) * N_WINDOWS, inputs=inputs, outputs=outputs)
    result = judge(lambda eeg: outputs[eeg[:, 0, 0].astype(int)], reference=reference)
    assert result.passed
    assert (result.decision_flips, result.flip_margin) == (None, None)


def test_a_single_logit_flips_at_zero():
    """Of two classes the second one is named for values above 0; a number of a regression flips never."""
    want = np.array([[1.0], [-2.0], [0.1], [-0.1]])
    got = np.array([[2.0], [1.0], [-0.1], [-0.2]])
    inputs = np.arange(4, dtype=np.float32).reshape(4, 1, 1)
    for task, expected in (("classification", 2), ("regression", None)):
        reference = Reference(kinds=tuple("abcd"), inputs=inputs, outputs=want, task=task)
        result = judge(lambda eeg: got[eeg[:, 0, 0].astype(int)], sizes=(1,), reference=reference)
        assert result.decision_flips == expected
        assert result.flip_margin == (None if expected is None else pytest.approx(2 / result.spread))


def test_outputs_that_never_change_have_a_scale():
    reference = Reference(kinds=("a", "b"), inputs=INPUTS[:2], outputs=np.zeros((2, 1)))
    assert judge(lambda eeg: np.zeros((len(eeg), 1)), reference=reference).passed
    assert not judge(lambda eeg: np.ones((len(eeg), 1)), reference=reference).passed


@pytest.mark.parametrize(
    ("max_batch", "static_batch", "sizes"),
    [
        (1024, None, (1, 2, 3, 7, 257, 1024)),
        (64, None, (1, 2, 3, 7, 17, 64)),
        (8, None, (1, 2, 3, 7, 8)),
        (3, None, (1, 2, 3)),
        (2, None, (1, 2)),
        (1, None, (1,)),
        (8, 8, (8,)),
        (64, 1, (1,)),
    ],
)
def test_batch_sizes(max_batch, static_batch, sizes):
    assert batch_sizes(max_batch, static_batch) == sizes


# ---------------------------------------------------------------- the reference on disk


def test_a_reference_is_read_as_it_was_written(tmp_path):
    REFERENCE.save(tmp_path / "reference.npz")
    again = Reference.load(tmp_path / "reference.npz")
    assert again.kinds == REFERENCE.kinds
    for name in ("inputs", "outputs"):
        np.testing.assert_array_equal(getattr(again, name), getattr(REFERENCE, name), strict=True)


def test_a_damaged_reference_is_an_error_in_one_line(tmp_path):
    path = tmp_path / "reference.npz"
    REFERENCE.save(path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "missing": None,
        "empty": b"",
        "cut": whole[:middle],
        "without its start": whole[50:],
        "garbage": b"garbage!" * 100,
        "a pickle": b"\x80\x04K\x01.",
        "an altered byte": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
    }
    for kind, content in damaged.items():
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(BundleError, match=r"reference\.npz holds no parity reference\. Export the bundle again\.$"):
            pytest.fail(f"{kind}: {Reference.load(path)}")
    Reference(kinds=REFERENCE.kinds, inputs=INPUTS, outputs=np.full((N_WINDOWS, 1), 1e300)).save(path)
    with pytest.raises(BundleError, match="no float32 can be near"):  # the scale would overflow, and every error become 0
        Reference.load(path)
    with path.open("wb") as file:
        np.save(file, INPUTS)
    with pytest.raises(BundleError, match="holds no parity reference"):
        Reference.load(path)
    np.savez(path, inputs=INPUTS, outputs=REFERENCE.outputs)
    with pytest.raises(BundleError, match="holds no parity reference"):
        Reference.load(path)


def test_the_reference_of_an_export_holds_what_a_decoder_must_survive():
    model = build_model(small_spec(unit="mV"), seed=0)
    own = np.random.default_rng(0).normal(0, 0.01, (100, 8, 200)).astype(np.float32)
    reference = make_reference(model, own)
    kinds = " ".join(reference.kinds)
    for kind in ("eeg 0", "20 mV offsets", "flat channel", "saturated", "white noise", "x 100", "zeros", "NaN", "window 99 of"):
        assert kind in kinds
    chosen = [i for i, kind in enumerate(reference.kinds) if "parity data" in kind]
    assert len(chosen) == 64
    np.testing.assert_array_equal(reference.inputs[chosen[0]], own[0])
    np.testing.assert_array_equal(reference.inputs[chosen[-1]], own[99])
    millivolts = reference.inputs[reference.kinds.index("eeg 0")].std()
    assert 0.005 < millivolts < 0.03
    with torch.no_grad():
        outputs = model.double()(torch.from_numpy(reference.inputs).double()).numpy()
    np.testing.assert_allclose(reference.outputs, outputs, rtol=0, atol=1e-12)
    nan = np.isnan(reference.outputs).any(axis=1)
    assert [reference.kinds[i] for i in np.flatnonzero(nan)] == ["one NaN"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda eeg: eeg.astype(complex), "complex128 are no real numbers"),
        (lambda eeg: eeg.astype(str), "are no real numbers"),
        (lambda eeg: eeg[:, :4], r"have shape \(3, 4, 200\), not \(n, 8, 200\)"),
        (lambda eeg: np.where(np.arange(3)[:, None, None] == 1, np.nan, eeg), "1 of 3 windows of the parity data hold NaN"),
        (lambda eeg: eeg * 1e-6, "e-05 uV, which is no EEG"),
        (lambda eeg: eeg[:0], "have shape"),
    ],
)
def test_parity_data_that_are_no_eeg_are_refused(change, message):
    windows = np.random.default_rng(0).normal(0, 20, (3, 8, 200)).astype(np.float32)
    with pytest.raises(SjepaError, match=message):
        make_reference(build_model(small_spec(), seed=0), change(windows))


# ---------------------------------------------------------------- exports that are not equal


def sabotage(model):
    """Be wrong by a thousandth, as a rewrite with a mistake might be."""
    model = rewrites.rewrite(model)
    model.final_layer[1].weight.data *= 1.001
    return model


def test_an_export_with_a_wrong_rewrite_fails_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("sjepa_deploy.export.to_bundle.rewrite", sabotage)
    message = r"fp32 on ort-cpu is off by 0\.00\d+ of the outputs' scale \(.* at batch \d\), allowed is 1e-05\. Leave these"
    with pytest.raises(ExportParityError, match=message) as caught:
        export_small(tmp_path / "out", small_spec())
    assert [result.passed for result in caught.value.results] == [False]
    assert listing(tmp_path) == {}


def test_the_command_shows_what_differs_and_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sjepa_deploy.export.to_bundle.rewrite", sabotage)
    arguments = ["--variant", "prelocal", "--channels", "8", "--precision", "fp32", "--max-batch", "2"]
    status = run_command(export, "sjepa-export", [*arguments, "--out", str(tmp_path / "out")])
    shown = capsys.readouterr()
    assert status == 1
    assert re.search(r"fp32\s+ort-cpu .* FAILED", shown.out)
    assert re.fullmatch(r"sjepa-export: fp32 on ort-cpu is off by .*\n", shown.err)
    assert listing(tmp_path) == {}


def test_a_graph_that_hides_nan_is_told_as_such():
    failed = judge(hidden_nan)
    assert str(ExportParityError((failed,))).startswith("fp32 on mine does not give NaN where PyTorch does.")


# ---------------------------------------------------------------- bfloat16 on a CPU


def bf16_graph(weights):
    """Return a graph of matrix products in bfloat16 with float32 input and output."""
    helper, bf16 = onnx.helper, onnx.TensorProto.BFLOAT16
    nodes = [helper.make_node("Cast", ["x"], ["x0"], to=bf16, name="narrow")]
    initializers = []
    for i, weight in enumerate(weights):
        nodes.append(helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], name=f"product {i}"))
        bits = weight.bfloat16().view(torch.int16).numpy().tobytes()
        initializers.append(helper.make_tensor(f"w{i}", bf16, weight.shape, bits, raw=True))
    nodes.append(helper.make_node("Cast", [f"x{len(weights)}"], ["y"], to=onnx.TensorProto.FLOAT, name="widen"))
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", weights[0].shape[0]])]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", weights[-1].shape[1]])]
    graph = helper.make_graph(nodes, "products", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_emulated_bfloat16_rounds_as_pytorch_does():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(48, 64, generator=generator), torch.randn(64, 32, generator=generator)]
    x = torch.randn(100, 48, generator=generator)
    proto = emulate_bf16(bf16_graph(weights))
    onnx.checker.check_model(proto, full_check=True)
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    (emulated,) = session.run(None, {"x": x.numpy()})
    rounded = (x.bfloat16() @ weights[0].bfloat16() @ weights[1].bfloat16()).float().numpy()
    plain = (x @ weights[0] @ weights[1]).numpy()
    scale = plain.std()
    assert (emulated == rounded).mean() > 0.9  # sums in another order end on the other side of a tie now and then
    assert np.abs(emulated - rounded).max() < 2**-6 * scale
    assert 1e-4 < np.abs(emulated - plain).max() / scale < 5e-2
    np.testing.assert_array_equal(emulated.view(np.uint32) & 0xFFFF, 0)  # every output is a bfloat16


def test_emulation_takes_a_node_that_reads_one_value_twice():
    value = onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["narrow"], to=onnx.TensorProto.BFLOAT16),
        onnx.helper.make_node("Add", ["narrow", "narrow"], ["sum"]),
        onnx.helper.make_node("Cast", ["sum"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(nodes, "twice", [value("x", kind, [3])], [value("y", kind, [3])])
    model = emulate_bf16(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8))
    onnx.checker.check_model(model, full_check=True)
    x = np.array([1.0, 1.0 + 2**-6, 3.0], np.float32)
    assert np.array_equal(onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})[0], 2 * x)
