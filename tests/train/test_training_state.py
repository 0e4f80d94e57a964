"""`--resume last.pth.tar` goes on with a training of timm's, `python -m convert RUN FILE --training` gives it back."""

import argparse
import json

import numpy as np
import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3

import convert.__main__
import train.main
from convert.errors import ConversionError
from convert.training.run_checkpoint import read_run_checkpoint
from convert.training.torch_checkpoint import read_torch_checkpoint
from tests.train.small_weights import small_timm_model

_CLASSES, _UPDATES = 10, 2  # of an epoch of 224 digits in batches of 112


@pytest.fixture(scope="module")
def last(tmp_path_factory):
    """timm's file after an epoch with AdamW."""
    return _save(tmp_path_factory.mktemp("timm"))


def _save(folder, optimizer="adamw", **settings):
    model = small_timm_model(_CLASSES)
    optimiser = create_optimizer_v2(model, optimizer, lr=1e-3, **{"weight_decay": 0.05, **settings})
    average = ModelEmaV3(model, decay=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(_UPDATES):
        for parameter in model.parameters():
            parameter.grad = 0.1 * torch.randn(parameter.shape, generator=generator)
        optimiser.step()
    saver = CheckpointSaver(
        model, optimiser, model_ema=average, checkpoint_dir=str(folder), args=argparse.Namespace(model="x", opt="x")
    )
    saver.save_checkpoint(0)
    return folder / "last.pth.tar"


@pytest.fixture
def go_on(small_variant, few_digits_dir, no_curves, capsys):
    """Runs the command with a file: status, output and errors."""

    def _go_on(file, *flags):
        argv = [f"--resume={file}", f"--data-dir={few_digits_dir}", "--recipe=digits", "--batch-size=112"]
        argv += ["--lr-stepping=step", "--lr-schedule=constant", "--warmup-epochs=0", "--ema-decay=0.9", *flags]
        try:
            status = train.main.main(argv)
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return _go_on


def test_a_training_goes_on_and_one_without_a_step_left_is_given_back_bit_for_bit(go_on, last, tmp_path, capsys):
    run, back = tmp_path / "run", tmp_path / "back.pth.tar"
    status, out, error = go_on(last, "--epochs=1", "--lr=1e-3", "--lr-batch-size=112", f"--output={run}")
    assert status == 0, error
    assert f"from {last}" in out
    assert "note: it goes on after epoch 1 of 1, step 2; the order of the images" in out
    assert "learning rate was" not in out and "weight decay of" not in out
    assert "epoch 1/1 | held-out loss" in out
    assert convert.__main__.main([str(run), str(back), "--training"]) == 0
    assert "training    1 epochs, 2 updates, adamw, learning rate 0.001, with an average" in capsys.readouterr().out
    before, after = (torch.load(path, weights_only=False) for path in (last, back))
    assert (after["epoch"], after["version"], after["arch"]) == (0, 2, "crossvit_tiny_240")
    for key in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(tensor, after[key][name]) for name, tensor in before[key].items())
    for index, entry in before["optimizer"]["state"].items():
        assert all(torch.equal(value, after["optimizer"]["state"][index][name]) for name, value in entry.items())
    assert after["optimizer"]["param_groups"][1]["initial_lr"] == 1e-3

    # the folder and its checkpoint tell the same
    for source in (f"local-dir:{run}", run / "checkpoints" / "2"):
        assert convert.__main__.main([str(source), "--info"]) == 0
        assert "training    1 epochs, 2 updates, adamw, learning rate 0.001, with an" in capsys.readouterr().out, source

    # the same command again goes on with the folder
    assert go_on(last, "--epochs=1", "--lr=1e-3", "--lr-batch-size=112", f"--output={run}")[0] == 0
    status, out, error = go_on(last, "--epochs=2", "--weight-decay=0.1", f"--output={tmp_path / 'other'}")
    assert status == 0, error
    assert "note: it had a weight decay of 0.05, this run has 0.1" in out
    assert "note: its learning rate was 0.001, that of this run's schedule is 0.00175 there" in out
    steps = [json.loads(line)["step"] for line in (tmp_path / "other" / "metrics.jsonl").read_text().splitlines()]
    assert steps[0] == 2 and steps[-1] == 4

    # that of another run does not, which would leave the file unread
    about = json.loads((run / "config.json").read_text())
    about["train"]["resume"] = None
    (run / "config.json").write_text(json.dumps(about))
    status, out, error = go_on(last, "--epochs=1", "--lr=1e-3", "--lr-batch-size=112", f"--output={run}")
    assert (status, out) == (2, "")
    assert f"the run in {run} was begun without --resume: name a new folder" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer=sgd"], "has the state of adamw, not of sgd: --optimizer"),
        (["--image-size=72"], "has ((4, 4), (2, 2)) patches, and this run has ((6, 6), (3, 3)): --init begins"),
        (["--variant=s"], "holds ti, not the variant s"),
        (["--init=x.pth"], "init begins anew from weights, and resume goes on with a run: leave one out"),
    ],
)
def test_settings_that_do_not_fit_the_state_are_refused(go_on, last, tmp_path, flags, message):
    status, out, error = go_on(last, *flags, f"--output={tmp_path / 'run'}")
    assert (status, out, len(error.splitlines())) == (2, "", 1)
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_parameter_that_was_not_trained_is_named_before_anything_is_written(go_on, last, tmp_path):
    held = torch.load(last, weights_only=False)
    del held["optimizer"]["state"][3]
    torch.save(held, tmp_path / "last.pth.tar")
    status, out, error = go_on(tmp_path / "last.pth.tar", "--epochs=2", f"--output={tmp_path / 'run'}")
    assert (status, out, len(error.splitlines())) == (2, "", 1)
    assert "has no exp_avg of cls_token_1: they were not trained there" in error
    assert not (tmp_path / "run").exists()


