"""Every form in which people hold these weights, and every way in which such a file can be bad."""

import argparse
import collections
import datetime
import decimal
import fractions
import json
import os
import pathlib
import pickle
import shutil
import types
import uuid
import zipfile

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from flax import nnx
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

from convert import ConversionError, load_flax, load_weights, to_flax
from convert.formats.read import read
from convert.tree import to_flax_paths


def _assert_holds(path, state):
    tensors = load_weights(path).tensors
    assert tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert np.array_equal(tensors[name], tensor.numpy()), name


@pytest.fixture
def few(state):
    """Some tensors of a model, which `read` returns as they are."""
    names = ("cls_token_0", "pos_embed_1", "norm.0.weight", "blocks.0.fusion.0.norm1.bias")
    return {name: state[name] for name in names}


def _notes(path, few):
    """Those of a source that holds these tensors."""
    stored = read(path)
    assert stored.tensors.keys() == few.keys()
    for name, tensor in few.items():
        assert np.array_equal(stored.tensors[name], tensor.numpy()), name
    return stored.notes


def _error(path):
    with pytest.raises(ConversionError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- torch checkpoints ---


@pytest.mark.parametrize("key", ["model", "state_dict", "state_dict_ema", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_nested_and_wrapped_checkpoints_are_read(tmp_path, state, key, prefix):
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"epoch": 299, key: {prefix + name: tensor for name, tensor in state.items()}}, path)
    _assert_holds(path, state)


def test_ibms_training_checkpoint_is_read(tmp_path, state):
    names = {name: name.replace("pos_embed_", "pos_embed.").replace("cls_token_", "cls_token.") for name in state}
    checkpoint = {
        "model": {names[name]: tensor for name, tensor in state.items()},
        "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "args": argparse.Namespace(model="crossvit_tiny_224", lr=0.004),
    }
    path = tmp_path / "crossvit_tiny_224.pth"
    torch.save(checkpoint, path)
    _assert_holds(path, state)


def test_averaged_weights_are_preferred_and_the_choice_is_told(tmp_path, state):
    path = tmp_path / "both.pth"
    torch.save({"model": {name: tensor + 1 for name, tensor in state.items()}, "model_ema": state}, path)
    _assert_holds(path, state)
    assert load_weights(path).notes == ("the weights under model_ema were taken, not model",)


@pytest.mark.parametrize("average", ["ema", "ema_state_dict", "averaged_model"])
@pytest.mark.parametrize("raw", ["model", "net"])
def test_an_average_that_timm_does_not_take_is_told(tmp_path, few, raw, average):
    path = tmp_path / "both.pth"
    torch.save({raw: few, average: {name: tensor + 1 for name, tensor in few.items()}}, path)
    assert _notes(path, few) == [f"the weights under {raw} were taken, not {average}"]
    beside = {average: {"decay": 0.9, "shadow": [torch.ones(3)]}, "ema_decay": 0.9, "avg_losses": [0.5, 0.25]}
    torch.save({raw: few, **beside}, path)  # as torch-ema keeps it: without names
    assert _notes(path, few) == [f"the weights under {raw} were taken, not {average}"]


@pytest.mark.parametrize("keys", ["model_state_dict", "net", "params", "weights", "ema", "state/model", "a/b/c"])
def test_weights_under_any_keys_are_read(tmp_path, few, keys):
    held = few
    for key in reversed(keys.split("/")):
        held = {key: held, "epoch": 3}
    path = tmp_path / "checkpoint.pt"
    torch.save({**held, "optimizer": {"exp_avg": few}}, path)
    assert _notes(path, few) == ([] if keys == "params" else [f"the weights under {keys} were taken"])


_PREFIXES = [
    "model.",
    "net.",
    "backbone.",
    "encoder.",
    "model._orig_mod.",
    "_forward_module.model.",
    "module.encoder_q.",
]


@pytest.mark.parametrize("prefix", _PREFIXES)
@pytest.mark.parametrize("form", ["pth", "safetensors", "flax"])
def test_weights_behind_any_prefix_are_read(tmp_path, few, prefix, form):
    path = tmp_path / "file"
    beside = {"fc.weight": torch.ones(2, 3), "n_averaged": torch.tensor(7)}
    if form == "pth":
        torch.save({"state_dict": {prefix + name: tensor for name, tensor in few.items()} | beside}, path)
    elif form == "safetensors":
        save_file({prefix + name: tensor for name, tensor in few.items()} | beside, path)
    else:
        arrays = to_flax_paths({name: tensor.numpy() for name, tensor in few.items()})
        arrays = {prefix + name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_numpy(arrays | {name: tensor.numpy() for name, tensor in beside.items()}, path)
    place = "state_dict/" * (form == "pth") + prefix
    left = "left out, since they are not the model's weights: fc.weight, n_averaged"
    assert _notes(path, few) == [f"the weights under {place} were taken", left]


def test_wrappers_inside_a_model_are_dropped(tmp_path, few):
    path = tmp_path / "wrapped.pth"
    wrapped = {name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._orig_mod."): x for name, x in few.items()}
    torch.save({f"_orig_mod.module.{name}": tensor for name, tensor in wrapped.items()}, path)
    assert _notes(path, few) == []


@pytest.mark.parametrize("form", ["keys", "prefixes", "safetensors"])
def test_two_models_are_refused_by_their_names(tmp_path, few, form):
    path = tmp_path / "two"
    models = [{f"{who}.{name}": tensor.clone() for name, tensor in few.items()} for who in ("student", "teacher")]
    if form == "keys":
        torch.save({"student": few, "teacher": few}, path)
    elif form == "prefixes":
        torch.save({"state_dict": models[0] | models[1]}, path)
    else:
        save_file(models[0] | models[1], path)
    message = _error(path)
    assert "holds 2 models" in message and "save the one that is meant alone" in message
    assert "student" in message and "teacher" in message


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_counters_and_states_of_metrics_are_left_out_and_told(tmp_path, few, form):
    path = tmp_path / "file"
    beside = {"n_averaged": torch.tensor(7), "train_top1.correct": torch.ones(3, dtype=torch.int64)}
    beside["loss.mean"] = torch.tensor(0.5)
    if form == "pth":
        torch.save({**few, **beside, "epoch": 3}, path)
    else:
        save_file(few | beside, path)
    (note,) = _notes(path, few)
    names = {"n_averaged", "train_top1.correct", "loss.mean", *(["epoch"] if form == "pth" else [])}
    assert note.startswith("left out") and set(note.partition(": ")[2].split(", ")) == names


def test_an_averaged_model_of_torch_is_read_without_its_counter(tmp_path, few):
    path = tmp_path / "averaged.pth"
    torch.save({"n_averaged": torch.tensor(7)} | {f"module.{name}": tensor for name, tensor in few.items()}, path)
    assert _notes(path, few) == ["left out, since they are not the model's weights: n_averaged"]


@pytest.mark.parametrize(
    ("prefix", "average", "note"),
    [
        ("", "ema_model.module.", "the weights under no key were taken, not ema_model.module."),
        ("model.", "ema.", "the weights under model. were taken, not ema."),
        ("model.", "model.ema.", "the weights under model. were taken, not model.ema."),
    ],
)
@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_an_average_behind_a_prefix_is_told_once_and_no_part_of_the_model(tmp_path, few, prefix, average, note, form):
    path = tmp_path / "file"
    held = {prefix + name: tensor for name, tensor in few.items()}
    held |= {average + name: tensor + 1 for name, tensor in few.items()}
    (torch.save if form == "pth" else save_file)(held, path)
    assert _notes(path, few) == [note]


def test_the_weights_of_another_model_are_told_by_their_names_not_by_a_counter(tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save({"bn1.num_batches_tracked": torch.tensor(3), "conv1.weight": torch.ones(2, 3, 7, 7)}, path)
    with pytest.raises(ConversionError, match=r"these 1 tensors are no CrossViT \(conv1.weight, …\); it would have"):
        load_weights(path)


def test_what_may_be_a_layer_of_another_model_is_not_left_out(tmp_path, few):
    path = tmp_path / "more.pth"
    fc = {"fc.weight": torch.ones(2, 3)}
    torch.save(few | fc, path)
    assert _notes(path, few | fc) == []


def test_values_of_numpy_paths_and_dates_are_no_reason_to_refuse(tmp_path, few):
    values = [np.float64(0.5), np.int64(3), np.bool_(True), np.str_("a"), np.arange(3), np.dtype("float32"), np.float32]
    values += [pathlib.PurePosixPath("/data"), pathlib.Path("runs"), pathlib.PureWindowsPath("C:/data")]
    values += [datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), datetime.timedelta(3), types.SimpleNamespace(a=1)]
    values += [collections.defaultdict(list, {"loss": [0.5]}), collections.defaultdict(float), collections.deque([1])]
    values += [decimal.Decimal("0.1"), fractions.Fraction(1, 3), uuid.UUID(int=1), 1j, frozenset({1}), range(3)]
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": few, "values": values, "args": argparse.Namespace(output=pathlib.Path("runs"))}, path)
    assert _notes(path, few) == []
    # as numpy 1 names them, and as a machine with Windows does
    path_module = pathlib.PosixPath.__module__.encode()  # another one in Python 3.13
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "other.pth", "w") as other:
        for entry in archive.infolist():
            data = archive.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data and path_module + b"\nPosixPath" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                data = data.replace(path_module + b"\nPosixPath", path_module + b"\nWindowsPath")
            other.writestr(entry.filename, data)
    assert _notes(tmp_path / "other.pth", few) == []


def test_checkpoints_of_old_torch_are_read(tmp_path, state):
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    _assert_holds(path, state)


def test_parameters_that_require_gradients_are_read(tmp_path, timm_model, state):
    path = tmp_path / "parameters.pth"
    torch.save(dict(timm_model.named_parameters()), path)
    _assert_holds(path, state)


class _Malicious:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, state, zipped):
    path = tmp_path / "malicious.pth"
    witness = tmp_path / "witness"
    torch.save({"model": state, "x": _Malicious(f"touch {witness}")}, path, _use_new_zipfile_serialization=zipped)
    message = _error(path)
    assert "might run code" in message
    assert "system" in message
    assert not witness.exists()


def test_a_bare_pickle_is_refused_and_not_run(tmp_path):
    path = tmp_path / "malicious.bin"
    witness = tmp_path / "witness"
    path.write_bytes(pickle.dumps(_Malicious(f"touch {witness}")))
    assert "not read" in _error(path)
    assert not witness.exists()


def test_a_whole_pickled_model_is_refused(tmp_path, timm_model):
    path = tmp_path / "model.pth"
    torch.save(timm_model, path)
    message = _error(path)
    assert "timm.models.crossvit.CrossVit" in message
    assert "state dict" in message


def test_a_checkpoint_without_weights_tells_what_it_holds(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"epoch": 3, "net": {"a": torch.ones(1)}}, path)
    assert "it holds epoch, net" in _error(path)
    torch.save([torch.ones(1)], path)
    assert "holds a list" in _error(path)


