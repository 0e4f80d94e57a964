"""Which kernel computes self-attention: cuDNN's only where it was tried, or asked for."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from convert.errors import SettingsError
from tests.small_model import small_config
from tests.train.small_weights import save_small
from train.devices import attention
from train.devices.attention import choose_attention
from train.devices.mesh import make_mesh
from train.inference.model import load_classifier
from train.job import prepare
from train.optim.state import abstract_model
from train.recipes import RECIPES
from train.run.folder import write_config

CONFIG = small_config(3)


@pytest.fixture
def mesh():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture
def looks_like_a_gpu(monkeypatch):
    monkeypatch.setattr(attention, "fastest_implementation", lambda devices, dtype: "cudnn")


@pytest.fixture
def tried(monkeypatch, looks_like_a_gpu):
    """What is computed with cuDNN's attention, where it works."""
    calls = []

    def attend(q, k, v, implementation, *bias):
        calls.append((implementation, q.shape[1:], q.dtype, *(b.shape[1:] for b in bias)))
        return (q + k) * v

    monkeypatch.setattr(attention, "dot_product_attention", attend)
    return calls


@pytest.fixture
def fails(monkeypatch, looks_like_a_gpu):
    """A device on which cuDNN's attention cannot be run."""

    def attend(q, k, v, implementation):
        def fail(x):
            raise RuntimeError("No valid engine configs\nfor Matmul_")

        return jax.pure_callback(fail, jax.ShapeDtypeStruct(q.shape, q.dtype), q)

    monkeypatch.setattr(attention, "dot_product_attention", attend)


def test_a_cpu_has_xlas_attention_and_refuses_cudnns(mesh):
    assert choose_attention("auto", CONFIG, "bfloat16", mesh) == ("xla", [])
    assert choose_attention("xla", CONFIG, "bfloat16", mesh) == ("xla", [])
    message = "cudnn needs NVIDIA GPUs of compute capability 8.0 or later and half precision; this is cpu and float32"
    with pytest.raises(SettingsError, match=message):
        choose_attention("cudnn", CONFIG, "float32", mesh)


@pytest.mark.parametrize("training", [True, False])
def test_cudnns_attention_is_tried_with_each_shape_of_the_model(mesh, tried, training):
    assert choose_attention("auto", CONFIG, "bfloat16", mesh, training=training) == ("cudnn", [])
    shapes = [(17, 2, 6), (5, 2, 12)]  # tokens, heads, width
    for calls, heads in ((tried[::2], 2), (tried[1::2], 1)):  # the second to compare one head with
        kernel = ("cudnn", "xla")[heads == 1]
        expected = [(kernel, (shape[0], heads, shape[2]), "bfloat16") for shape in shapes]
        assert calls == [call for call in expected for _ in range(1 + training)]
    tried.clear()
    reduced = CONFIG.replace(reduce_tokens="merge:1")
    assert choose_attention("auto", reduced, "bfloat16", mesh, training=False) == ("cudnn", [])
    biased = ((4, 2, 12), "bfloat16", (4,))  # of the branch that is reduced, once it is
    assert tried[::2] == [*(("cudnn", shape, "bfloat16") for shape in shapes), ("cudnn", *biased)]


def test_cudnns_attention_is_tried_with_as_many_keys_as_there_are(mesh, tried, monkeypatch):
    keys = []
    monkeypatch.setattr(attention, "dot_product_attention", lambda q, k, v, _: keys.append(k.shape[1]) or q)
    model = CONFIG.replace(attention=("spatial-reduction:2", "separable"))
    assert choose_attention("auto", model, "bfloat16", mesh, training=False) == ("cudnn", [])
    assert keys == [1 + 2 * 2] * 2


def test_where_cudnns_attention_fails_xlas_is_taken_and_one_line_says_why(mesh, fails):
    kernel, (note,) = choose_attention("auto", CONFIG, "bfloat16", mesh, training=False)
    assert kernel == "xla"
    assert note.startswith(
        "self-attention is XLA's, which is slower, because cuDNN's failed: 17 tokens, 2 heads of 6: "
    )
    assert "\n" not in note
    with pytest.raises(SettingsError, match=r"attention_kernel cudnn failed: 17 tokens, .*: choose auto or xla$"):
        choose_attention("cudnn", CONFIG, "bfloat16", mesh, training=False)


