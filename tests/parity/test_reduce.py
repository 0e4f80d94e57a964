"""Fewer tokens: the papers' matching and pruning, and the twins against each other with gradients."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import crossvit_jax.reduce
import crossvit_torch
import crossvit_torch.reduce
from crossvit_jax.config import Reduction, get_config, get_dense_config
from tests.parity.reference import (
    GRADIENT_BOUND,
    OUTPUT_BOUND,
    PARAMETER_BOUND,
    abstract,
    channels_last,
    error,
    flax_gradients,
    flax_twin,
    gradient_errors,
    images,
    perturb,
    random_array,
    torch_gradients,
    torch_twin,
)

# grids of 4 x 4 and 3 x 3 patches
SETTINGS = {"image_size": 48, "image_scale": (1.0, 1.0), "embed_dim": (12, 24), "num_heads": (2, 2), "num_classes": 7}
SETTINGS |= {"stages": 1, "depth": (1, 2), "mlp_ratio": (2.0, 2.0)}
TWO_STAGES = {**SETTINGS, "stages": 2, "depth": (1, 1)}
REDUCED = {
    "merge": {**SETTINGS, "reduce_tokens": "merge:5,1"},
    "prune": {**SETTINGS, "reduce_tokens": "prune:0.6"},
    "fusion": {**TWO_STAGES, "reduce_tokens": "fusion:0.6,0.5"},
}


# --- the papers in plain words ---


def tome(x, size, keys, r):
    """Token merging of one image as section 3.1 of the paper tells it, token by token.

    Args:
        x: (tokens, dim), the class token first; size: (tokens,); keys: (tokens, heads, width).

    Returns:
        A list of (token, size), the class token first.
    """
    metric = keys.mean(1)
    a, b = list(range(0, len(x), 2)), list(range(1, len(x), 2))  # the class token is in A, and has no edge

    def similarity(i, j):
        return metric[i] @ metric[j] / np.linalg.norm(metric[i]) / np.linalg.norm(metric[j])

    edges = {i: max(b, key=lambda j: similarity(i, j)) for i in a if i}
    chosen = sorted(edges, key=lambda i: -similarity(i, edges[i]))[:r]
    groups = [[i] for i in a if i not in chosen] + [[j, *(i for i in chosen if edges[i] == j)] for j in b]
    return [((x[group] * size[group, None]).sum(0) / size[group].sum(), size[group].sum()) for group in groups]


def evit(x, size, attention, keep):
    """One image's tokens that are kept by their attention, and the others as their mean weighted by it, likewise."""
    order = sorted(range(1, len(x)), key=lambda i: -attention[i])
    kept, rest = order[:keep], order[keep:]
    mean = (x[rest] * attention[rest, None]).sum(0) / attention[rest].sum()
    return [(x[i], size[i]) for i in [0, *kept]] + [(mean, size[rest].sum())]


def arrays(tokens=12, batch=3):
    x, keys = random_array(0, batch, tokens, 5), random_array(1, batch, tokens, 2, 4)
    size = np.random.default_rng(2).integers(1, 5, (batch, tokens)).astype(float)
    size[:, 0] = 1
    return x, size, keys


def both(function, *args, **kwargs):
    """The results of both twins in float64, as numpy arrays."""
    with jax.enable_x64():
        given = [jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in args]
        flax = [np.asarray(x) for x in getattr(crossvit_jax.reduce, function)(*given, **kwargs)]
    given = [torch.tensor(x) if isinstance(x, np.ndarray) else x for x in args]
    return flax, [x.numpy() for x in getattr(crossvit_torch.reduce, function)(*given, **kwargs)]


@pytest.mark.parametrize(("tokens", "r", "sized"), [(12, 1, False), (12, 5, True), (13, 3, True), (13, 5, False)])
def test_merging_is_the_papers(tokens, r, sized):
    x, size, keys = arrays(tokens)
    ones = np.ones_like(size)
    for tokens_out, sizes_out in both("merge_tokens", x, size if sized else None, keys, r):
        assert tokens_out.shape == (3, tokens - r, 5)
        for i in range(len(x)):
            expected = tome(x[i], (size if sized else ones)[i], keys[i], r)
            np.testing.assert_array_equal(tokens_out[i, 0], x[i, 0])
            np.testing.assert_allclose(tokens_out[i], [token for token, _ in expected], rtol=0, atol=1e-12)
            np.testing.assert_allclose(sizes_out[i], [size for _, size in expected], rtol=0, atol=1e-12)


