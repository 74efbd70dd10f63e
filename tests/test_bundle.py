import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from bundles import RANDOM, copy_bundle, edit_manifest, export_small, flip_byte, listing, rehash, small_spec

import sjepa_deploy
from sjepa_deploy.bundle import Bundle, new_bundle
from sjepa_deploy.errors import BundleError, ExportError
from sjepa_deploy.onnx_file import has_external_data, metadata_of


@pytest.fixture
def path(make_bundle, tmp_path):
    """Return a bundle that a test may alter."""
    return copy_bundle(make_bundle("prelocal"), tmp_path / "bundle")


# ---------------------------------------------------------------- opening


def test_a_bundle_says_what_it_is_wherever_it_is_copied(path):
    bundle = Bundle.open(str(path))
    assert bundle.spec == small_spec("prelocal")
    assert (bundle.path, bundle.checkpoint, bundle.precisions) == (path, path / "checkpoint", ("fp32",))
    assert bundle.graph_path("fp32") == path / "model.fp32.onnx"
    assert bundle.manifest.weights == RANDOM
    assert bundle.manifest.weights.random
    assert {*bundle.manifest.tools} >= {"python", "torch", "onnx", "onnxruntime", "numpy", "sjepa-deploy"}
    assert [(r.backend, r.passed, r.batch_sizes) for r in bundle.manifest.parity] == [("ort-cpu", True, (1, 2, 3, 4))]
    on_disk = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert bundle.manifest.files.keys() == on_disk - {"manifest.json"}
    reference = bundle.reference()
    assert reference.outputs.shape == (len(reference.kinds), 3)
    with pytest.raises(BundleError, match=r"has no fp16 graph\. Use fp32, or export with --precision fp16"):
        bundle.graph("fp16")


def refuses(path, message):
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_bundle(tmp_path):
    refuses(tmp_path / "nowhere", r"There is no bundle at .*nowhere\. Check the path, or make one with sjepa-export")
    refuses(tmp_path, r"is no bundle: it holds no manifest\.json\. Name the folder that sjepa-export wrote")
    (tmp_path / "file").touch()
    refuses(tmp_path / "file", "is no bundle")
    refuses(tmp_path / ("x" * 300), "cannot be read")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"tolerance": NaN}', b'{"tolerance": 1e999}'])
def test_a_manifest_that_is_not_json(path, text):
    (path / "manifest.json").write_bytes(text)
    refuses(path, r"manifest\.json is not JSON")


@pytest.mark.parametrize("text", [b"[]", b"null", b"{}", b'{"schema_version": "1"}'])
def test_a_manifest_of_another_shape(path, text):
    (path / "manifest.json").write_bytes(text)
    refuses(path, r"manifest\.json does not fit the schema: .*Copy or export the bundle again")


def test_a_newer_schema_whatever_it_holds(path):
    edit_manifest(path, lambda m: m.update(schema_version=3, colour="blue"))
    refuses(path, "has schema version 3; this release reads up to 2. Upgrade sjepa-deploy")


@pytest.mark.parametrize("batch", [0, -1, 65_537, 10**9])
def test_a_batch_that_no_memory_holds(path, batch):
    edit_manifest(path, lambda m: m["graphs"][0].update(max_batch=batch))
    refuses(path, f"states batches of {batch} windows")


def test_a_missing_file(path):
    (path / "checkpoint/model.safetensors").unlink()
    refuses(path, r"lacks its file checkpoint/model\.safetensors\. Copy or export the bundle again")


@pytest.mark.parametrize("name", ["model.fp32.onnx", "reference.npz", "checkpoint/model.safetensors", "checkpoint/config.json"])
@pytest.mark.parametrize("at", [0, -1])
def test_one_flipped_bit_in_any_file(path, name, at):
    flip_byte(path / name, at)
    refuses(path, rf"{name} of the bundle .* was changed after it was written \(its hash differs\)")