def _group(**changes):
    return lambda held: [group.update(changes) for group in held["optimizer"]["param_groups"]]


def _steps(held):
    held["optimizer"]["state"][3]["step"] = torch.tensor(1.0)


def _shape(held):
    held["optimizer"]["state"][2]["exp_avg"] = torch.zeros(5)


def _one_group(held):
    first, second = held["optimizer"]["param_groups"]
    second["params"] = first["params"] + second["params"]
    held["optimizer"]["param_groups"] = [second]


def _not_finite(held):
    held["optimizer"]["state"][0]["exp_avg"].view(-1)[0] = float("nan")


def _l2(held):
    for group in held["optimizer"]["param_groups"]:
        del group["decoupled_weight_decay"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_group(amsgrad=True), "its adamw makes other steps than the one here: amsgrad True"),
        (_group(maximize=True), "its adamw makes other steps than the one here: maximize True"),
        (_group(betas=(0.9, 0.99)), "betas (0.9, 0.99), not (0.9, 0.999)"),
        (_group(decoupled_weight_decay=False), "Adam with weight decay in the gradient (L2), not AdamW"),
        (_l2, "is Adam or AdamW: decoupled_weight_decay is not in its groups, and args.opt is x"),
        (_one_group, "lets biases and norms decay by 0.05, which is not done here"),
        (_steps, "were updated unequally often, most 2 times, but "),
        (_shape, "does not fit the model: exp_avg of pos_embed_1 (5,) instead of (1, 5, 24)"),
        (lambda held: held["optimizer"]["param_groups"].pop(), "has 52 parameters in its groups; timm and IBM have"),
        (lambda held: held["optimizer"].pop("state"), "its optimizer is damaged: KeyError: 'state'"),
        (lambda held: held.pop("optimizer"), "is no training checkpoint: --resume needs a model and its optimizer"),
        (lambda held: held.pop("epoch"), "it does not tell its epoch"),
        (lambda held: held.update(epoch=-5), "its epochs must be a whole number, 0 or more; got -4"),
        (lambda held: held.update(epoch=10**30), "its epochs must be a whole number, 0 or more; got 1000"),
        (_group(lr=-1.0), "its lr must be a number, 0 or more; got -1.0"),
        (_group(lr=10**400), "its optimizer is damaged: OverflowError"),
        (_group(initial_lr=float("inf")), "its peak_lr must be a number, 0 or more; got inf"),
        (_group(eps=torch.zeros(2)), "its optimizer is damaged: RuntimeError"),
        (_not_finite, "the state of its optimizer has NaN or infinity: exp_avg of "),
    ],
)
def test_a_state_that_cannot_go_on_here_is_refused_with_the_reason(small_variant, last, tmp_path, change, message):
    held = torch.load(last, weights_only=False)
    change(held)
    torch.save(held, tmp_path / "changed.pth.tar")
    with pytest.raises(ConversionError) as caught:
        read_torch_checkpoint(tmp_path / "changed.pth.tar")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("data", "steps_per_epoch", 0, "steps_per_epoch must be a whole number, 1 or more; got 0"),
        ("data", "steps_per_epoch", 1.5, "steps_per_epoch must be a whole number, 1 or more; got 1.5"),
        ("train", "lr_batch_size", 0, "lr_batch_size must be a whole number, 1 or more; got 0"),
        ("train", "lr", float("nan"), "lr must be a number, 0 or more; got nan"),
        ("train", "batch_size", 10**400, "batch_size must be a whole number, 1 or more; got 1000"),
        ("train", "layer_decay", "x", "layer_decay must be a number, 0 or more; got 'x'"),
        ("train", None, "x", "is damaged: it has no settings of a run"),
    ],
)
def test_settings_of_a_run_that_are_none_are_refused(tmp_path, part, name, value, message):
    numbers = {"lr": 0.1, "batch_size": 8, "lr_batch_size": 8, "weight_decay": 0, "momentum": 0.9}
    config = {"train": numbers, "data": {"steps_per_epoch": 2}}
    config[part] = value if name is None else config[part] | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError) as caught:
        read_run_checkpoint(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("optimizer", "settings", "message"),
    [
        ("nadamw", {}, "is neither AdamW nor SGD"),
        ("lion", {}, "is neither AdamW nor SGD"),
        ("adamw", {"layer_decay": 0.75}, "timm's layer-wise learning rates, whose layers are others than here"),
        (
            "adamw",
            {"filter_bias_and_bn": False},
            "has 4 + 72 parameters in its groups; timm and IBM have 76 or 52 + 24 or 48 + 28 of them",
        ),
        ("momentum", {}, "its sgd makes other steps than the one here: no nesterov"),
    ],
)
def test_other_optimisers_of_timm_are_refused(small_variant, tmp_path, optimizer, settings, message):
    with pytest.raises(ConversionError) as caught:
        read_torch_checkpoint(_save(tmp_path, optimizer, **settings))
    assert message in str(caught.value)


