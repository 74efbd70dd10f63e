"""Another bundle in the place of the one that decides, between two windows; and a second one beside it."""

import dataclasses
import shutil
import threading
import time

import numpy as np
import pytest
from bundles import copy_bundle, flip_byte, rehash, small_spec
from streams import ScriptedSource, assert_accounted, chunks_of, decode_samples, eeg, info_of, predictions, run_stream

import sjepa_deploy
from sjepa_deploy.bundle import REFERENCE_FILE, Bundle
from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.decisions.description import LayerDescription
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.probabilities import Probabilities
from sjepa_deploy.runtime.decisions.stored import write_layer
from sjepa_deploy.runtime.decisions.threshold import Threshold
from sjepa_deploy.runtime.live.commands import Load
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.exchange import check_exchange
from sjepa_deploy.runtime.live.recorder import record
from sjepa_deploy.runtime.live.records import read_record
from sjepa_deploy.runtime.live.replay import replay
from sjepa_deploy.runtime.live.shadow import Shadow
from sjepa_deploy.runtime.live.swap import take_loads
from sjepa_deploy.spec import Preprocessing

CLASSES = ("left", "right", "rest")
SAMPLES, STAMPS = eeg(1000), np.arange(1000) / 100.0


def with_layer(bundle, path, enter):
    """Copy a bundle and give it a decision layer of its own."""
    copied = Bundle.open(copy_bundle(bundle, path))
    write_default(copied, enter)
    return copied


def write_default(bundle, enter):
    steps = (Probabilities(temperature=0.02), Threshold(enter=enter))
    known = {"name": "default", "bundle": bundle.manifest.digest, "output_name": "prediction", "class_names": CLASSES}
    write_layer(bundle, LayerDescription(steps=steps, n_outputs=3, **known))


@pytest.fixture(scope="module")
def bundles(make_bundle, tmp_path_factory):
    """Two bundles of one contract: another variant, other weights, another threshold."""
    folder = tmp_path_factory.mktemp("swap")
    first = with_layer(make_bundle("prelocal", class_names=CLASSES), folder / "a", 0.6)
    second = with_layer(make_bundle("postlocal", class_names=CLASSES, model_seed=3), folder / "b", 0.7)
    return first, second


@pytest.fixture(scope="module")
def predict(bundles):
    with sjepa_deploy.load(bundles[0], check_unit=False) as predict:
        yield predict


def run(predict, plan, paths, *, layer=None, prepare=lambda decoder: None):
    """Decode 10 s; `plan` holds (second, name to load). The next chunk waits for the thread that opens a bundle."""
    decoder = Decoder(predict, ScriptedSource(info_of(predict.spec), chunks_of(SAMPLES, STAMPS)), decisions=layer)
    take_loads(decoder, paths)
    plan, replies = list(plan), []

    def look(chunk):
        for thread in threading.enumerate():
            if thread.name == "load":
                thread.join()
        while plan and plan[0][0] <= chunk.received:
            replies.append(decoder.commands.submit(Load(bundle=plan.pop(0)[1])))

    decoder.on_chunk(look)
    prepare(decoder)
    with decoder:
        decisions = list(decoder)
    assert_accounted(decoder.counters, decisions)
    return decoder, decisions, [reply.result() for reply in replies]


def alone(bundle, layer):
    """Return the decisions of a bundle that decides from the start."""
    with sjepa_deploy.load(bundle, check_unit=False) as predict:
        decoder = Decoder(
            predict,
            ScriptedSource(info_of(predict.spec), chunks_of(SAMPLES, STAMPS)),
            decisions=DecisionLayer.load(bundle) if layer else None,
        )
        return list(decoder)


def test_no_window_is_lost_and_each_is_of_one_bundle(predict, bundles, tmp_path):
    """Twice: there and back. The record is replayed with the bundles that decided, and gives the same states."""
    kept = []
    layer = DecisionLayer.load(bundles[0])
    decoder, decisions, replies = run(
        predict,
        [(4.0, "b"), (7.0, "a")],
        {"a": bundles[0].path, "b": bundles[1].path},
        layer=layer,
        prepare=lambda decoder: kept.append(record(decoder, tmp_path / "run.xdf")),
    )
    kept[0].close()
    assert all(reply.accepted for reply in replies), replies
    first, second = (reply.data["window"] for reply in replies)
    assert [d.index for d in decisions] == list(range(81))
    assert 15 < first < 40 < second < 70
    ours, theirs = (alone(bundle, True) for bundle in bundles)
    for mine, other, decision in zip(ours, theirs, decisions, strict=True):
        wanted = other if first <= decision.index < second else mine
        assert decision.prediction.tobytes() == wanted.prediction.tobytes()
    assert [d.state for d in decisions[:first]] == [d.state for d in ours[:first]]
    fresh = DecisionLayer.load(bundles[1])
    states = [fresh.step(d.prediction, d.time, d.flags) for d in decisions[first:second]]
    assert [d.state for d in decisions[first:second]] == states
    assert decoder.predict.bundle.path == bundles[0].path
    assert predict(np.zeros((1, *predict.spec.input_shape), np.float32)).shape == (1, 3)  # whoever gave it closes it
    result = replay(predict, read_record(tmp_path / "run.xdf"))
    assert result.passed
    assert (result.n_decisions, result.n_states) == (81, 81)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sfreq": 128.0}, "sfreq: 100.0 and 128.0"),
        ({"class_names": ("left", "rest", "right")}, "class_names: left, right, rest and left, rest, right"),
        ({"n_outputs": 2, "class_names": ("left", "right")}, "output_shape: 3 and 2"),
        ({"unit": "mV"}, "unit: uV and mV"),
        ({"phase": "causal"}, "phase: zero-phase and causal"),
        ({"task": "regression", "class_names": None}, "task: classification and regression"),
        ({"preprocessing": Preprocessing(l_freq=1.0)}, "steps: "),
    ],
)
def test_what_differs_between_two_contracts_is_told(changes, why):
    ours, theirs = small_spec(class_names=CLASSES), small_spec("postlocal", **{"class_names": CLASSES} | changes)
    with pytest.raises(StreamError, match=why):
        check_exchange(ours, theirs)
    check_exchange(ours, small_spec("contextual", class_names=CLASSES))


