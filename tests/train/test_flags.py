"""Flags: one per setting, the recipe's defaults, and one line for a mistake."""

import dataclasses
import json
import typing
from fractions import Fraction

import pytest

from convert.command_line import data_set
from convert.errors import SettingsError
from train.config import TrainConfig
from train.flags import _MEANT, parse_flags
from train.recipes import RECIPES


def test_without_flags_the_digits_are_trained_with_their_recipe():
    assert parse_flags([]) == RECIPES["digits"]


def test_other_data_is_trained_with_the_papers_recipe():
    assert parse_flags(["--dataset", "imagenet2012"]) == dataclasses.replace(
        RECIPES["imagenet"], dataset="imagenet2012"
    )


def test_weights_to_start_from_mean_fine_tuning():
    config = parse_flags(["--dataset", "cifar10", "--init", "x.pth"])
    assert config == dataclasses.replace(RECIPES["finetune"], dataset="cifar10", init="x.pth")
    assert parse_flags(["--init", "x.pth"]) == dataclasses.replace(RECIPES["digits"], init="x.pth")
    config = parse_flags(["--dataset", "cifar10", "--init", "x.pth", "--recipe", "imagenet"])
    assert config == dataclasses.replace(RECIPES["imagenet"], dataset="cifar10", init="x.pth")


def test_the_path_of_a_folder_is_taken_for_one_unless_it_is_a_prepared_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "digits").mkdir()
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    (tmp_path / "cifar10" / "3.0.2" / "dataset_info.json").write_text("{}")
    for text in ("photos", str(tmp_path / "photos"), "folder:photos"):
        assert data_set(text) == f"folder:{text.removeprefix('folder:')}"
    for text in ("digits", "cifar10", "imagenet2012"):
        assert data_set(text) == text


def test_the_recipe_can_be_chosen_for_any_data():
    config = parse_flags(["--dataset", "cifar10", "--recipe", "digits"])
    assert config == dataclasses.replace(RECIPES["digits"], dataset="cifar10")


def test_every_setting_has_a_flag_with_help_that_shows_the_recipes_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line is broken
    with pytest.raises(SystemExit) as exit:
        parse_flags(["--recipe", "imagenet", "--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(TrainConfig):
        choices = ",".join(word for word in typing.get_args(field.type) if isinstance(word, str))
        takes = "" if field.metadata["parse"] is bool else f" {{{choices}" if choices else f" {field.name.upper()}"
        assert f"--{field.name.replace('_', '-')}{takes}" in text
        assert field.metadata["help"].split("%")[0] in text
    for default in ("300", "4096", "0.0005", "0.08,1", "rand-m9-mstd0.5-inc1"):
        assert f"(default: {default})" in text


def test_help_tells_the_flags_of_every_day_first_and_the_others_in_titled_groups(capsys):
    with pytest.raises(SystemExit):
        parse_flags(["--help"])
    text = capsys.readouterr().out
    titles = ("data and run:", "images:", "optimiser and schedule:")
    places = [text.index(f"\n{title}\n") for title in titles]
    first, rest = text[text.index("\noptions:\n") : places[0]], text[places[0] :]
    assert all(f"\n  {flag} " in first and f"\n  {flag} " not in rest for flag in ("--dataset", "--epochs", "--lr"))
    assert all(f"\n  {flag} " in rest and f"\n  {flag} " not in first for flag in ("--workers", "--mixup", "--mesh"))
    assert places == sorted(places) and places[1] < text.index("  --hflip ") < places[2] < text.index("  --momentum ")


def test_none_is_taken_wherever_it_is_shown():
    """Of every setting that may be nothing, also where a recipe gives it a value."""
    for field in dataclasses.fields(TrainConfig):
        may_be_nothing = None in typing.get_args(field.type) or type(None) in typing.get_args(field.type)
        if may_be_nothing and field.name != "reduce_tokens":  # where the word is for all tokens
            assert getattr(parse_flags([f"--{field.name.replace('_', '-')}", "none"]), field.name) is None
    assert parse_flags(["--reduce-tokens", "none"]).reduce_tokens == "none"
    finetune = ["--recipe", "finetune", "--clip-grad", "none", "--auto-augment", "none"]
    assert RECIPES["finetune"].clip_grad is not None and RECIPES["imagenet"].auto_augment
    assert (parse_flags(finetune).clip_grad, parse_flags(finetune).auto_augment) == (None, "")


def test_a_default_is_shown_so_that_it_gives_the_same_number(capsys):
    with pytest.raises(SystemExit):
        parse_flags(["--help"])
    assert "(default: 1,2/3)" in " ".join(capsys.readouterr().out.split())
    assert parse_flags(["--image-scale", "1,2/3"]) == parse_flags([])


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ("--model crossvit_tiny_240", "; here that is --variant"),
        ("--aa=rand-m9", "; here that is --auto-augment"),
        ("--reprob 0.1", "; here that is --erase-prob"),
        ("--model-ema", "; here that is --ema-decay 0.9998"),
        ("--opt sgd", "; here that is --optimizer"),
        ("--batch_size 3", "; did you mean --batch-size?"),
        ("--epoch=3", "; did you mean --epochs?"),
        ("--nothing-like-it", ""),
    ],
)
def test_a_mistyped_flag_or_one_of_timms_is_answered_with_ours(capsys, flags, hint):
    with pytest.raises(SystemExit):
        parse_flags(flags.split())
    assert capsys.readouterr().err == f"python -m train.main: error: unrecognized arguments: {flags}{hint}\n"