# --- safetensors ---


def test_safetensors_with_timms_ibms_and_flaxs_names_are_read(tmp_path, state):
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    _assert_holds(path, state)
    save_file({name.replace("pos_embed_", "pos_embed."): tensor for name, tensor in state.items()}, path)
    _assert_holds(path, state)
    arrays = to_flax_paths({name: tensor.numpy() for name, tensor in state.items()})
    save_numpy({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    _assert_holds(path, state)


def test_files_are_told_apart_by_content_not_by_name(tmp_path, state):
    path = tmp_path / "pytorch_model.bin"
    save_file(state, path)
    _assert_holds(path, state)


def test_other_dtypes_are_refused_by_name(tmp_path, state):
    path = tmp_path / "int8.safetensors"
    state["norm.0.bias"] = state["norm.0.bias"].to(torch.int8)
    save_file(state, path)
    assert "norm.0.bias (I8)" in _error(path)


# --- damage ---


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_told(tmp_path, state, kind, share):
    path = tmp_path / f"file.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert ("is empty" if share == 0 else "damaged") in _error(path)


def test_changed_bytes_in_a_torch_checkpoint_are_told(weights_file):
    data = bytearray(weights_file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    weights_file.write_bytes(data)
    assert "checksum" in _error(weights_file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>Not found</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
        (b"\x93NUMPY", "neither a safetensors file nor a torch checkpoint"),
        (b"\x80\x02garbage", "damaged"),
        (b"\xff" * 8 + b"{", "neither"),
        (b"PK\x03\x04 but no zip", "damaged"),
    ],
)
def test_other_content_is_told(tmp_path, content, message):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    assert message in _error(path)


def test_a_missing_file_is_told_with_a_hint_to_the_hub(tmp_path):
    assert "does not exist" in _error(tmp_path / "nothing.pth")
    assert "did you mean hf-hub:timm/crossvit_15_dagger_408.in1k?" in _error("timm/crossvit_15_dagger_408.in1k")


def test_damaged_metadata_is_told(tmp_path, state):
    path = tmp_path / "model.safetensors"
    for text, message in (("{", "damaged"), ('{"format": 99}', "newer version"), ('{"format": 1}', "damaged")):
        save_file(state, path, metadata={"crossvit": text})
        with pytest.raises(ConversionError, match=message):
            load_weights(path)


# --- Orbax ---


def _orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def test_orbax_trees_of_others_are_read(tmp_path, state):
    params = to_flax(state)
    _assert_holds(_orbax(tmp_path / "bare", params), state)
    moments = jax.tree.map(np.zeros_like, params)
    _assert_holds(_orbax(tmp_path / "training", {"opt": {"mu": moments}, "params": params}), state)
    assert load_weights(tmp_path / "training").notes == ()
    _assert_holds(_orbax(tmp_path / "averaged", {"ema": moments, "opt": {"mu": moments}, "params": params}), state)
    assert load_weights(tmp_path / "averaged").notes == ("the weights under params were taken, not ema",)
    both = _orbax(tmp_path / "both", {"student": {"params": params}, "teacher": {"params": params}})
    assert "holds 2 models, under student/params, teacher/params" in _error(both)


def test_an_orbax_checkpoint_of_an_nnx_state_is_read(tmp_path, weights_file, state):
    _assert_holds(_orbax(tmp_path / "state", nnx.state(load_flax(weights_file))), state)


def test_the_latest_step_of_a_checkpoint_manager_is_read(tmp_path, state):
    with ocp.CheckpointManager(tmp_path) as manager:
        for step in (9, 10):
            params = to_flax({name: tensor + (10 - step) for name, tensor in state.items()})
            tree = {"params": params, "step": np.int32(step)}
            manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(tree)))
            manager.wait_until_finished()
    _assert_holds(tmp_path, state)
    assert "step 10, the latest of 2, was taken" in load_weights(tmp_path).notes


