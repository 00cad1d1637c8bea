"""Images for a trained model: those of its training, or others with the same noise."""

import os
from dataclasses import replace

from common.options import as_option, told_as_options
from common.user_errors import UserError
from experiment.checkpoints import Trained
from images.degradations import GaussianNoise, PairedNoise
from images.image_sources import SIZE, ImageSource, load_images
from images.noisy_images import NoisyImageDataset, noisy_splits


def images_for(
    trained: Trained, dataset=None, data_dir="./data", same_images=False, **noise
) -> tuple[ImageSource, tuple[NoisyImageDataset | None, ...]]:
    """The images that a model was trained on, or others, degraded as those of its training.

    Args:
        trained: `model.trained`.
        dataset, data_dir: as for load_images; None: the dataset of its training.
        same_images: refuse another data set than the one of the training, and keep a range of σ
            from which images draw theirs; otherwise its middle is taken.
        noise: fields of GaussianNoise that replace those of the training; None does not.

    Returns the ImageSource and (train, val, test), the test alone unless same_images. A UserError
    if the images cannot be had, or the model or the noise is not for them.
    """
    recipe, about, path = trained.recipe, trained.checkpoint["recipe"], trained.path
    dataset = dataset or dataset_of(trained, same_images)
    crop = recipe.crop
    if crop and not same_images:
        crop = min(crop, SIZE)  # smaller photographs than those of the training are welcome, too
    source = load_images(dataset, data_dir, recipe.seed, crop, not same_images)
    if same_images:
        known = (None, source.sha256())  # earlier versions did not note it
        if source.name != about["dataset"] or about.get("images_sha256") not in known:
            other = f"{path} was trained and tested on other images than these, {about['dataset']}"
            raise UserError(f"{other}; name the same ones with --dataset")
    degradation = recipe.degradation
    changes = {name: value for name, value in noise.items() if value is not None}
    if changes and (degradation.task != "denoise" or source.test.paired):
        whose = f"{path} was trained for {degradation}"
        whose = f"{source.name} has noise of its own" if source.test.paired else whose
        raise UserError(f"{as_option(next(iter(changes)))} is for noise; {whose}; drop it")
    if source.test.paired:
        degradation = recipe.for_images(source).degradation
    elif isinstance(degradation, PairedNoise) and "noise_level" not in changes:
        words = "was trained on pairs; name pairs with --dataset, or a --noise-level"
        raise UserError(f"{path} {words}")
    elif changes and not isinstance(degradation, GaussianNoise):
        degradation = GaussianNoise()  # as models for all kinds of noise are compared
    if "noise_level" in changes:
        changes["noise_map"] = "uniform"
    elif not same_images and getattr(degradation, "noise_map", None) == "uniform":
        changes["noise_level"] = sum(degradation.noise_level) / 2
    with told_as_options():
        degradation = replace(degradation, **changes)
    return source, noisy_splits(source, degradation, recipe.lossless_share if same_images else None)


def dataset_of(trained: Trained, same_images: bool) -> str:
    """The --dataset of a model's training; a UserError if it was a folder that is not there.

    Earlier versions noted no folder: their models are tested on CIFAR-10, or the same images are to
    be named.
    """
    name = trained.checkpoint["recipe"]["dataset"]
    known = {"photos": "photos", "CIFAR-10": "cifar10"}
    dataset = trained.checkpoint.get("dataset", known.get(name))
    if dataset is None and same_images:
        raise UserError(f"{trained.path} was trained on {name}; name it with --dataset")
    dataset = dataset or "cifar10"
    if dataset not in known.values() and not os.path.isdir(dataset):
        raise UserError(
            f"{trained.path} was trained on {name}, which is not at {dataset} any more; name it, "
            "or other images, with --dataset"
        )
    return dataset