def test_of_equally_similar_patches_the_first_are_merged_and_with_the_first():
    x, _, keys = arrays(9, batch=1)
    keys[:] = keys[:, :1]  # all alike: patches 2 and 4 are merged into 1, and 6 and 8 stay
    for tokens, sizes in both("merge_tokens", x, None, keys, 2):
        np.testing.assert_array_equal(sizes, [[1, 1, 1, 3, 1, 1, 1]])
        expected = [x[0, 0], x[0, 6], x[0, 8], x[0, [1, 2, 4]].mean(0), x[0, 3], x[0, 5], x[0, 7]]
        np.testing.assert_allclose(tokens[0], expected, rtol=0, atol=1e-15)


def test_no_more_than_half_of_the_patches_are_merged():
    x, size, keys = arrays(8)
    for tokens, sizes in both("merge_tokens", x, size, keys, 100):
        assert tokens.shape == (3, 5, 5)
        np.testing.assert_allclose(sizes.sum(1), size.sum(1))


def test_pruning_keeps_the_most_attended_and_the_mean_of_the_rest():
    x, size, _ = arrays()
    attention = np.random.default_rng(3).dirichlet(np.ones(12), 3)
    for tokens, sizes in both("keep_attended", x, size, attention, 5):
        for i in range(len(x)):
            expected = evit(x[i], size[i], attention[i], 4)
            np.testing.assert_allclose(tokens[i], [token for token, _ in expected], rtol=0, atol=1e-14)
            np.testing.assert_allclose(sizes[i], [size for _, size in expected])


def test_patches_that_get_no_attention_at_all_have_a_mean_too():
    x, _, _ = arrays(6, batch=1)
    for tokens, _ in both("keep_attended", x, None, np.array([[0.0, 0.5, 0.5, 0, 0, 0]]), 3):
        np.testing.assert_allclose(tokens[0, -1], x[0, 3:].mean(0), rtol=0, atol=1e-12)


def test_of_equally_attended_patches_the_first_are_kept():
    x, _, _ = arrays(6, batch=1)
    for tokens, sizes in both("keep_attended", x, None, np.full((1, 6), 0.5), 3):
        np.testing.assert_allclose(tokens[0], [x[0, 0], x[0, 1], x[0, 2], x[0, 3:].mean(0)], rtol=0, atol=1e-15)
        np.testing.assert_array_equal(sizes, [[1, 1, 1, 3]])


def test_a_token_of_some_size_counts_as_so_many_equal_tokens():
    """What the log-weights are for: three equal patches in one token of size 3 change nothing for the others."""
    model = perturb(crossvit_torch.create_model("ti", **SETTINGS)).double()
    x = torch.tensor(random_array(0, 2, 8, 24))
    x[:, 6:] = x[:, 5:6]
    size = torch.ones(2, 6, dtype=torch.float64)
    size[:, 5] = 3
    with torch.no_grad():
        for name in ("blocks.0.blocks.1.0", "blocks.0.fusion.0"):
            block = model.get_submodule(name)
            assert error(block(x[:, :6], size), block(x)[:, :6]) <= OUTPUT_BOUND["float64"]
        whole = crossvit_torch.reduce.mean_patch(x, None)
        assert error(crossvit_torch.reduce.mean_patch(x[:, :6], size), whole) <= OUTPUT_BOUND["float64"]


# --- whole models ---


@functools.cache
def state(stages, precision):
    model = perturb(crossvit_torch.create_model("ti", **(SETTINGS if stages == 1 else TWO_STAGES)))
    # larger than usual: attention has to tell patches apart
    larger = {name: 3 * tensor if tensor.ndim > 1 else tensor for name, tensor in model.state_dict().items()}
    return {name: tensor.to(getattr(torch, precision)) for name, tensor in larger.items()}


