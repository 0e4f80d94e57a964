"""CrossViT (arXiv 2103.14899) in Flax NNX. Importing the package, or its config, does not import jax."""

from crossvit_jax.config import CrossViTConfig, get_config, list_variants

__all__ = ["CrossViT", "CrossViTConfig", "create_model", "get_config", "list_variants"]


def __getattr__(name: str):
    if name in ("CrossViT", "create_model"):
        import crossvit_jax.crossvit

        return getattr(crossvit_jax.crossvit, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