@pytest.mark.parametrize("kernel", ["cudnn", "tpu"])
@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_kernel_that_computes_something_else_is_not_taken(mesh, monkeypatch, kernel, wrong):
    monkeypatch.setattr(attention, "fastest_implementation", lambda devices, dtype: kernel)
    monkeypatch.setattr(
        attention, "dot_product_attention", lambda q, k, v, name: (q + k) * v * (wrong if name == kernel else 1)
    )
    chosen, (note,) = choose_attention("auto", CONFIG, "bfloat16", mesh)
    assert chosen == "xla"
    assert "17 tokens, 2 heads of 6: it computes something else: its largest error is" in note
    with pytest.raises(SettingsError, match=f"^attention_kernel {kernel} failed: .*: choose auto or xla$"):
        choose_attention(kernel, CONFIG, "bfloat16", mesh)


def test_tpus_kernel_is_tried_too_and_is_xlas_elsewhere(mesh, monkeypatch):
    assert choose_attention("tpu", CONFIG, "bfloat16", mesh) == ("tpu", [])
    monkeypatch.setattr(attention, "fastest_implementation", lambda devices, dtype: "tpu")
    tried = []

    def attend(q, k, v, implementation):
        tried.append((implementation, q.shape[1:]))
        return q

    monkeypatch.setattr(attention, "dot_product_attention", attend)
    assert choose_attention("auto", CONFIG, "float32", mesh, training=False) == ("tpu", [])
    assert tried == [("tpu", (17, 2, 6)), ("xla", (17, 1, 6)), ("tpu", (5, 2, 12)), ("xla", (5, 1, 12))]


def test_what_jax_itself_refuses_is_told_in_its_words(mesh, looks_like_a_gpu):
    kernel, (note,) = choose_attention("auto", CONFIG, "bfloat16", mesh)
    assert kernel == "xla"
    assert "17 tokens, 2 heads of 6: " in note


def test_processes_take_the_same_attention(mesh, tried, monkeypatch):
    monkeypatch.setattr(attention.jax, "process_count", lambda: 2)
    gathered = []

    def gather(refused):
        gathered.append(refused.item())
        return np.array([False, True])

    monkeypatch.setattr(attention.multihost_utils, "process_allgather", gather)
    kernel, (note,) = choose_attention("auto", CONFIG, "bfloat16", mesh)
    assert kernel == "xla"
    assert note.endswith("because cuDNN's failed: in another process")
    assert gathered == [False]


def _kernels(model):
    return {block.attn.implementation for stage in model.blocks for blocks in stage.blocks for block in blocks}


def test_a_run_computes_with_the_kernel_that_was_chosen_and_may_be_continued_with_another(
    tried, few_digits_dir, small_variant, tmp_path
):
    output = str(tmp_path / "run")
    config = dataclasses.replace(RECIPES["digits"], data_dir=few_digits_dir, precision="bfloat16", output=output)
    job = prepare(config)
    assert _kernels(abstract_model(job.task, job.config)) == {"cudnn"}
    assert job.described["train"]["attention_kernel"] == "auto"  # what was asked for, whatever machine continues it
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run", job.described)
    job = prepare(dataclasses.replace(config, attention_kernel="xla"))
    assert job.resumed
    assert _kernels(abstract_model(job.task, job.config)) == {"xla"}


def test_loaded_weights_compute_with_the_kernel_that_was_chosen(tried, tmp_path):
    weights = str(save_small(tmp_path / "weights.safetensors", "abc"))
    for wanted, expected in (("auto", "cudnn"), ("xla", "xla")):
        classifier = load_classifier(weights, precision="bfloat16", attention_kernel=wanted)
        assert _kernels(nnx.merge(classifier.graphdef, classifier.params)) == {expected}


def test_a_device_that_fails_is_told_among_the_notes_on_loaded_weights(fails, tmp_path):
    classifier = load_classifier(str(save_small(tmp_path / "weights.safetensors", "abc")), precision="bfloat16")
    assert any("because cuDNN's failed" in note for note in classifier.notes)
    assert _kernels(nnx.merge(classifier.graphdef, classifier.params)) == {"xla"}
