"""CrossViT weights between timm, torch, Flax, safetensors, Orbax and the hub.

`python -m convert SOURCE DESTINATION` is the same as a command. Importing the package imports no framework.
"""

from convert.errors import ConversionError

__all__ = ["ConversionError", "list_pretrained", "load_flax", "load_torch", "load_weights", "predict", "save"]
__all__ += ["to_flax", "to_torch"]


def __getattr__(name: str):
    if name == "predict":
        from convert.prediction import predict

        return predict
    if name in __all__:
        import convert.models

        return getattr(convert.models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # what is imported late is completed too
