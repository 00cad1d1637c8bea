"""What scripts that test a model start with: that of a checkpoint, and images for it."""

import os

from common.user_errors import UserError, printable
from experiment.checkpoints import read_checkpoint
from experiment.command_line import select_device
from images.degradations import degradation_in
from images.image_sources import SIZE, load_images
from images.noisy_images import noisy_splits


def load_for_evaluation(args, build_model, same_images=False):
    """The model of a checkpoint and the images that it was trained on, or others.

    Args:
        args: checkpoint, dataset (None: the model's), data_dir, noise_level (None: the model's),
            device and threads of the command line, and unclipped and jpeg_share where it has
            those.
        build_model: function(checkpoint, path) -> the denoiser, as in small_vit.py.
        same_images: refuse another data set than the one of the training, and keep a range of σ
            from which images draw theirs; otherwise its middle is taken.

    Returns:
        (checkpoint dict, denoiser on the device, ImageSource, NoisyImageDatasets for training,
        validation and test: the test's alone is there unless same_images).

    Raises:
        UserError: one of them cannot be had.
    """
    device = select_device(args.device, args.threads)
    checkpoint = read_checkpoint(args.checkpoint)
    model = build_model(checkpoint, args.checkpoint).to(device)
    recipe = checkpoint["recipe"]
    degradation = degradation_in(recipe)
    trained = f"trained on {recipe['dataset']} with {degradation}"
    epochs = f"epoch {checkpoint['epoch']} of {recipe['epochs']}"
    parameters = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    print(printable(f"{args.checkpoint}: {parameters}, {epochs}, {trained}"))
    dataset = args.dataset or dataset_of(checkpoint, args.checkpoint, same_images)
    crop = recipe.get("crop")
    if crop and not same_images:
        crop = min(crop, SIZE)  # smaller photographs than those of the training are welcome, too
    source = load_images(dataset, args.data_dir, recipe["seed"], crop, not same_images)
    if args.noise_level and degradation.task != "denoise":
        raise UserError(f"--noise-level: {args.checkpoint} was trained for {degradation}; drop it")
    if same_images and (
        source.name != recipe["dataset"]
        or recipe.get("images_sha256") not in (None, source.sha256())
    ):
        raise UserError(
            f"{args.checkpoint} was trained and tested on other images than these, "
            f"{recipe['dataset']}; name the same ones with --dataset"
        )
    share = recipe["lossless_share"] if same_images else None
    changes = {}
    if args.noise_level:
        changes = {"noise_level": args.noise_level, "noise_map": "uniform"}
    elif not same_images and getattr(degradation, "noise_map", None) == "uniform":
        changes = {"noise_level": sum(degradation.noise_range) / 2}
    for name in ("unclipped", "jpeg_share"):
        if getattr(args, name, None) is not None:
            changes[name] = getattr(args, name)
    splits = noisy_splits(source, degradation_in(recipe | changes), share)
    return checkpoint, model, source, splits


def dataset_of(checkpoint, path, same_images):
    """The --dataset of a checkpoint's training; `path` is the checkpoint's, for an error.

    Raises:
        UserError: it was a folder that is not there, or, for the same images, one not noted.
    """
    name = checkpoint["recipe"]["dataset"]
    known = {"photos": "photos", "CIFAR-10": "cifar10"}
    # Earlier versions did not note their folder; their models are shown on CIFAR-10 then.
    dataset = checkpoint.get("dataset", known.get(name, None if same_images else "cifar10"))
    if dataset not in known.values() and not (dataset and os.path.isdir(dataset)):
        where = f", which is not at {dataset} any more" if dataset else ""
        raise UserError(
            f"{path} was trained on {name}{where}; name it, or other images, with --dataset"
        )
    return dataset