def test_a_bundle_of_another_contract_changes_nothing(predict, make_bundle):
    other = make_bundle("prelocal", class_names=CLASSES, sfreq=128.0)
    _, clean, _ = decode_samples(predict, SAMPLES)
    _, decisions, (reply,) = run(predict, [(4.0, "x")], {"x": other.path})
    assert not reply.accepted
    assert "sfreq: 100.0 and 128.0" in reply.text
    assert predictions(decisions) == predictions(clean)


def test_what_cannot_be_trusted_is_not_loaded(predict, bundles, tmp_path):
    """A name that was not given, a damaged file, a bundle that does not give its reference, no decision layer."""
    damaged, wrong, bare = (copy_bundle(bundles[1], tmp_path / name) for name in ("damaged", "wrong", "bare"))
    flip_byte(next(damaged.glob("*.onnx")))
    reference = Bundle.open(wrong).reference()
    dataclasses.replace(reference, outputs=-reference.outputs).save(wrong / REFERENCE_FILE)
    rehash(wrong, REFERENCE_FILE)
    write_default(Bundle.open(wrong), 0.7)
    shutil.rmtree(bare / "decisions")
    paths = {path.name: path for path in (damaged, wrong, bare, tmp_path / "nothing")}
    plan = [(3.0 + i, name) for i, name in enumerate([*paths, "/etc"])]
    layer = DecisionLayer.load(bundles[0])
    _, decisions, replies = run(predict, plan, paths, layer=layer)
    told = dict(zip([*paths, "/etc"], replies, strict=True))
    assert not any(reply.accepted for reply in replies)
    for name, why in {
        "damaged": "hash",
        "wrong": "reference",
        "bare": "no decision layer",
        "nothing": "nothing",
        "/etc": "No bundle was named",
    }.items():
        assert why in told[name].text, told[name]
    assert predictions(decisions) == predictions(alone(bundles[0], True))


def test_a_shadow_tells_where_two_bundles_disagree(predict, bundles):
    shadows = []

    def watch(decoder):
        shadows.extend(Shadow(decoder, bundle.path) for bundle in bundles)

    _, decisions, _ = run(predict, [], {}, prepare=watch)
    for shadow in shadows:
        shadow.close()
    same, other = (shadow.report for shadow in shadows)
    assert (same.n_compared, same.n_disagree, same.largest_difference, same.error) == (81, 0, 0.0, None)
    theirs = alone(bundles[1], False)
    wanted = [
        (a.index, CLASSES[a.prediction.argmax()], CLASSES[b.prediction.argmax()])
        for a, b in zip(decisions, theirs, strict=True)
        if a.prediction.argmax() != b.prediction.argmax()
    ]
    assert wanted
    assert [(one.index, one.ours, one.theirs) for one in other.disagreements] == wanted
    assert (other.n_disagree, sum(other.pairs.values()), other.n_left_out) == (len(wanted), len(wanted), 0)
    assert other.largest_difference == max(
        float(abs(a.prediction - b.prediction).max()) for a, b in zip(decisions, theirs, strict=True)
    )


@pytest.mark.alone
def test_no_window_is_late_while_a_bundle_is_opened(bundles):
    """Ten loads in a run in real time, one after the other."""
    with Decoder.open(bundles[0], "synthetic", StreamConfig(hop=0.05, late="queue")) as decoder:
        take_loads(decoder, {"a": bundles[0].path, "b": bundles[1].path})
        decisions = []
        decoder.on_decision(decisions.append)
        thread = threading.Thread(target=decoder.run)
        thread.start()
        time.sleep(4)
        n, quiet = len(decisions), decoder.counters.misses
        for i in range(10):
            assert decoder.commands.submit(Load(bundle="ba"[i % 2])).result(20).accepted
        loads, misses = len(decisions) - n, decoder.counters.misses - quiet
        decoder.stop()
        thread.join()
    latency = np.array([d.latency for d in decisions]) * 1e3
    print(  # noqa: T201
        f"late {quiet} of {n} before, {misses} of {loads} while bundles were opened; latency in ms p50 and largest "
        f"{np.median(latency[:n]):.2f} {latency[:n].max():.2f} before, {np.median(latency[n:]):.2f} {latency[n:].max():.2f} while"
    )
    assert misses <= quiet + loads // 50


def test_the_command_compares_a_shadow_and_knows_bundles_to_load(bundles, tmp_path, capsys):
    options = ["--source", "synthetic", "--speed", "inf", "--late", "queue", "--duration", "5", "--quiet"]
    assert run_stream(bundles[0].path, *options, "--shadow", bundles[1].path) == 0
    assert "disagrees about" in capsys.readouterr().out
    assert run_stream(bundles[0].path, *options, "--allow-load", f"b={bundles[1].path}") == 2
    assert "--feedback" in capsys.readouterr().err
    socket = ["--feedback", "127.0.0.1:0", "--allow-load"]
    assert run_stream(bundles[0].path, *options, *socket, f"b={tmp_path / 'nothing'}") == 2
    assert run_stream(bundles[0].path, *options, *socket, "b") == 2
    assert "NAME=BUNDLE" in capsys.readouterr().err
    assert run_stream(bundles[0].path, *options, *socket, f"b={bundles[1].path}") == 0