def test_what_other_programs_call_a_flag_is_no_flag_of_ours_and_names_one():
    flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(TrainConfig)}
    assert not flags & set(_MEANT)
    named = {ours.split()[0] for ours in _MEANT.values() if ours.startswith("-")}
    assert named <= flags


def _written(tmp_path, **settings):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"train": dataclasses.asdict(dataclasses.replace(RECIPES["transfer"], **settings))}))
    return str(file)


def test_a_runs_settings_are_defaults_but_not_what_it_wrote_or_who_it_was(tmp_path):
    file = _written(tmp_path, output="runs/x", coordinator="a:1", num_processes=2, process_id=0, variant="s", lr=0.25)
    config = parse_flags(["--config", file])
    assert config == dataclasses.replace(RECIPES["transfer"], variant="s", lr=0.25)
    assert parse_flags([f"--config={file}", "--lr=0.5", "--seed=3"]) == dataclasses.replace(config, lr=0.5, seed=3)


def test_a_runs_settings_shown_by_help_are_those_of_the_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_flags(["--config", _written(tmp_path, lr=0.25), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.25)" in text and f"The defaults shown are those of {tmp_path}" in text


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], "cannot read {file}: No such file or directory"),
        ("{", [], "cannot read {file}: "),
        ("[]", [], "{file} is not the config.json of a run: it has no settings under the name train"),
        ('{"train": {"learning_rate": 1}}', [], "the run that wrote {file} was started by another version: "),
        ('{"train": {"lr": -1}}', [], "lr must be above 0; got -1"),
        ('{"train": {}}', ["--recipe=digits"], "--config and --recipe are both sets of defaults: leave one out"),
        ('{"train": {}}', ["--resume=runs/x"], "a run that is resumed has its settings: leave --config out"),
    ],
)
def test_settings_that_cannot_be_taken_over_are_refused_in_one_line(tmp_path, capsys, content, flags, message):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as exit:
        parse_flags(["--config", str(file), *flags])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    assert message.format(file=file) in error


def test_every_recipe_can_be_named():
    (field,) = (field for field in dataclasses.fields(TrainConfig) if field.name == "recipe")
    assert typing.get_args(field.type) == tuple(RECIPES)


def test_values_are_read_by_the_type_of_the_setting():
    config = parse_flags(["--lr=2e-3", "--image-scale=1,2/3", "--image-size=96", "--data-dir=here", "--mixup", "0.5"])
    assert (config.lr, config.image_scale, config.image_size) == (2e-3, (1.0, 2 / 3), 96)
    assert (config.data_dir, config.mixup) == ("here", 0.5)
    assert parse_flags(["--freeze-backbone"]).freeze_backbone
    assert not parse_flags(["--recipe=imagenet-ibm", "--no-decay-tokens"]).decay_tokens


def test_paths_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = parse_flags(["--dataset=folder:~/photos", "--data-dir=~/data", "--output=~/run"])
    assert (config.dataset, config.data_dir, config.output) == (
        "folder:/home/me/photos",
        "/home/me/data",
        "/home/me/run",
    )
    assert parse_flags(["--dataset=folder:a/~b/"]).dataset == "folder:a/~b/"


def test_the_warm_up_shrinks_with_the_epochs_unless_it_is_given():
    assert parse_flags(["--recipe=imagenet", "--epochs=100"]).warmup_epochs == 10
    assert parse_flags(["--recipe=imagenet", "--epochs=1"]).warmup_epochs == 0
    assert parse_flags(["--recipe=imagenet", "--epochs=100", "--warmup-epochs=30"]).warmup_epochs == 30


_BRANCH = "embed_dim=12,depth=1:2,num_heads=2,mlp_ratio=2,patch_size=12,image_scale=1"