def twin_of(settings, precision):
    copy = {name: tensor.clone() for name, tensor in state(settings["stages"], precision).items()}
    return torch_twin("ti", copy, precision, **settings)


def flax_of(settings, precision):
    return flax_twin("ti", state(settings["stages"], precision), precision, **settings)


@pytest.mark.parametrize(
    ("kind", "precision", "checkpointing"),
    [
        ("merge", "float32", False),
        ("merge", "float64", True),
        ("prune", "float64", False),
        ("fusion", "float64", False),
    ],
)
def test_the_twins_agree_with_gradients(kind, precision, checkpointing):
    """Also where the one keeps its activations and the other, with gradient checkpointing, does not."""
    settings = REDUCED[kind]
    expected = torch_gradients(twin_of(settings, precision), [images(48)], precision)
    with torch.no_grad():
        whole = twin_of({**settings, "reduce_tokens": None}, precision)(
            torch.tensor(images(48), dtype=getattr(torch, precision))
        )
    assert error(whole, expected.outputs[0]) > 1e-3  # else nothing was reduced
    with jax.enable_x64(precision == "float64"):
        flax = flax_of(settings, precision)
        flax.set_grad_checkpointing(checkpointing)
        result = flax_gradients(flax, [images(48)], precision)
        assert error(result.outputs[0], expected.outputs[0]) <= OUTPUT_BOUND[precision]
        assert error(result.inputs[0], expected.inputs[0]) <= GRADIENT_BOUND[precision]
        errors = gradient_errors(result.parameters, expected.parameters)
        assert max(errors.values()) <= PARAMETER_BOUND[precision], errors


def test_patches_that_stand_for_more_count_for_more_in_the_mean(monkeypatch):
    settings, sizes = {**SETTINGS, "reduce_tokens": "merge:2", "global_pool": "avg"}, []
    mean_patch = crossvit_torch.crossvit.mean_patch
    monkeypatch.setattr(
        crossvit_torch.crossvit, "mean_patch", lambda x, size: sizes.append(size) or mean_patch(x, size)
    )
    x = images(48)
    with torch.no_grad():
        expected = twin_of(settings, "float32")(torch.tensor(x, dtype=torch.float32))
    assert sizes[0] is None and sizes[1].shape == (2, 1 + 9 - 4) and (sizes[1][:, 1:].sum(1) == 9).all()
    flax = flax_of(settings, "float32")
    result = nnx.jit(lambda model, x: model(x))(flax, jnp.asarray(channels_last(x), jnp.float32))
    assert error(result, expected) <= OUTPUT_BOUND["float32"]


def test_gradient_checkpointing_of_the_torch_twin_changes_no_number():
    twin = twin_of(REDUCED["merge"], "float64")
    expected = torch_gradients(twin, [images(48)], "float64").parameters
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    twin.set_grad_checkpointing()
    assert max(gradient_errors(torch_gradients(twin, [images(48)], "float64").parameters, expected).values()) <= 1e-14


def test_without_a_reduction_the_program_has_nothing_of_it():
    x = jax.ShapeDtypeStruct((2, 48, 48, 3), jnp.float32)
    texts = []
    for reduction in (None, "none", "merge:2"):
        graphdef, params = nnx.split(abstract("ti", **SETTINGS, reduce_tokens=reduction))
        texts.append(jax.jit(lambda params, x, g=graphdef: nnx.merge(g, params)(x)).lower(params, x).as_text())
    assert texts[0] == texts[1] != texts[2]
    assert "log" not in texts[0] and "compare" not in texts[0] and "iota" not in texts[0]