def test_a_run_with_an_average_of_its_weights_says_which_were_taken(tmp_path, state):
    save_file(state, tmp_path / "weights.safetensors")
    assert load_weights(tmp_path).notes == ("weights.safetensors was taken",)
    save_file({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "weights-ema.safetensors")
    _assert_holds(tmp_path, state)
    note = "weights.safetensors was taken, not weights-ema.safetensors"
    assert load_weights(tmp_path).notes == (note,)


def test_other_folders_and_damaged_checkpoints_are_told(tmp_path, state):
    assert "no Orbax checkpoint" in _error(tmp_path)
    assert "no cls_token_0" in _error(_orbax(tmp_path / "other", {"a": np.ones(3)}))
    folder = _orbax(tmp_path / "damaged", to_flax(state))
    shutil.rmtree(folder / "d")
    shutil.rmtree(folder / "ocdbt.process_0")
    assert "damaged Orbax checkpoint" in _error(folder)


# --- the hub ---


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An offline huggingface_hub with a cache folder of its own, laid out as its downloads are."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(repo, filename, source, revision="main"):
        folder = cache / f"models--{repo.replace('/', '--')}"
        commit = "0123456789abcdef0123456789abcdef01234567"
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / revision).write_text(commit)
        shutil.copy(source, snapshot / filename)
        return snapshot

    return add


