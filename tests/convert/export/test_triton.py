"""A model repository for Triton: as its own parser reads it, with the answers of the weights that it was made of."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import tritonclient
from google.protobuf import text_format

from convert.__main__ import main
from tests.command_line import refusal
from tests.train.small_weights import save_small


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("weights") / "w.safetensors", "abc")


@pytest.fixture(scope="module")
def repository(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton") / "models"
    assert main([str(weights), str(folder), "--triton"]) == 0
    return folder


@pytest.fixture(scope="module")
def parsed(repository):
    """The settings of each model, by Triton's description of them; its package imports gRPC, which is not needed."""
    (place,) = tritonclient.__path__
    spec = importlib.util.spec_from_file_location("model_config_pb2", Path(place, "grpc", "model_config_pb2.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {
        folder.name: text_format.Parse((folder / "config.pbtxt").read_text(), module.ModelConfig())
        for folder in repository.iterdir()
    }


def _tensors(some):
    return {one.name: list(one.dims) for one in some}


def test_triton_reads_an_ensemble_of_preprocessing_and_a_batched_model(parsed, repository):
    assert set(parsed) == {"crossvit", "crossvit_preprocess", "crossvit_classify"}
    for name, config in parsed.items():
        assert config.name == name
        assert (repository / name / "1").is_dir()
    ensemble, before, classifier = (parsed[f"crossvit{end}"] for end in ("", "_preprocess", "_classify"))
    assert (ensemble.platform, before.backend, classifier.backend) == ("ensemble", "onnxruntime", "onnxruntime")
    assert (ensemble.max_batch_size, before.max_batch_size, classifier.max_batch_size) == (0, 0, 64)
    assert _tensors(ensemble.input) == _tensors(before.input) == {"pictures": [-1, -1, -1, 3]}
    assert _tensors(ensemble.output) == {"probabilities": [-1, 3], "classes": [-1, 3]}
    assert _tensors(before.output) == {"images": [-1, 3, 48, 48]}
    assert _tensors(classifier.input) == {"images": [3, 48, 48]}
    assert _tensors(classifier.output) == {"probabilities": [3], "classes": [3]}
    batching = classifier.dynamic_batching
    assert list(batching.preferred_batch_size) == [8, 16, 32, 64]
    assert batching.max_queue_delay_microseconds == 5000
    assert batching.default_queue_policy.max_queue_size == 1024
    assert batching.default_queue_policy.timeout_action == 0  # REJECT
    (labelled,) = (one for one in ensemble.output if one.label_filename)
    assert (repository / "crossvit" / labelled.label_filename).read_text() == "a\nb\nc\n"


def test_the_steps_in_a_row_answer_as_the_server_does(parsed, repository, weights):
    import onnxruntime

    from convert import predict

    tensors = {"pictures": np.random.default_rng(0).integers(0, 256, (2, 70, 90, 3), dtype=np.uint8)}
    pictures = tensors["pictures"]
    for step in parsed["crossvit"].ensemble_scheduling.step:  # as Triton goes through them
        session = onnxruntime.InferenceSession(repository / step.model_name / "1" / "model.onnx")
        given = {name: tensors[of] for name, of in step.input_map.items()}
        names = list(step.output_map)
        for name, value in zip(names, session.run(names, given), strict=True):
            tensors[step.output_map[name]] = value
    expected = predict(str(weights), list(pictures), top_k=3)
    for row, classes, told in zip(tensors["probabilities"], tensors["classes"], expected, strict=True):
        assert ["abc"[index] for index in classes] == [one.class_name for one in told]
        np.testing.assert_allclose(row[classes], [one.probability for one in told], atol=1e-5)


def test_what_it_cannot_be_made_of_or_written_over_is_told(weights, repository, tmp_path, capsys):
    program = "python -m convert"
    capsys.readouterr()
    assert "exists; --overwrite" in refusal(capsys, program, main, weights, repository, "--triton")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    told = refusal(capsys, program, main, weights, tmp_path / "mine", "--triton", "--overwrite")
    assert "a folder of other things, such as thesis.txt," in told
    (tmp_path / "project" / "crossvit").mkdir(parents=True)  # a project's folder of the same name
    assert "other things" in refusal(capsys, program, main, weights, tmp_path / "project", "--triton", "--overwrite")
    for flag, words in (("--quantize=dynamic", "leave out --quantize"), ("--dtype=bfloat16", "float32 or float16")):
        assert words in refusal(capsys, program, main, weights, tmp_path / "new", "--triton", flag)
    assert not (tmp_path / "new").exists()