def test_half_precision_keeps_sizes_and_ranks_in_float32():
    model = twin_of({**SETTINGS, "reduce_tokens": "merge:2"}, "float32")
    x = torch.tensor(images(48), dtype=torch.float32)
    with torch.no_grad():
        expected = model(x)
        model.dtype = torch.bfloat16
        merged = {}
        reduced = crossvit_torch.blocks.merge_tokens
        crossvit_torch.blocks.merge_tokens = lambda *a: merged.setdefault("out", reduced(*a))
        try:
            block = model.blocks[0].blocks[1][0]
            with torch.autocast("cpu", torch.bfloat16):
                block.reduce(
                    torch.tensor(random_array(0, 2, 10, 24), dtype=torch.float32), None, model.config.reduction, 1
                )
        finally:
            crossvit_torch.blocks.merge_tokens = reduced
        assert error(model(x), expected) <= 0.2
    assert merged["out"][1].dtype == torch.float32


# --- what is asked for ---


def test_one_number_is_for_the_widest_branch():
    branches = get_config("ti").branches
    assert Reduction.parse("merge:8", branches).amounts == (0, 8)
    assert Reduction.parse("fusion:0.7", branches).amounts == (1.0, 0.7)
    assert Reduction.parse("prune:0.7,0.5", branches).amounts == (0.7, 0.5)
    assert Reduction.parse("merge:8", [replace(branches[0], embed_dim=384), branches[1]]).amounts == (8, 0)


def test_the_tokens_left_in_the_published_model():
    def counts(text):
        """Patches of the wide branch of `ti` before each block and at the end."""
        reduction, patches = get_config("ti", reduce_tokens=text).reduction, [196]
        for stage in range(3):
            for reduces in reduction.blocks(1, 12)[4 * stage : 4 * stage + 4]:
                patches.append(reduction.left(1, patches[-1]) if reduces else patches[-1])
            if reduction.kind == "fusion" and stage < 2:
                patches[-1] = reduction.left(1, patches[-1])
        return patches

    assert counts("merge:8") == list(range(196, 99, -8))
    assert counts("merge:98")[:4] == [196, 98, 49, 25]
    assert counts("fusion:0.7") == [196] * 4 + [139] * 4 + [99] * 5  # 138 and 98, each with one for the rest
    assert counts("prune:0.7") == [196] * 4 + [139] * 3 + [99] * 3 + [71] * 3
    assert Reduction("fusion", (1.0, 0.55)).left(1, 20) == 11 + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge", "reduce_tokens must be merge:N (patches that each block merges), fusion:SHARE or prune:SHARE"),
        ("merge:0.5", "one for each of the 2 branches; got 'merge:0.5'"),
        ("merge:-1", "got 'merge:-1'"),
        ("merge:0", "got 'merge:0'"),
        ("merge:1,2,3", "got 'merge:1,2,3'"),
        ("fusion:1", "got 'fusion:1'"),
        ("fusion:0", "got 'fusion:0'"),
        ("fusion:nan", "got 'fusion:nan'"),
        ("drop:0.5", "got 'drop:0.5'"),
        ("merge:99", "merges at most half of a branch's patches, which is 98 of the 196 of branch 1; got 99"),
        ("prune:0.999", "prune:0.999 leaves out none but one of the 196 patches of branch 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(text, message):
    with pytest.raises(ValueError) as refused:
        get_config("ti", reduce_tokens=text)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_fusion_pruning_needs_two_stages():
    with pytest.raises(ValueError, match=r"fusion:0\.5 is done between stages, and there is only one"):
        get_config("ti", reduce_tokens="fusion:0.5", stages=1)


def test_what_needs_a_token_for_each_patch_is_refused():
    with pytest.raises(ValueError, match="a model for detection needs a token for each patch, and this model has redu"):
        get_dense_config("detection", "ti", num_classes=3, reduce_tokens="merge:8")
    flax, twin = (make("ti", **SETTINGS, reduce_tokens="merge:2") for make in (abstract, crossvit_torch.create_model))
    x = jax.ShapeDtypeStruct((1, 48, 48, 3), jnp.float32)
    for method in ("forward_features", "forward_patches", "forward_intermediates", "attention_maps"):
        message = f"{method} needs a token for each patch, and this model has reduce_tokens merge:2"
        with pytest.raises(ValueError, match=message):
            nnx.eval_shape(lambda model, x, method=method: getattr(model, method)(x), flax, x)
        with pytest.raises(ValueError, match=message):
            getattr(twin, method)(torch.zeros(1, 3, 48, 48))