def test_the_hub_is_read_through_its_cache(hub, tmp_path, state):
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    hub("timm/crossvit_tiny_240.in1k", "model.safetensors", path)
    _assert_holds("hf-hub:timm/crossvit_tiny_240.in1k", state)
    _assert_holds("hf_hub:timm/crossvit_tiny_240.in1k", state)


def test_the_config_of_a_repository_is_heeded_and_its_absence_from_the_cache_told(hub, tmp_path, state):
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    snapshot = hub("someone/finetuned", "model.safetensors", path)
    (note,) = load_weights("hf-hub:someone/finetuned").notes
    assert "config.json is not in the cache" in note
    said = {"architecture": "crossvit_tiny_240", "pretrained_cfg": {"mean": [0.485, 0.456, 0.406]}}
    (snapshot / "config.json").write_text(json.dumps(said))
    assert load_weights("hf-hub:someone/finetuned").notes == ()
    (snapshot / "config.json").write_text(json.dumps(said | {"pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}))
    with pytest.raises(ConversionError, match=r"hf-hub:someone/finetuned: .*mean \(0.5, 0.5, 0.5\), not"):
        load_weights("hf-hub:someone/finetuned")


def test_a_repository_with_weights_in_several_files_is_read(hub, tmp_path, state):
    first, second = [*state][:9], [*state][9:]
    for name, keys in (("a.safetensors", first), ("b.safetensors", second)):
        save_file({key: state[key] for key in keys}, tmp_path / name)
    places = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    snapshot = hub("someone/large", index.name, index)
    shutil.copy(tmp_path / "a.safetensors", snapshot)
    assert f"b.safetensors is not in the cache, and {index.name} names it" in _error("hf-hub:someone/large")
    shutil.copy(tmp_path / "b.safetensors", snapshot)
    _assert_holds("hf-hub:someone/large", state)


def test_a_repository_with_a_torch_checkpoint_and_a_revision_is_read(hub, weights_file, state):
    hub("someone/finetuned", "pytorch_model.bin", weights_file, revision="v2")
    _assert_holds("hf-hub:someone/finetuned@v2", state)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf-hub:timm/crossvit_tiny_240.in1k", "not in the cache, and HF_HUB_OFFLINE is set"),
        ("hf-hub:a/b/c", "Repo id must be"),
        ("hf-hub:", "Repo id must use"),
    ],
)
def test_what_the_hub_cannot_give_is_told(hub, source, message):
    assert message in _error(source)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "gated"),
        ("RepositoryNotFoundError", "no such repository"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("RemoteEntryNotFoundError", "neither model.safetensors nor pytorch_model.bin"),
        ("HfHubHTTPError", "could not be downloaded: the server said so"),
    ],
)
def test_the_hubs_answers_are_told(monkeypatch, error, message):
    import httpx2
    import huggingface_hub

    response = httpx2.Response(404, request=httpx2.Request("GET", "http://localhost"))

    def answer(*args, **kwargs):
        raise getattr(huggingface_hub.errors, error)("the server said so", response=response)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    assert message in _error("hf-hub:someone/model@v9")


def test_an_unreachable_hub_is_asked_once(monkeypatch):
    import huggingface_hub

    asked = []

    def answer(repo, file, *, local_files_only, **kwargs):
        asked.append((file, local_files_only))
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    assert "the hub cannot be reached" in _error("hf-hub:someone/model")
    assert asked == [("model.safetensors", False), ("pytorch_model.bin", True), ("model.safetensors.index.json", True)]


def test_paths_may_be_strings_or_paths_below_home(monkeypatch, weights_file, state):
    monkeypatch.setenv("HOME", str(weights_file.parent))
    _assert_holds(f"~/{weights_file.name}", state)
    _assert_holds(pathlib.Path(weights_file), state)
