"""Does pre-training without labels help where labels are few? scikit-learn's digits at 96 pixels: see pretraining.md.

    python docs/pretraining_digits.py FOLDER [--method simmim|dino]

1,438 digits without labels are pre-trained on. Then 10 labels of each class are learned, three times with other labels
and seeds, from the pre-trained weights and from fresh ones, and the 359 held-out digits are told apart.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from digits_runs import trained
from PIL import Image

SEEDS, LABELS_A_CLASS = 3, 10
COPIES = (
    5  # of each of these pictures: after every epoch a checkpoint is written, which would else take most of the time
)
SIZE = ["--image-size=96", "--image-scale=1,2/3", "--crop-pct=1", "--hflip=0", "--drop-path=0"]
PRETRAINING = {
    # in the recipe's batches of 64, 20 epochs are too few steps to get beyond the mean picture
    "simmim": ["--recipe=pretraining-digits", "--mask-cell=24", "--mask-ratio=0.4", "--batch-size=16", "--lr=2e-3"],
    "dino": ["--recipe=dino-digits", "--local-crops=2"],
}
FINE_TUNING = ["--recipe=digits", "--batch-size=50", "--lr-batch-size=50", "--workers=0"]


def read_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pixels (digits, 8, 8) uint8, the labels, and which digits are held out."""
    from sklearn.datasets import load_digits

    from convert.digits import held_out_indices

    digits = load_digits()
    held_out = np.zeros(len(digits.target), bool)
    held_out[held_out_indices(digits.target)] = True
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target, held_out


def write_pictures(folder: Path, pixels: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> None:
    """`pictures/` without labels, and `few-SEED/` with `train/CLASS/` and `val/CLASS/`."""

    def save(index: int, place: Path, copies: int = 1) -> None:
        place.mkdir(parents=True, exist_ok=True)
        for copy in range(copies):
            Image.fromarray(pixels[index]).save(place / f"{index}-{copy}.png")

    for index in np.flatnonzero(~held_out):
        save(index, folder / "pictures")
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        for label in range(10):
            for index in rng.permutation(np.flatnonzero(~held_out & (labels == label)))[:LABELS_A_CLASS]:
                save(index, folder / f"few-{seed}" / "train" / str(label), COPIES)
        for index in np.flatnonzero(held_out):
            save(index, folder / f"few-{seed}" / "val" / str(labels[index]))


def last_top1(folder: Path) -> float:
    """In percent, of the held-out digits."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["eval/top1"] for line in lines if "eval/top1" in line][-1]


def last_loss(folder: Path) -> float:
    """Of a pre-training, of the pictures that it held out."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["eval/loss"] for line in lines if "eval/loss" in line][-1]


def loss_of_one_picture(pixels: np.ndarray, held_out: np.ndarray, size: tuple[int, int], branches: int) -> float:
    """SimMIM's loss of the held-out digits if for each of them the same is predicted: the median of all others.

    Every branch sees nearly the same distances, whatever its size.
    """
    images = images_of(pixels, size)
    return branches * float(np.abs(images[held_out] - np.median(images[~held_out], axis=0)).mean())


def images_of(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Normalised images (digits, height, width, 3)."""
    from crossvit_jax.preprocess import normalised

    pictures = (Image.fromarray(x).convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC) for x in pixels)
    return np.stack([normalised(np.asarray(picture)) for picture in pictures])


def features_of(model, pixels: np.ndarray, method: str) -> np.ndarray:
    """The means of each branch's patch tokens, or for dino its class tokens (digits, features)."""
    import jax.numpy as jnp
    from flax import nnx

    @nnx.jit
    def means(model, images):
        if method == "dino":
            return model(images)  # without a head: the class tokens
        return jnp.concatenate([x.mean((1, 2)) for x in model.forward_patches(images)], axis=-1)

    model.eval()
    images = images_of(pixels, model.config.image_size)
    return np.concatenate(
        [np.asarray(means(model, jnp.asarray(images[start : start + 64]))) for start in range(0, len(images), 64)]
    )


def judge(name: str, features: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> str:
    """k-NN and a linear probe: learned from the features of all digits that were pre-trained on, with their labels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from train.tasks.pretraining.scores import nearest_classes

    known, asked, right = features[~held_out], features[held_out], labels[held_out]
    nearest = np.mean(nearest_classes(known, labels[~held_out], 10, asked) == right)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(known, labels[~held_out])
    return f"{name:24} k-NN {100 * nearest:6.2f} %   linear probe {100 * probe.score(asked, right):6.2f} %"


def compare(folder: Path, *, method: str, epochs: int, fine_tuning_epochs: int) -> list[str]:
    """Trains all that is to be compared; the lines of the result."""
    from flax import nnx

    from convert import load_flax
    from crossvit_jax import CrossViT

    pixels, labels, held_out = read_digits()
    if not folder.exists():
        write_pictures(folder, pixels, labels, held_out)
    data = f"--dataset=folder:{folder / 'pictures'}"
    flags = [*PRETRAINING[method], *SIZE, data, "--val-fraction=0.05", f"--epochs={epochs}"]
    pretrained = trained("--task=pretraining", *flags, output=folder / method)
    model = load_flax(pretrained)
    fresh = CrossViT(model.config, rngs=nnx.Rngs(0))
    lines = [f"held-out loss at the end: {last_loss(pretrained):.3f}"]
    if method == "simmim":
        same = loss_of_one_picture(pixels, held_out, model.config.image_size, len(model.config.branches))
        lines.append(f"that of the same picture for all: {same:.3f}")
    lines += [judge("raw pixels", pixels.reshape(len(pixels), -1).astype(np.float64), labels, held_out)]
    for name, one in (("fresh weights", fresh), ("pre-trained weights", model)):
        lines.append(judge(name, features_of(one, pixels, method), labels, held_out))
    schedule = [f"--epochs={fine_tuning_epochs}", f"--eval-every={fine_tuning_epochs}"]
    for name, init in (("fresh", []), (f"{method}-tuned", [f"--init={pretrained}:last"])):
        found = []
        for seed in range(SEEDS):
            data = [f"--dataset=folder:{folder / f'few-{seed}'}", f"--seed={seed}"]
            run = trained(*FINE_TUNING, *SIZE, *schedule, *init, *data, output=folder / f"{name}-{seed}")
            found.append(last_top1(run))
        shown = ", ".join(f"{top1:.2f}" for top1 in found)
        lines.append(f"100 labels, {name:13} top-1 {shown}   mean {np.mean(found):.2f} %")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for pictures and runs; runs that are there are not done again")
    parser.add_argument("--method", choices=PRETRAINING, default="simmim")
    parser.add_argument("--epochs", type=int, default=20, help="of pre-training (default: 20)")
    parser.add_argument("--fine-tuning-epochs", type=int, default=8, help="of 5 passes each (default: 8)")
    args = parser.parse_args(argv)
    lines = compare(args.folder, method=args.method, epochs=args.epochs, fine_tuning_epochs=args.fine_tuning_epochs)
    print("", *lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
