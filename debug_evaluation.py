"""Repeats the evaluation that training did and says whether the stored figures hold.

    python debug_evaluation.py --checkpoint photos.pt
    python debug_evaluation.py --dataset cifar10_partial    # best_denoising_model_proper.pt

Exit code 1 when a figure of the checkpoint is not reproduced.
"""

from command_line import UserError, make_parser, run_main
from denoising_experiment_proper import (
    evaluate,
    load_for_evaluation,
    noisy_splits,
    result_line,
    validation_batches,
    validation_mse,
)

# On the machine of the training the figures repeat exactly. Elsewhere, sums in another order can
# exchange two almost equal keys at the edge of the top-k.
TOLERANCES = {"psnr": 0.01, "ssim": 0.0005, "mse": 2e-5, "utilisation": 0.001}


def compare(stored, measured):
    """Rows (name, stored, measured, agrees) for every figure of an evaluation's summary."""
    rows = []
    for name, value in stored.items():
        other = measured[name]
        if name == "utilisation":
            pairs = [
                (f"block {block} expert {expert}", a, b)
                for block, (x, y) in enumerate(zip(value, other, strict=True), 1)
                for expert, (a, b) in enumerate(zip(x, y, strict=True), 1)
            ]
        else:
            pairs = [(name, value, other)]
        kind = next((k for k in TOLERANCES if k in name), None)
        tolerance = TOLERANCES.get(kind, 0)  # the number of images has to be the same
        rows += [(label, a, b, a == b or abs(a - b) <= tolerance) for label, a, b in pairs]
    return rows


def main():
    parser = make_parser(
        "Repeats the evaluation of a checkpoint on the whole test set and on the validation set, "
        "and exits with 1 when the figures stored in the checkpoint are not reproduced.",
        *("checkpoint", "dataset", "data-dir", "device", "threads"),
    )
    args = parser.parse_args()
    args.noise_level = None  # the one of the training: other figures are not stored
    checkpoint, model, source, noise_level = load_for_evaluation(args, same_images=True)
    recipe = checkpoint["recipe"]
    if "test" not in checkpoint:
        raise UserError(
            f"{args.checkpoint} holds no test figures, its training did not end; "
            "finish it with denoising_experiment_proper.py --resume"
        )
    _, val_set, test_set = noisy_splits(source, noise_level, recipe["lossless_share"])
    result = evaluate(model, test_set)
    rows = [
        ("val images", recipe["val_images"], len(val_set), recipe["val_images"] == len(val_set))
    ]
    stored = {"val_mse": checkpoint["val_mse"], **checkpoint["test"]}
    validation = validation_batches(val_set, next(model.parameters()).device)
    measured = {"val_mse": validation_mse(model, validation), **result.summary()}
    rows += compare(stored, measured)
    print(f"\n{'figure':<18}{'stored':>12}{'measured':>12}")
    for name, before, now, agrees in rows:
        print(f"{name:<18}{before:>12.6g}{now:>12.6g}{'' if agrees else '   DISAGREES'}")
    wrong = sum(not agrees for *_, agrees in rows)
    print(f"{wrong} of {len(rows)} figures disagree" if wrong else "all figures agree")
    print(result_line(result.psnr, result.ssim, source.name))
    return 1 if wrong else 0


if __name__ == "__main__":
    run_main(main)