def test_the_file_of_ibms_script_is_read_in_its_own_order(small_variant, tmp_path):
    """Its model keeps tokens and position embeddings in lists, behind the patch embedding, and lets them decay."""
    state = small_timm_model(_CLASSES).state_dict()
    order = sorted(
        state,
        key=lambda name: (
            ("patch_embed", "pos_embed", "cls_token").index(name.split(".")[0][:-2])
            if name.startswith(("pos_embed_", "cls_token_"))
            else 0
            if name.startswith("patch_embed")
            else 3
        ),
    )
    held = {name.replace("pos_embed_", "pos_embed.").replace("cls_token_", "cls_token."): state[name] for name in order}
    groups = [[name for name in order if state[name].ndim == 1], [name for name in order if state[name].ndim > 1]]
    parameters = [[torch.nn.Parameter(state[name]) for name in names] for names in groups]
    optimiser = torch.optim.AdamW([{"params": parameters[0], "weight_decay": 0.0}, {"params": parameters[1]}], lr=1e-3)
    for parameter in [*parameters[0], *parameters[1]]:
        parameter.grad = torch.ones_like(parameter) * parameter.numel()
    optimiser.step()
    file = {"model": held, "optimizer": optimiser.state_dict(), "epoch": 4, "scaler": {"scale": 1.0}}
    torch.save({**file, "args": argparse.Namespace(opt="adamw"), "lr_scheduler": {}}, tmp_path / "checkpoint.pth")
    carried = read_torch_checkpoint(tmp_path / "checkpoint.pth")
    assert (carried.epochs, carried.updates, carried.rule.decay_tokens) == (5, 1, True)
    assert carried.rule.weight_decay == 0.01
    assert "GradScaler (scaler) is left out" in carried.notes[0]
    assert set(carried.moments["exp_avg"]) == set(state)
    for name, moment in carried.moments["exp_avg"].items():
        np.testing.assert_allclose(moment, np.full(state[name].shape, 0.1 * state[name].numel()), rtol=1e-6)


def test_info_tells_the_training_state_and_writes_nothing(small_variant, last, tmp_path, capsys):
    weights, broken = tmp_path / "weights.pth", tmp_path / "broken.pth.tar"
    held = torch.load(last, weights_only=False)
    torch.save(held["state_dict"], weights)
    _group(maximize=True)(held)
    torch.save(held, broken)
    before = sorted(tmp_path.iterdir())
    told = {}
    for source in (last, weights, broken):
        assert convert.__main__.main([str(source), "--info"]) == 0
        told[source] = capsys.readouterr().out
        assert told[source].startswith("variant     ti; in timm: timm.create_model('crossvit_tiny_240', num_classes=10")
    assert "training    1 epochs, 2 updates, adamw, learning rate 0.001, with an average" in told[last]
    assert "training    no state: weights alone" in told[weights]
    assert "training    its state does not go on in another framework: " in told[broken]
    assert "maximize True" in told[broken]
    assert sorted(tmp_path.iterdir()) == before
    assert convert.__main__.main([str(last), str(tmp_path / "out.pth"), "--info"]) == 2
    assert "--info writes nothing: leave out destination" in capsys.readouterr().err
    assert convert.__main__.main([str(last)]) == 2
    assert "DESTINATION is needed; --info alone writes nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--training", "--num-classes=3"], "--training takes a run as it is: leave out --num-classes"),
        (["--training"], "is not the folder of a training run: --training reads no other"),
    ],
)
def test_what_is_no_run_has_no_training_to_write(tmp_path, capsys, args, message):
    assert convert.__main__.main([str(tmp_path), str(tmp_path / "out.pth.tar"), *args]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_training_is_written_to_a_file_of_torch_only(tmp_path, capsys):
    assert convert.__main__.main([str(tmp_path), str(tmp_path / "out.safetensors"), "--training"]) == 2
    assert "a training checkpoint of torch ends in .pth.tar or .pth" in capsys.readouterr().err