EDITS = {
    "another rate": lambda m: m["spec"]["signal"].update(sfreq=250.0),
    "another channel order": lambda m: m["spec"]["signal"]["ch_names"].reverse(),
    "another band": lambda m: m["spec"]["signal"]["steps"][0].update(h_freq=30.0),
    "a larger batch": lambda m: m["graphs"][0].update(max_batch=99),
    "trained weights": lambda m: m["weights"].update(source="trained.ckpt"),
    "better parity": lambda m: m["parity"][0].update(max_error=0.0),
    "another file": lambda m: m["files"].pop("checkpoint/config.json"),
    "another time": lambda m: m.update(created="2020-01-01T00:00:00+00:00"),
    "another torch": lambda m: m["tools"].update(torch="1.0"),
    "no digest": lambda m: m.update(digest=""),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_manifest(path, edit):
    edit_manifest(path, edit, sign=False)
    refuses(path, r"manifest\.json was changed after it was written \(its digest differs\)")


def test_an_edited_manifest_that_describes_no_model(path):
    edit_manifest(path, lambda m: m["spec"]["signal"].update(n_times=100))
    refuses(path, r"its spec is invalid \(n_times is 100")


@pytest.mark.parametrize(
    "name", ["../x", "checkpoint/../../x", "{outside}", "..\\x", "", ".", "x\0y", "link", "folder/x", "loop"]
)
def test_files_that_leave_the_folder(path, name):
    outside = path.parent / "x"
    outside.write_bytes((path / "model.fp32.onnx").read_bytes())
    (path / "link").symlink_to(outside)
    (path / "folder").symlink_to(path.parent)
    (path / "loop").symlink_to("loop")
    right = Bundle.open(path).manifest.files["model.fp32.onnx"]
    edit_manifest(path, lambda m: m["files"].update({name.format(outside=outside): right}))
    refuses(path, r"which leaves the folder\. Do not use this bundle" if name != "loop" else "leaves the folder|lacks its file")


def test_a_graph_that_is_a_link_out_of_the_folder(path):
    (path / "model.fp32.onnx").rename(path.parent / "elsewhere.onnx")
    (path / "model.fp32.onnx").symlink_to(path.parent / "elsewhere.onnx")
    refuses(path, r"names 'model\.fp32\.onnx', which leaves the folder")


def test_a_bundle_behind_a_link_opens(path):
    (path.parent / "latest").symlink_to(path)
    assert Bundle.open(path.parent / "latest").spec == small_spec()


@pytest.mark.parametrize("name", ["model.fp32.onnx", "reference.npz"])
def test_a_file_without_a_hash(path, name):
    edit_manifest(path, lambda m: m["files"].pop(name))
    refuses(path, rf"has no hash for {name}\. Export the bundle again")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_reference_of_another_shape(path, lost):
    arrays = dict(np.load(path / "reference.npz"))
    name = ("inputs", "outputs")[lost]
    np.savez(path / "reference.npz", **arrays | {name: arrays[name][:, :-1]})
    rehash(path, "reference.npz")
    with pytest.raises(BundleError, match=r"The reference of .* does not fit its model"):
        Bundle.open(path).reference()


# The contract inside the graph is what is left when somebody exchanges files and signs the manifest again.
FOREIGN = {
    "unit": {"variant": "prelocal", "unit": "V"},
    "variant, weights": {"variant": "postlocal"},
    "static_batch": {"variant": "prelocal", "static_batch": 4},
}


@pytest.mark.parametrize(("differs", "fields"), FOREIGN.items(), ids=FOREIGN)
def test_a_graph_of_another_model_with_its_hash_signed(make_bundle, path, differs, fields):
    shutil.copy(make_bundle(**fields).graph_path("fp32"), path)
    rehash(path, "model.fp32.onnx")
    with pytest.raises(
        BundleError, match=rf"contract inside model\.fp32\.onnx is not the manifest's: it differs in {differs}\. "
    ):
        sjepa_deploy.load(path)


def test_a_graph_of_the_same_model_with_other_weights_and_its_hash_signed(path, tmp_path):
    shutil.copy(export_small(tmp_path / "other", small_spec("prelocal"), model_seed=1).graph_path("fp32"), path)
    rehash(path, "model.fp32.onnx")
    refuses(path, r"contract inside model\.fp32\.onnx is not the manifest's: it differs in weights\. ")


def test_a_checkpoint_of_other_weights_with_its_hash_signed(path, tmp_path):
    """The graph decodes and the checkpoint is what others load: they are of one model, or the bundle does not open."""
    export_small(tmp_path / "other", small_spec("prelocal"), model_seed=1)
    shutil.copy(tmp_path / "other/checkpoint/model.safetensors", path / "checkpoint")
    rehash(path, "checkpoint/model.safetensors")
    refuses(path, r"model\.fp32\.onnx was made from other weights than those in checkpoint")


def test_a_bundle_whose_graphs_say_nothing_of_their_weights_opens(path):
    """As releases before the hash of the weights wrote them."""
    import onnx

    graph = onnx.load(path / "model.fp32.onnx")
    (entry,) = (each for each in graph.metadata_props if each.key == "sjepa_deploy")
    contract = json.loads(entry.value)
    assert contract.pop("weights") == Bundle.open(path).graph("fp32").weights_sha256
    entry.value = json.dumps(contract, sort_keys=True, separators=(",", ":"))
    onnx.save(graph, path / "model.fp32.onnx")
    rehash(path, "model.fp32.onnx")
    refuses(path, "it differs in weights")  # an old graph in a bundle that knows better
    edit_manifest(path, lambda m: m["graphs"][0].pop("weights_sha256"))
    assert Bundle.open(path).graph("fp32").weights_sha256 is None


def external_weights(path):
    """Move the weights of the graph into a file of their own."""
    import onnx

    graph = onnx.load(path / "model.fp32.onnx")
    onnx.save(graph, path / "model.fp32.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)


def test_weights_in_another_file_are_refused(path):
    external_weights(path)
    rehash(path, "model.fp32.onnx")
    refuses(path, r"model\.fp32\.onnx has weights in another file, which nothing vouches for")


@pytest.mark.parametrize("name", ["checkpoint/model.safetensors", "checkpoint/config.json"])
def test_a_checkpoint_without_a_hash_is_refused(path, name):
    edit_manifest(path, lambda m: m["files"].pop(name))
    refuses(path, rf"has no hash for {name}\. Export the bundle again")


NO_ONNX = [b"", b"hello", b"\x3a\xff\xff\xff\xff\x0f", b"\x72\x02\x0a", b"\x72\x05\x12\x03\xff\xff\xff"]


@pytest.mark.parametrize("content", NO_ONNX)
def test_a_graph_that_is_no_onnx_file(path, content):
    (path / "model.fp32.onnx").write_bytes(content)
    rehash(path, "model.fp32.onnx")
    refuses(path, r"model\.fp32\.onnx is no ONNX file|it has none")


def external(tensor):
    import onnx

    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="elsewhere.bin")
    return tensor


def test_external_weights_are_found_wherever_a_graph_may_hold_them():
    """The oracle is the package `onnx`, which makes the files: a place that is overlooked would be read without a hash."""
    import onnx
    from onnx import helper

    tensor = helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [1.0])
    sparse = helper.make_sparse_tensor(tensor, helper.make_tensor("i", onnx.TensorProto.INT64, [1], [0]), [1])

    def graph(*nodes, initializer=(), sparse_initializer=()):
        made = helper.make_graph(list(nodes), "g", [], [], initializer=list(initializer))
        made.sparse_initializer.extend(sparse_initializer)
        return made

    def places():
        yield "initializer", graph(initializer=[tensor])
        yield "constant", graph(helper.make_node("Constant", [], ["x"], value=tensor))
        yield "tensors", graph(helper.make_node("Own", [], ["x"], values=[tensor]))
        yield "sparse", graph(sparse_initializer=[sparse])
        yield "sparse constant", graph(helper.make_node("Constant", [], ["x"], sparse_value=sparse))
        inner = graph(helper.make_node("Constant", [], ["x"], value=tensor))
        yield "branch", graph(helper.make_node("If", ["c"], ["x"], then_branch=inner, else_branch=graph()))
        yield "branches", graph(helper.make_node("Own", [], ["x"], graphs=[graph(), inner]))

    def model_of(made):
        return helper.make_model(made)

    assert not any(has_external_data(model_of(made).SerializeToString()) for _, made in places())
    external(tensor)
    sparse.values.CopyFrom(tensor)
    for name, made in places():
        assert has_external_data(model_of(made).SerializeToString()), name
    node = helper.make_node("Constant", [], ["x"], value=tensor)
    function = helper.make_function("d", "f", [], ["x"], [node], [helper.make_opsetid("", 17)])
    model = helper.make_model(graph(), functions=[function])
    assert has_external_data(model.SerializeToString())
    helper.set_model_props(model, {"one": "1", "two": "zwei, größer"})
    assert metadata_of(model.SerializeToString()) == {"one": "1", "two": "zwei, größer"}


