"""Three branches go through a run, its evaluation and its pictures like two."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from convert import load_flax
from tests.three_branches import TEXTS, save_three, three_config
from tests.train.steps import abstract_classifier
from train.main import main
from train.optim.optimizer import layer_scales
from train.optim.quantize import fake_quantised
from train.pictures.attention import class_token_attention
from train.predict import main as predict


def test_a_run_with_branches_is_kept_and_continued(few_digits_dir, no_curves, tmp_path, capsys):
    texts = [text.replace("depth=1", "depth=1:1") for text in TEXTS]
    texts[0] += ",attention=spatial-reduction:2"
    folder, flags = tmp_path / "run", ["--branches", *texts]
    settings = [
        f"--data-dir={few_digits_dir}",
        f"--output={folder}",
        "--epochs=1",
        "--batch-size=75",
        "--layer-decay=0.8",
    ]
    assert main([*settings, *flags]) == 0
    kept = json.loads((folder / "config.json").read_text())
    assert kept["train"]["branches"] == texts
    assert kept["train"]["variant"] == "custom"
    assert load_flax(folder).config.image_scale == three_config(10).image_scale
    losses = [json.loads(line).get("train/loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([loss for loss in losses if loss is not None]).all()
    capsys.readouterr()
    assert main([*settings, *flags]) == 0
    assert "CrossViT custom at 48 pixels" in capsys.readouterr().out
    assert main([*settings, "--branches", *texts[:2]]) == 2
    assert "embed_dim was [12, 24, 16] and is [12, 24]" in capsys.readouterr().err


def test_pictures_show_every_branch(tmp_path, capsys):
    weights = save_three(tmp_path / "three.safetensors", "ab", fusion_depth=2)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)).save(tmp_path / "x.png")
    pictures = tmp_path / "pictures"
    assert predict([f"--weights={weights}", str(tmp_path / "x.png"), f"--attention={pictures}"]) == 0
    with Image.open(pictures / "x.png") as picture:
        width, height = picture.size
    assert height / width == pytest.approx((7.9 + 3.634) / 16.5, abs=0.01)  # a row more than with two branches
    attention = nnx.jit(class_token_attention)(load_flax(weights), jnp.zeros((1, 48, 48, 3)))
    assert [values.shape[1] for values in attention["own"]] == [17, 5, 10]
    assert [values.shape[1] for values in attention["across"]] == [5, 10, 17]  # over those of the next branch


def test_the_learning_rate_falls_once_per_block_of_the_deepest_branch():
    config = three_config(3).replace(stages=2, depth=(1, (1, 2), 1), fusion_depth=1)
    model = abstract_classifier(config)
    scales = layer_scales(nnx.to_pure_dict(nnx.state(model, nnx.Param)), 0.5, model.layer_of)

    def of(tree):
        (scale,) = set(jax.tree.leaves(tree))
        return scale

    first, second = scales["blocks"][0], scales["blocks"][1]
    assert of(scales["patch_embed"]) == 0.5**6
    assert [of(first["blocks"]), of(first["fusion"]), of(first["projs"])] == [0.5**5, 0.5**4, 0.5**4]
    assert [of(second["blocks"][1][i]) for i in range(2)] == [0.5**3, 0.5**2]
    assert [of(second["blocks"][2]), of(second["revert_projs"]), of(scales["norm"])] == [0.5**3, 0.5, 1]


def test_every_branch_is_quantised_in_training():
    model = nnx.eval_shape(lambda: abstract_classifier(three_config(3).replace(fusion_depth=1)))
    model.eval()
    x = jax.ShapeDtypeStruct((1, 48, 48, 3), jnp.float32)

    def rounded(model) -> int:
        graphdef, params = nnx.split(model)
        return str(jax.make_jaxpr(lambda params, x: nnx.merge(graphdef, params)(x))(params, x)).count("round")

    assert rounded(model) == 0
    # 3 blocks of 4 linear layers; of each fusion projs, wq, proj and revert_projs: operands of each are rounded
    assert rounded(fake_quantised(model, "int8")) >= 2 * (3 * 4 + 3 * 4)
