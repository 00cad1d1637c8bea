"""The optimizers: AdamW, and Muon, in which all matrices of a shape take their step together."""

from collections import defaultdict

import torch

# of the Newton–Schulz iterations, optimised by Cesista, You and Jordan 2025,
# https://leloykun.github.io/ponder/muon-opt-coeffs
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def make_optimizer(model, name, lr, weight_decay):
    """That of `--optimizer`; the weight decay is decoupled and times the learning rate."""
    if name == "muon":
        return Muon(model.parameters(), lr, weight_decay)
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)


def state_shapes(optimizer):
    """{index of a parameter: {name: shape}}: what its state holds after a step."""
    shapes = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if "momentum" in group:
                of_p = {"momentum_buffer": p.flatten(1).shape}
            else:
                of_p = {"exp_avg": p.shape, "exp_avg_sq": p.shape}
            shapes[len(shapes)] = {"step": torch.Size(), **of_p}
    return shapes


class Muon(torch.optim.AdamW):
    """Steps along the orthogonalised momentum of weight matrices; all else gets AdamW.

    Momentum M of a weight matrix [m, n], or of a convolution's kernel as [its first dimension, all
    others], becomes the orthogonal matrix nearest to it, U Vᵀ of its singular value decomposition,
    by an iteration (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks").
    Its entries are scaled by 0.2 √max(m, n), so that learning rate and weight decay mean what they
    mean to AdamW (Liu et al. 2025, "Muon is Scalable for LLM Training").

    torch's Muon takes one matrix after the other. A small model has dozens of equal shape, and most
    of such a step would go into starting operations; here they are one batch. Weight decay and
    momentum, Nesterov's, are of the matrices alone.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95, betas=(0.9, 0.95)):
        matrices, others = [], []
        for p in params:
            (matrices if is_matrix(p) else others).append(p)
        groups = [
            {"params": others, "weight_decay": 0.0},
            {"params": matrices, "momentum": momentum},
        ]
        super().__init__(groups, lr, betas, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self):
        """One step of every parameter with a gradient. The matrices' gradients are dropped."""
        group = self.param_groups[1]
        by_shape = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                by_shape[p.flatten(1).shape].append(p)
        for shape, matrices in by_shape.items():
            gradients = torch.stack([p.grad.flatten(1) for p in matrices])
            buffers = [self._momentum_of(p) for p in matrices]
            momenta = torch.stack(buffers).lerp_(gradients, 1 - group["momentum"])
            updates = orthogonalised(gradients.lerp_(momenta, group["momentum"]))
            updates.mul_(group["lr"] * 0.2 * max(shape) ** 0.5)
            torch._foreach_copy_(buffers, momenta.unbind())
            updates = [u.view(p.shape) for u, p in zip(updates, matrices, strict=True)]
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(matrices, updates)
            for p in matrices:
                p.grad = None  # AdamW passes over it
        super().step()

    def _momentum_of(self, p):
        if not self.state[p]:  # AdamW reads the number of steps when a state is loaded
            zeros = p.new_zeros(p.flatten(1).shape)
            self.state[p] = {"momentum_buffer": zeros, "step": p.new_zeros(())}
        return self.state[p]["momentum_buffer"]


def is_matrix(parameter):
    """Whether Muon orthogonalises it: not biases, embeddings [1, ...] and depthwise kernels, nor
    what has fewer than 4 rows or columns, as the last layer of a router.
    """
    return parameter.ndim >= 2 and parameter.shape[1] > 1 and min(parameter.flatten(1).shape) >= 4


def orthogonalised(matrices):
    """The orthogonal matrices nearest to them, to within about 30 %.  [n, rows, columns] -> same.

    Newton–Schulz iterations x -> a x + b x xᵀ x + c (x xᵀ)² x, which bring all singular values but
    those below about 1e-3 of the norm close to 1.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
