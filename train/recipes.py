"""Recipes: sets of defaults that the settings of a run start from."""

from train.config import TrainConfig

# What all tasks but classification have in common
_PLAIN = {"auto_augment": "", "erase_prob": 0.0, "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0}
# and detection and segmentation: images come with boxes or masks
_DENSE = _PLAIN | {"crop_pct": None, "augment_on": "host"}
# Digits of 96 pixels without their labels. No digit is mirrored.
_DIGITS = _PLAIN | {
    "image_size": 96,
    "image_scale": (1.0, 2 / 3),
    "crop_pct": 1.0,
    "crop_ratio": (0.8, 1.25),
    "hflip": 0.0,
    "drop_path": 0.0,
    "epochs": 20,
    "batch_size": 64,
    "lr_batch_size": 64,
    "lr_stepping": "step",
    "warmup_epochs": 2,
    "min_lr": 1e-6,
    "workers": 0,
}
# Digits of 24 to 48 pixels on 96, chosen by short trials on two CPU cores. No digit is mirrored.
_SCENES = _DENSE | {
    "image_size": 96,
    "image_scale": (1.0, 2 / 3),
    "width": 64,
    "hflip": 0.0,
    "drop_path": 0.0,
    "epochs": 7,
    "batch_size": 32,
    "lr": 1e-3,
    "lr_batch_size": 32,
    "lr_stepping": "step",
    "warmup_epochs": 2,
    "min_lr": 1e-6,
    "clip_grad": 1.0,
}

RECIPES: dict[str, TrainConfig] = {
    # arXiv 2103.14899 §4.1 and IBM's main.py: batch 4,096 at learning rate 0.004
    "imagenet": TrainConfig(recipe="imagenet"),
    # What IBM's main.py does when no flag is given, on 8 GPUs of 64 images each: 5 epochs of warm-up, repeated
    # augmentation, epochs that lag behind the schedule, decay on tokens and position embeddings, Mixup on each GPU.
    "imagenet-ibm": TrainConfig(
        recipe="imagenet-ibm",
        batch_size=512,
        warmup_epochs=5,
        repeated_aug=3,
        lr_stepping="epoch-late",
        mix_group=64,
        decay_tokens=True,
    ),
    # Paper §4.1: 30 epochs at 408 pixels. It gives no learning rate; these are the ones DeiT published for 384 pixels.
    "finetune-408": TrainConfig(
        recipe="finetune-408",
        image_size=408,
        image_scale=(1.0, 16 / 17),
        crop_pct=1.0,
        epochs=30,
        batch_size=512,
        lr=5e-6,
        min_lr=5e-6,
        warmup_epochs=5,
        weight_decay=1e-8,
    ),
    # Pretrained weights on a folder of one's own: a learning rate that falls towards the image, gentle crops
    "finetune": TrainConfig(
        recipe="finetune",
        crop_scale=(0.35, 1.0),
        epochs=30,
        batch_size=64,
        lr=2e-4,
        lr_batch_size=64,
        warmup_epochs=3,
        min_lr=1e-6,
        layer_decay=0.75,
        clip_grad=1.0,
    ),
    # Paper table 9: SGD at 0.01 for batches of 768, cosine; the paper trains 1,000 epochs without naming a warm-up
    "transfer": TrainConfig(
        recipe="transfer",
        optimizer="sgd",
        epochs=1000,
        batch_size=768,
        lr=0.01,
        lr_batch_size=768,
        warmup_epochs=5,
        weight_decay=1e-4,
    ),
    # 8×8 grey digits blown up to 48 pixels, chosen by short trials on two CPU cores. A mirrored digit is no digit, and
    # so few epochs are too few to profit from mixing, so only the crop is random.
    "digits": TrainConfig(
        recipe="digits",
        image_size=48,
        image_scale=(1.0, 2 / 3),
        crop_pct=1.0,
        crop_scale=(0.8, 1.0),
        crop_ratio=(0.8, 1.25),
        hflip=0.0,
        auto_augment="",
        erase_prob=0.0,
        mixup=0.0,
        cutmix=0.0,
        smoothing=0.1,
        drop_path=0.0,
        epochs=14,
        batch_size=64,
        lr=1e-3,
        lr_batch_size=64,
        warmup_epochs=1,
        warmup_lr=3e-4,
        workers=0,
    ),
    # ViTDet's for COCO (arXiv 2203.16527 appendix): layer decay, large-scale jitter, 100 epochs in batches of 64
    "detection": TrainConfig(
        recipe="detection",
        task="detection",
        **_DENSE,
        scale_jitter=(0.1, 2.0),
        epochs=100,
        batch_size=64,
        lr=1e-4,
        lr_batch_size=64,
        lr_stepping="step",
        warmup_epochs=1,
        min_lr=1e-6,
        layer_decay=0.7,
        weight_decay=0.1,
        clip_grad=1.0,
    ),
    # UPerNet's on plain vision transformers for ADE20K (mmsegmentation, configs/vit): a rate that falls in a line, over
    # 160,000 steps of 16 images, which are 127 epochs there
    "segmentation": TrainConfig(
        recipe="segmentation",
        task="segmentation",
        **_DENSE,
        scale_jitter=(0.5, 2.0),
        color_jitter=0.5,
        epochs=100,
        batch_size=16,
        lr=6e-5,
        lr_batch_size=16,
        lr_schedule="linear",
        lr_stepping="step",
        warmup_epochs=1,
        min_lr=0.0,
        weight_decay=0.01,
    ),
    # SimMIM's for ViT-B on ImageNet (arXiv 2111.09886), with a cosine in place of its one step
    "pretraining": TrainConfig(
        recipe="pretraining",
        task="pretraining",
        method="simmim",
        **_PLAIN,
        crop_scale=(0.67, 1.0),
        epochs=800,
        batch_size=2048,
        lr=1e-4,
        lr_stepping="step",
        warmup_epochs=10,
        warmup_lr=5e-7,
        min_lr=1e-6,
        clip_grad=5.0,
    ),
    # DINO's for small vision transformers (arXiv 2104.14294). There, crops are also made grey, blurred or solarised at
    # random: that is not done here.
    "dino": TrainConfig(
        recipe="dino",
        task="pretraining",
        method="dino",
        **_PLAIN,
        augment_on="host",
        crop_scale=(0.4, 1.0),
        color_jitter=0.4,
        epochs=300,
        batch_size=1024,
        lr=5e-4,
        lr_batch_size=256,
        lr_stepping="step",
        warmup_epochs=10,
        min_lr=1e-6,
        weight_decay=0.04,
        weight_decay_end=0.4,
        clip_grad=3.0,
    ),
    "detection-digits": TrainConfig(recipe="detection-digits", task="detection", **_SCENES, distances=(24.0, 48.0)),
    "segmentation-digits": TrainConfig(recipe="segmentation-digits", task="segmentation", **_SCENES, dice=1.0),
    # At 96 pixels, where 16 cells fill an image and a cell is 2 x 2 patches of the one branch and one of the other
    "pretraining-digits": TrainConfig(
        recipe="pretraining-digits",
        task="pretraining",
        method="simmim",
        **_DIGITS,
        crop_scale=(0.8, 1.0),
        lr=1e-3,
        clip_grad=5.0,
    ),
    "dino-digits": TrainConfig(
        recipe="dino-digits",
        task="pretraining",
        method="dino",
        **_DIGITS,
        augment_on="host",
        crop_scale=(0.5, 1.0),
        local_crops=2,
        local_scale=(0.2, 0.5),
        prototypes=256,
        lr=5e-4,
        weight_decay=0.04,
        clip_grad=3.0,
    ),
}
