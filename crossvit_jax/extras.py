"""The optional packages of this project, and how what misses one names the extra of the installation that brings it."""

# By extra: what is imported, and the package's name for pip. pyproject.toml asks for the same, which a test compares.
EXTRAS: dict[str, dict[str, str]] = {
    "train": {
        "optax": "optax",
        "orbax": "orbax-checkpoint",
        "tensorflow_datasets": "tensorflow-datasets",
        "importlib_resources": "importlib_resources",
        "sklearn": "scikit-learn",
        "matplotlib": "matplotlib",
        "simplejpeg": "simplejpeg",
        "numba": "numba",
        "yaml": "pyyaml",
        "faster_coco_eval": "faster-coco-eval",
        "tensorboardX": "tensorboardX",
    },
    "torch": {"torch": "torch", "torchvision": "torchvision", "timm": "timm"},
    "onnx": {"onnx": "onnx", "onnxruntime": "onnxruntime", "onnxscript": "onnxscript"},
    "hf": {"datasets": "datasets"},
    "qat": {"qwix": "qwix"},
    "torchao": {"torchao": "torchao"},
    "serve": {
        "starlette": "starlette",
        "uvicorn": "uvicorn",
        "python_multipart": "python-multipart",
        "prometheus_client": "prometheus_client",
    },
}


def extra_of(package: str) -> str | None:
    """The extra that brings what is imported under this name, such as `train` for `sklearn`; None: no extra does."""
    return next((extra for extra, packages in EXTRAS.items() if package in packages), None)


def needs(what: str, packages: list[str], extra: str, *, verb: str = "needs") -> str:
    """One line that says which packages are missing and which command installs them.

    The command is that of a clone of this project, which is on no package index.

    Args:
        what: needs them, in words.
        packages: as they are imported, or as pip names them.
        extra: brings them, such as `train`.
    """
    names = {imported: name for packages_of in EXTRAS.values() for imported, name in packages_of.items()}
    return f"{what} {verb} {', '.join(names.get(one, one) for one in packages)}: pip install -e '.[{extra}]'"
