"""Inspects ranges and statistics of the images that a model would be trained and tested on.

    python debug_test_data.py --dataset photos
    python debug_test_data.py --dataset FOLDER --crop 96 --noise-level 0.01 0.3 --unclipped

Says loudly when something looks wrong, and then exits with 1.
"""

import torch

from common.user_errors import counted, run_main
from experiment import command_line as cli
from experiment.recipe import Recipe, changed
from images.image_sources import load_images
from images.noisy_images import NoisyImageDataset
from images.training_batches import training_batches

CROPS = 256  # of photographs, which are looked at


def normalisation_problems(images: torch.Tensor) -> list[str]:
    """What looks wrong about float32 images [n, 3, h, w] that should be in [0, 1]: sentences."""
    low, high, mean = images.min().item(), images.max().item(), images.mean().item()
    if not torch.isfinite(images).all():
        return ["there are values that are not finite"]
    odd_mean = low >= 0 and high <= 1 and not 0.05 < mean < 0.95
    problems = {
        f"values reach {high:g}: they were not divided by 255, or standardised": high > 1,
        f"values reach {low:g}: they were standardised or scaled to [-1, 1]": low < 0,
        f"no value is above {high:g}: all black, or divided by 255 twice": high <= 2 / 255,
        f"the mean is {mean:.3f}, far from that of photographs (0.2 to 0.8)": odd_mean,
    }
    return [problem for problem, there in problems.items() if there]


def shared_images(some: torch.Tensor | list, others: torch.Tensor | list) -> int:
    """How many uint8 images [3, h, w], of pairs the true ones, of the first stand, byte for byte,
    among the others.
    """
    known = {image[:3].numpy().tobytes() for image in others}
    return sum(image[:3].numpy().tobytes() in known for image in some)


def inspect(name: str, dataset: NoisyImageDataset, crop: int | None) -> list[str]:
    """Prints the figures of a split, of photographs those of crops; returns what looks wrong."""
    images = dataset.split.images
    if crop:
        noisy, clean, _ = next(training_batches(dataset, CROPS, 0, 1, crop=crop))
    else:
        noisy, clean, _ = next(dataset.batches(min(1024, len(dataset))))
    noisy = noisy[:, :3]  # without the mask of holes
    flat = sum(bool((image == image[0, 0, 0]).all()) for image in images)
    values = clean if crop else images.float() / 255
    std, mean = torch.std_mean(values, dim=(0, 2, 3))
    print(
        f"\n{name}: {counted(len(dataset), 'image')}, {'crops' if crop else 'each'} "
        f"{tuple(values.shape[1:])}, {dataset.split.lossless.double().mean():.1%} stored lossless\n"
        f"  range of values      {255 * values.min():.0f} … {255 * values.max():.0f}\n"
        f"  mean of R, G, B      {' '.join(f'{m:.4f}' for m in mean)}\n"
        f"  std of R, G, B       {' '.join(f'{s:.4f}' for s in std)}\n"
        f"  images of one value  {flat}\n"
        f"  clean batch          {clean.min():.3f} … {clean.max():.3f}, {clean.dtype}\n"
        f"  degraded batch       {noisy.min():.3f} … {noisy.max():.3f}, "
        f"std of the difference {(noisy - clean).std():.4f}\n"
        f"  labels               {dataset.split.labels.min()} … {dataset.split.labels.max()}"
    )
    problems = [f"{name}: {p}" for p in normalisation_problems(values)]
    if getattr(dataset.degradation, "unclipped", False):
        noisy = noisy.clamp(0, 1)
    problems += [f"{name}, degraded: {p}" for p in normalisation_problems(noisy)]
    if flat > len(images) // 10:
        problems.append(f"{name}: {flat} of {len(images)} images of a single value")
    return problems


def main():
    parser = cli.make_parser(
        "Inspects ranges and statistics of the data; exits with 1 when something looks wrong.",
        "python debug_test_data.py --dataset photos",
    )
    cli.add_data(parser)
    cli.add_task(parser, "noise of σ = 0.2")
    group = parser.add_argument_group("training", "by default thumbnails, and the published seed")
    cli.add_fields(group, Recipe, ("crop", "seed"), with_defaults=False)
    args = parser.parse_args()
    recipe, problems = changed(Recipe(), vars(args)), []
    source = load_images(args.dataset, args.data_dir, recipe.seed, recipe.crop)
    recipe = recipe.for_images(source, vars(args))
    splits = recipe.splits(source)
    noise = ", ".join(dict.fromkeys(str(split.degradation) for split in splits))
    print(f"{source.name}: {len(source.classes)} classes, {noise}")
    for name, dataset in zip(("train", "val", "test"), splits, strict=True):
        problems += inspect(name, dataset, recipe.crop)
    for name, other in (("val", source.val), ("train", source.train)):
        shared = shared_images(source.test.images, other.images)
        if shared:
            problems.append(f"{counted(shared, 'test image')} in {name} as well, byte for byte")
    print()
    for problem in problems:
        print(f"!!! WRONG: {problem}")
    print(counted(len(problems), "problem") if problems else "nothing looks wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    run_main(main)