def test_branches_of_ones_own_replace_a_variants():
    config = parse_flags(["--branches", _BRANCH, "embed_dim=8,depth=1,num_heads=2,patch_size=16,image_scale=2/3"])
    assert config.branches == (_BRANCH, "embed_dim=8,depth=1,num_heads=2,mlp_ratio=4,patch_size=16,image_scale=2/3")
    model = config.model_config(10)
    assert (model.name, model.stages, model.depth) == ("custom", 2, ((1, 2), 1))
    assert (model.image_size, model.image_scale) == ((48, 48), (1, Fraction(2, 3)))  # not the recipe's scales
    with pytest.raises(SettingsError, match="image_scale must be 2 values, one per branch"):
        parse_flags(["--image-scale=1"]).model_config(10)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epoch=3"], "unrecognized arguments: --epoch=3"),
        (["--epochs=many"], "argument --epochs: invalid int value: 'many'"),
        (["--epochs=0"], "epochs must be at least 1; got 0"),
        (["--epochs=-1"], "epochs must be at least 1; got -1"),
        (["--recipe=paper"], "argument --recipe: invalid choice: 'paper'"),
        (["--batch-size=0"], "batch_size must be at least 1"),
        (["--workers=-1"], "workers must be at least 0 and at most 1024; got -1"),
        (["--lr=nan"], "lr must be above 0; got nan"),
        (["--lr=-1"], "lr must be above 0"),
        (["--seed=-1"], "seed must be 0 or more"),
        (["--seed=4294967296"], "seed must be below 2**32"),
        (["--smoothing=1"], "smoothing must be at least 0 and below 1"),
        (["--image-scale=x"], "argument --image-scale: invalid number_tuple value: 'x'"),
        (["--image-scale=1,2/0"], "argument --image-scale"),
        (["--crop-scale=0.5,0.1"], "crop_scale must be rising numbers"),
        (["--warmup-epochs=20", "--epochs=20"], "warmup_epochs must be below the 20 epochs; got 20"),
        (["--epochs=" + "9" * 20], "epochs must be a whole number below 1e+15; got 99999999999999999999"),
        (["--workers=100000"], "workers must be at least 0 and at most 1024; got 100000"),
        (["--image-size=" + "1" * 31], "image_size must be a whole number below 1e+15"),
        (["--crop-scale=1e99999999,1"], "invalid number_pair value: '1e99999999,1'"),
        (["--seed=" + "9" * 5000], "argument --seed: invalid int value"),
        (["--auto-augment=rand-m9-n100000000"], "auto_augment has numbers below 1000; got rand-m9-n100000000"),
        (["--variant=tii"], "unknown CrossViT variant 'tii'; did you mean 'ti'?"),
        (["--output=a\0b"], "argument --output: a\\x00b is no path: a NUL is in it"),
        (["--init=a\0b"], "argument --init: a\\x00b is no path: a NUL is in it"),
        (["--dataset=folder:a\0b"], "a\\x00b is no path: a NUL is in it"),
        (["--wandb=a\0b"], "wandb must be a text without NUL"),
        (["--coordinator=host", "--num-processes=2", "--process-id=0"], "coordinator must be address:port"),
        (["--coordinator=host:99999", "--num-processes=2", "--process-id=1"], "must be address:port, such as"),
        (["--coordinator=", "--num-processes=2", "--process-id=1"], "coordinator must be address:port"),
        (["--lr-stepping=timm"], "lr_stepping must be epoch or step or epoch-late; got timm"),
        (["--optimizer=adam"], "optimizer must be adamw or sgd; got adam"),
        (["--loss=mse"], "loss must be softmax or bce"),
        (["--layer-decay=0"], "layer_decay must be above 0 and at most 1"),
        (["--clip-grad=0"], "clip_grad must be above 0"),
        (["--coordinator=here:1"], "coordinator, num_processes and process_id go together"),
        (["--coordinator=here:1", "--num-processes=2", "--process-id=2"], "process_id must be below num_processes 2"),
        (["--val-fraction=1"], "val_fraction must be above 0 and below 1"),
        (["--qat=int4"], "qat int4 is for weights that are trained already: name them with --init"),
        (["--qat=int4", "--init=x", "--freeze-backbone"], "freeze_backbone trains only them: leave one out"),
        (["--output=~nobody-of-this-name/x"], "--output: ~nobody-of-this-name/x: ~nobody-of-this-name is nobody's"),
        (["--data-dir=~nobody-of-this-name"], "argument --data-dir: ~nobody-of-this-name: "),
        (["--dataset=folder:~nobody-of-this-name/x"], "argument --dataset: ~nobody-of-this-name/x: "),
        (["--resume=~nobody-of-this-name/x"], "argument --resume: ~nobody-of-this-name/x: "),
        ([f"--data-dir={'x' * 300}"], ": File name too long"),
        ([f"--dataset=folder:{'x' * 300}"], ": File name too long"),
        (["--branches", _BRANCH, "depth=1"], "argument --branches: embed_dim, num_heads, patch_size must be given"),
        (["--branches", _BRANCH, "--variant=s"], "branches replace those of the variant s: leave one out"),
        (["--branches", _BRANCH, "--image-scale=1"], "image_scale is a setting of each of the branches: leave it out"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        parse_flags(flags)
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_without_a_run_cannot_be_resumed(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit:
        parse_flags([f"--resume={tmp_path / 'nowhere'}"])
    assert exit.value.code == 2
    assert f"there is no run in {tmp_path / 'nowhere'}" in capsys.readouterr().err


def test_settings_are_checked_without_flags_too():
    with pytest.raises(SettingsError, match="drop_path"):
        TrainConfig(drop_path=1.0)


def test_an_unknown_variant_and_a_size_that_does_not_divide_are_said_with_what_would_work():
    with pytest.raises(SettingsError, match="did you mean 'ti'"):
        TrainConfig(variant="tii").model_config(10)
    with pytest.raises(SettingsError, match="nearest valid sizes are 96 and 120"):
        dataclasses.replace(RECIPES["digits"], image_size=100).model_config(10)
