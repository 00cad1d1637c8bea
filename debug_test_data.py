"""Inspects ranges and statistics of the images that a model would be trained and tested on.

    python debug_test_data.py --dataset photos

Says loudly when something looks wrong, and then exits with 1.
"""

import torch

from common.user_errors import run_main
from experiment import command_line as cli
from experiment.recipe import Recipe, changed
from images.image_sources import load_images
from images.noisy_images import NoisyImageDataset, noisy_splits


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


def shared_images(some: torch.Tensor, others: torch.Tensor) -> int:
    """How many images of one uint8 tensor [n, 3, h, w] stand, byte for byte, in another."""
    known = {image.tobytes() for image in others.numpy()}
    return sum(image.tobytes() in known for image in some.numpy())


def inspect(name: str, dataset: NoisyImageDataset) -> list[str]:
    """Prints the figures of a split; returns what looks wrong."""
    images = dataset.split.images
    noisy, clean, _ = next(dataset.batches(min(1024, len(dataset))))
    flat = sum(bool((image == image[0, 0, 0]).all()) for image in images)
    values = images.float() / 255
    std, mean = torch.std_mean(values, dim=(0, 2, 3))
    print(
        f"\n{name}: {len(dataset):,} images {tuple(images.shape[1:])} {images.dtype}, "
        f"{dataset.split.lossless.double().mean():.1%} stored lossless\n"
        f"  range of values      {images.min()} … {images.max()}\n"
        f"  mean of R, G, B      {' '.join(f'{m:.4f}' for m in mean)}\n"
        f"  std of R, G, B       {' '.join(f'{s:.4f}' for s in std)}\n"
        f"  images of one value  {flat}\n"
        f"  clean batch          {clean.min():.3f} … {clean.max():.3f}, {clean.dtype}\n"
        f"  noisy batch          {noisy.min():.3f} … {noisy.max():.3f}, "
        f"std of the noise {(noisy - clean).std():.4f}\n"
        f"  labels               {dataset.split.labels.min()} … {dataset.split.labels.max()}"
    )
    problems = [f"{name}: {p}" for p in normalisation_problems(values)]
    problems += [f"{name}, noisy: {p}" for p in normalisation_problems(noisy)]
    if flat > len(images) // 10:
        problems.append(f"{name}: {flat} of {len(images)} images have a single value")
    return problems


def main():
    parser = cli.make_parser(
        "Inspects ranges and statistics of the data; exits with 1 when something looks wrong.",
        "python debug_test_data.py --dataset photos",
    )
    cli.add_data(parser)
    cli.add_noise(parser)
    args = parser.parse_args()
    degradation = changed(Recipe(), vars(args)).degradation
    source = load_images(args.dataset, args.data_dir, args.seed)
    print(f"{source.name}: {len(source.classes)} classes, {degradation}")
    datasets, problems = noisy_splits(source, degradation), []
    for name, dataset in zip(("train", "val", "test"), datasets, strict=True):
        problems += inspect(name, dataset)
    for name, other in (("val", source.val), ("train", source.train)):
        shared = shared_images(source.test.images, other.images)
        if shared:
            problems.append(f"{shared} test images stand in {name} as well, byte for byte")
    print()
    for problem in problems:
        print(f"!!! WRONG: {problem}")
    print(f"{len(problems)} problems" if problems else "nothing looks wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    run_main(main)