def test_a_graph_without_a_contract(path):
    import onnx

    graph = onnx.load(path / "model.fp32.onnx")
    del graph.metadata_props[:]
    onnx.save(graph, path / "model.fp32.onnx")
    rehash(path, "model.fp32.onnx")
    with pytest.raises(BundleError, match="is not the manifest's: it has none"):
        sjepa_deploy.load(path)


# ---------------------------------------------------------------- writing


def test_an_existing_bundle_is_replaced_with_force_only(path):
    before = listing(path.parent)
    with pytest.raises(ExportError, match=r"There is a bundle at .* already\. Use --force to replace it"):
        export_small(path, small_spec())
    assert listing(path.parent) == before
    export_small(path, small_spec(n_outputs=2), force=True)
    assert Bundle.open(path).spec.n_outputs == 2
    assert [entry.name for entry in path.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("content", ["diary.txt", "manifest.json", "manifest.json/x"])
def test_other_peoples_folders_are_never_replaced(tmp_path, force, content):
    """A web page's manifest.json makes no bundle."""
    out = tmp_path / "out"
    (out / content).parent.mkdir(parents=True)
    (out / content).write_text('{"name": "my page", "icons": []}')
    before = listing(tmp_path)
    with (
        pytest.raises(ExportError, match=r"out is a folder with other content\. .*--force replaces bundles only"),
        new_bundle(out, force=force),
    ):
        pytest.fail("the block must not run")
    assert listing(tmp_path) == before


def test_a_damaged_bundle_can_be_replaced(path):
    flip_byte(path / "model.fp32.onnx")
    edit_manifest(path, EDITS["another rate"], sign=False)
    with new_bundle(path, force=True) as folder:
        (folder / "new").touch()
    assert listing(path.parent) == {"bundle": None, "bundle/new": b""}


def test_files_and_links_are_not_replaced(tmp_path, path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(path)
    for out in (tmp_path / "file", tmp_path / "link"):
        with pytest.raises(ExportError, match=r"exists and is no folder\. Choose another --out"), new_bundle(out, force=True):
            pytest.fail("the block must not run")


def test_an_empty_folder_is_filled_and_missing_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a/b/c"):
        with new_bundle(out) as folder:
            (folder / "x").write_text("x")
        assert listing(out) == {"x": b"x"}
        assert out.stat().st_mode & 0o777 == 0o755  # not the 0o700 of temporary folders
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "empty"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_bundle_and_nothing_else(path, error):
    before = listing(path.parent)
    with pytest.raises(error), new_bundle(path, force=True) as folder:  # noqa: PT012, a context manager is under test
        (folder / "model.fp32.onnx").write_bytes(b"half")
        raise error
    assert listing(path.parent) == before


def test_an_exception_within_an_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr("sjepa_deploy.export.to_bundle.to_onnx", fail)
    with pytest.raises(MemoryError):
        export_small(tmp_path / "out", small_spec())
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_move_that_fails_keeps_the_old_bundle(path, monkeypatch, exchanges):
    before, rename = listing(path.parent), Path.rename

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    def fail_for_the_new_one(self, target):
        return fail() if ".partial-" in self.name else rename(self, target)

    monkeypatch.setattr("sjepa_deploy.bundle.exchange", fail if exchanges else lambda *_: False)
    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(ExportError, match=r"cannot be written \(Input/output error\)"), new_bundle(path, force=True):
        pass
    assert listing(path.parent) == before


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_bundle_is_replaced_where_folders_cannot_be_exchanged(path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr("sjepa_deploy.bundle.exchange", lambda *_: False)
    with new_bundle(path, force=True) as folder:
        (folder / "new").touch()
    assert listing(path.parent) == {"bundle": None, "bundle/new": b""}


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_during_an_export_stays(tmp_path, force):
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="other content"), new_bundle(out, force=force) as folder:  # noqa: PT012
        (folder / "mine").touch()
        out.mkdir()
        (out / "notes.txt").write_text("three hours of work")
    assert listing(tmp_path) == {"out": None, "out/notes.txt": b"three hours of work"}


def test_of_two_exports_to_one_place_one_fails(tmp_path, make_bundle):
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="There is a bundle at"), new_bundle(out) as folder:  # noqa: PT012
        (folder / "mine").touch()
        copy_bundle(make_bundle("prelocal"), out)
    assert Bundle.open(out).spec == small_spec()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_force_deletes_the_bundle_alone(path):
    (path / "engines").mkdir()
    (path / "engines" / "0.plan").touch()
    (path / "recordings").mkdir()
    (path / "recordings" / "s1.txt").write_text("data")
    before = listing(path)
    with pytest.raises(ExportError, match=r"not the bundle's: recordings/s1\.txt"), new_bundle(path, force=True):
        pytest.fail("the block must not run")
    assert listing(path) == before
    shutil.rmtree(path / "recordings")
    with new_bundle(path, force=True) as folder:
        (folder / "new").touch()
    assert listing(path) == {"new": b""}


def test_a_folder_that_cannot_be_moved_is_refused_before_the_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in (Path(), Path(".."), Path("/proc")):
        with pytest.raises(ExportError, match="Name a new folder in it"), new_bundle(out):
            pytest.fail("the block must not run")


def swap(path, other):
    """Put a copy of the bundle `other` in the place of `path`, as an export with --force does."""
    with new_bundle(path, force=True) as folder:
        shutil.copytree(other.path, folder, dirs_exist_ok=True)


@pytest.mark.parametrize("where", ["sjepa_deploy.bundle.file_hash", "sjepa_deploy.runtime.backends.ort.open_session"])
def test_a_bundle_that_is_replaced_while_it_is_opened_is_one_of_both(make_bundle, path, monkeypatch, where):
    other = make_bundle("prelocal", model_seed=1)
    windows = np.float32(np.random.default_rng(0).normal(0, 20, (1, 8, 200)))
    with sjepa_deploy.load(other) as predict:
        wanted = predict(windows)
    opened = Bundle.open(path)
    module, _, name = where.rpartition(".")
    function, times = getattr(importlib.import_module(module), name), iter([other])

    def swap_first(*args):
        monkeypatch.setattr(where, function)  # replacing needs it too
        swap(path, next(times))
        return function(*args)

    monkeypatch.setattr(where, swap_first)
    with sjepa_deploy.load(path) as predict:
        assert predict.bundle.manifest.digest == other.manifest.digest
        np.testing.assert_allclose(predict(windows), wanted, atol=1e-6)
    assert not opened.current
    with pytest.raises(BundleError, match="was replaced while it was opened"):
        sjepa_deploy.load(opened)


def test_a_copy_that_has_inode_and_time_of_what_it_replaced_is_another_bundle(path, monkeypatch):
    """File systems give the inode of a deleted manifest to the next one, and `copytree` gives a copy the original's time."""
    real, opened = os.stat, Bundle.open(path)
    manifest = path / "manifest.json"
    before = real(manifest)

    class Reused:
        def __getattr__(self, name):
            return getattr(before if name in ("st_ino", "st_mtime_ns", "st_mtime") else real(manifest), name)

    time.sleep(0.02)
    copy = path.with_name("copy")
    shutil.copytree(path, copy)
    swap(path, Bundle.open(copy))
    assert real(manifest).st_mtime_ns == before.st_mtime_ns
    monkeypatch.setattr(Path, "stat", lambda self, **how: Reused() if self == manifest else real(self, **how))
    assert not opened.current


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file/out", Path("/proc/out"), tmp_path / ("x" * 300)):
        with pytest.raises(ExportError, match=r"cannot be written \(.*\)\. Choose another --out"), new_bundle(out):
            pytest.fail("the block must not run")
    assert listing(tmp_path) == {"file": b""}


# ---------------------------------------------------------------- killed, and out of space

PRELUDE = """
    import os, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[-1])
    from bundles import export_small, small_spec
    out = Path(sys.argv[1])
"""


def python(code, *args, prefix=()):
    """Run `code` after PRELUDE in another process."""
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(code)
    command = [*prefix, sys.executable, "-W", "error", "-c", code, *map(str, args), str(Path(__file__).parent)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_killed_export_leaves_nothing_that_opens(path):
    """Killed at its last step, when all files but the manifest are written."""
    code = """
        import signal

        def progress(text):
            if text == "judging the fp32 graph":
                os.kill(os.getpid(), signal.SIGKILL)

        export_small(out, small_spec(), force=True, progress=progress)
    """
    before = listing(path)
    assert python(code, path).returncode == -signal.SIGKILL
    assert listing(path) == before
    (partial,) = [entry for entry in path.parent.iterdir() if entry != path]
    assert {"checkpoint", "model.fp32.onnx", "reference.npz"} <= {entry.name for entry in partial.iterdir()}
    refuses(partial, "it holds no manifest")


@pytest.mark.soak
def test_exports_that_are_killed_at_random_leave_a_whole_bundle_or_none(tmp_path):
    """A few kills; ``python benchmarks/killed_exports.py 40 --out RESULT`` makes as many as wanted."""
    script = Path(__file__).parents[1] / "benchmarks/killed_exports.py"
    command = [sys.executable, str(script), "4", "--seconds", "2", "--out", str(tmp_path / "result")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["kills"]["kills"] == 4
    assert result["loads"]["mixed"] == 0
    assert result["loads"]["loads"] >= 2
    assert result["loads"]["replacements"] >= 2


def test_the_folder_of_an_export_that_runs_stays_and_that_of_a_killed_one_goes(tmp_path):
    out = tmp_path / "out"
    (tmp_path / ".out.partial-killed").mkdir()
    (tmp_path / ".out.partial-killed" / "model.fp32.onnx").touch()
    (tmp_path / ".other.partial-killed").mkdir()
    with new_bundle(out) as first, pytest.raises(RuntimeError), new_bundle(out) as second:  # noqa: PT012
        assert listing(tmp_path).keys() == {".other.partial-killed", first.name, second.name}
        raise RuntimeError
    assert listing(tmp_path).keys() == {".other.partial-killed", "out"}


def test_a_folder_that_is_taken_for_a_killed_ones_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    make, made = tempfile.mkdtemp, []

    def made_and_deleted(**where):
        made.append(Path(make(**where)))
        if len(made) == 1:
            made[0].rmdir()
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", made_and_deleted)
    with new_bundle(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert len(made) == 2
    assert listing(tmp_path) == {"out": None, "out/new": b""}


@pytest.mark.parametrize("moved", [False, True])
def test_a_process_that_is_killed_between_two_moves_loses_no_bundle(path, monkeypatch, moved):
    """Where the system cannot exchange two folders, the old bundle makes room first."""
    killed, rename = os.fork(), Path.rename
    if not killed:

        def die(self, target):
            if moved:
                rename(self, target)
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr("sjepa_deploy.bundle.exchange", lambda *_: False)
        monkeypatch.setattr(Path, "rename", die)
        with new_bundle(path, force=True) as folder:
            (folder / "new").touch()
    _, status = os.waitpid(killed, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert path.exists() == (not moved)
    assert len(list(path.parent.iterdir())) == 2 + (not moved)
    with pytest.raises(ExportError, match="There is a bundle at"), new_bundle(path):
        pytest.fail("the block must not run")
    assert Bundle.open(path).spec == small_spec()
    with new_bundle(path, force=True) as folder:
        (folder / "new").touch()
    assert listing(path.parent) == {"bundle": None, "bundle/new": b""}


FULL_DISK = """
    import resource
    from sjepa_deploy.errors import ExportError

    def leave(n_bytes):
        if sys.argv[2] == "disk":  # a file takes up the rest of a small disk of its own
            with (out / "ballast").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - n_bytes or 1)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))

    disk = os.statvfs(out)
    for kib in (0, 40, 80):
        leave(kib << 10)
        try:
            export_small(out / "bundle", small_spec())
        except ExportError as e:
            print(e)
        else:
            print(f"{kib} KiB were enough")
        (out / "ballast").unlink(missing_ok=True)
        assert not any(out.iterdir()), list(out.iterdir())
"""


def test_a_full_disk_leaves_nothing(tmp_path):
    """On a real disk of 1 MiB where this machine lets us mount one, and else with the kernel's limit on file sizes."""
    out = tmp_path / "out"
    out.mkdir()
    unshare = ("unshare", "--user", "--map-root-user", "--mount")
    mount = f"mount -t tmpfs -o size=1m tmpfs '{out}'"
    prefix = (*unshare, "sh", "-c", f'{mount} && exec "$@"', "sh")
    mounts = subprocess.run((*prefix, "true"), capture_output=True).returncode == 0
    done = python(FULL_DISK, out, "disk" if mounts else "limit", prefix=prefix if mounts else ())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"There is no space left for {out / 'bundle'}. Free some, or choose another --out.\n" * 3
