"""Repeats the evaluation that training did and says whether the stored figures hold.

    python debug_evaluation.py --checkpoint photos.pt
    python debug_evaluation.py --dataset cifar10_partial    # best_denoising_model_proper.pt

Exit code 1 when a figure of the checkpoint is not reproduced.
"""

import math

from common.user_errors import UserError, run_main
from experiment import command_line as cli
from experiment.checkpoints import TEST
from experiment.evaluation import evaluate, validation_batches, validation_mse
from experiment.reports import result_line
from experiment.trained_model import images_for
from small_vit import load_model

# On the machine of the training the figures repeat exactly. Elsewhere, sums in another order can
# exchange two almost equal keys at the edge of the top-k.
TOLERANCES = {"psnr": 0.01, "ssim": 0.0005, "mse": 2e-5, "utilisation": 0.001}


def flat(figures: dict) -> dict:
    """The figures of an evaluation's summary, with one of its own for every expert."""
    figures = dict(figures)
    for block, load in enumerate(figures.pop("utilisation"), 1):
        figures |= {f"utilisation {block}.{expert}": share for expert, share in enumerate(load, 1)}
    return figures


def compare(stored: dict, measured: dict) -> list[tuple[str, float, float, bool]]:
    """Rows (name, stored, measured, agrees) for every figure of one of two summaries."""
    rows, stored, measured = [], flat(stored), flat(measured)
    for name in {**stored, **measured}:
        tolerance = next((TOLERANCES[kind] for kind in TOLERANCES if kind in name), 0)
        # The number of images has to be the same, and that of experts
        before, now = stored.get(name, math.nan), measured.get(name, math.nan)
        rows.append((name, before, now, before == now or abs(before - now) <= tolerance))
    return rows


def main():
    parser = cli.make_parser(
        "Repeats the evaluation of a checkpoint on the whole test set and on the validation set, "
        "and exits with 1 when the figures stored in the checkpoint are not reproduced.",
        "python debug_evaluation.py --checkpoint photos.pt",
    )
    cli.add_checkpoint(parser)
    cli.add_data(parser, of_model=True)
    cli.add_computation(parser)
    args = parser.parse_args()
    device = cli.select_device(args.device, args.threads)
    model = load_model(args.checkpoint).to(device)
    checkpoint = model.trained.checkpoint
    print(model.described())
    if "test" not in checkpoint:
        advice = "finish it with denoising_experiment_proper.py --resume"
        words = "holds no test figures, its training did not end"
        raise UserError(f"{args.checkpoint} {words}; {advice}")
    images = images_for(model.trained, args.dataset, args.data_dir, same_images=True)
    source, (_, val_set, test_set) = images
    result = evaluate(model, test_set)
    val_mse = validation_mse(model, validation_batches(val_set, device))
    stored = {"val images": checkpoint["recipe"]["val_images"], "val_mse": checkpoint["val_mse"]}
    stored |= {name: checkpoint["test"][name] for name in TEST}
    measured = {"val images": len(val_set), "val_mse": val_mse, **result.summary()}
    rows = compare(stored, measured)
    print(f"\n{'figure':<18}{'stored':>12}{'measured':>12}")
    for name, before, now, agrees in rows:
        print(f"{name:<18}{before:>12.6g}{now:>12.6g}{'' if agrees else '   DISAGREES'}")
    wrong = sum(not agrees for *_, agrees in rows)
    print(f"{wrong} of {len(rows)} figures disagree" if wrong else "all figures agree")
    print(result_line(result.psnr, result.ssim, source.name))
    return 1 if wrong else 0


if __name__ == "__main__":
    run_main(main)
